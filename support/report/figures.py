"""The paper's figures for finished runs, drawn with matplotlib from results.json.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py figures runs --out figures`
writes them.

Each function returns one figure, or raises Nothing if the runs lack the data that it shows.
Zero-shot, FT and Lipsum-FT have a colour, a grey value and a marker of their own, the others are
grey. Names stand beside the points.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn.manifold import TSNE

import data
from support.report import tables
from support.report.tables import Results
from support.run.setup import Setup

Point = Sequence[float] | Float[np.ndarray, "2"]
Points = Sequence[Point] | Float[np.ndarray, "points 2"]


class Nothing(Exception):
    """These runs lack the data of a figure; the message says which runs or command would provide
    it.
    """


LOOKS = {
    "zero-shot": {"color": "black", "marker": "*", "markersize": 15, "zorder": 5},
    "ft": {"color": "#D55E00", "marker": "s", "markersize": 7, "zorder": 3},
    "lipsum": {"color": "#004488", "marker": "o", "markersize": 8, "zorder": 4},
}
OTHER = {"color": "0.68", "marker": "o", "markersize": 6, "zorder": 2}


def look(method: str) -> dict[str, Any]:
    """Returns the colour and marker of a method, the same in every figure.

    A post-hoc result's marker is hollow.
    """
    base, is_post_hoc, _ = method.partition("+")
    return LOOKS.get(base, OTHER) | (
        {"markerfacecolor": "none"} if is_post_hoc else {"markeredgecolor": "white"}
    )


def new_figure(count: int, **shared: bool) -> tuple[Figure, list[Axes]]:
    """Returns a figure with a grid of `count` panels, of a size at which eight points are readable
    on a slide.
    """
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    figure = Figure(figsize=(7.2, 5.2 * rows / columns), dpi=200, layout="constrained")
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False, **shared).flat):
        axes.set(visible=index < count, xmargin=0.09, ymargin=0.09)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, labelbottom=True, labelleft=True)
    return figure, figure.axes[:count]


def add_label(axes: Axes, text: str, point: Point, method: str, optional: bool = False) -> None:
    """Writes a text that `place_labels` moves to a free place near its point, or removes if it is
    `optional`.
    """
    color = LOOKS.get(method.partition("+")[0], {"color": "0.4"})["color"]
    font = (
        {"fontsize": 10, "weight": "bold"} if method in LOOKS and not optional else {"fontsize": 8}
    )
    place = {
        "ha": "center",
        "va": "center",
        "xytext": (0, 0),
        "textcoords": "offset points",
        "in_layout": False,
    }
    leader = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
    axes.annotate(
        text,
        point,
        label="optional" * optional,
        arrowprops=leader,
        color=color,
        zorder=6,
        **font,
        **place,
    )


def plot(axes: Axes, points: Points, method: str, label: str = "", **style: Any) -> None:
    """Draws points (x, y), and a label beside the last one."""
    axes.plot(*np.asarray(points).T, **look(method) | style)
    if label:
        add_label(axes, label, points[-1], method)


def place_labels(figure: Figure) -> Figure:
    """Moves each label to the nearest place around its point that least overlaps labels, edges,
    points and lines.
    """
    figure.draw_without_rendering()
    pixels = figure.dpi / 72
    angles = np.radians(sorted(range(0, 360, 15), key=lambda angle: (angle % 90, angle % 180)))
    angles, rings = map(np.ravel, np.meshgrid(angles, (5, 8, 12, 17, 23, 30, 38)))
    around = np.clip(1.42 * np.stack([np.cos(angles), np.sin(angles)], axis=1), -1, 1)
    for axes in filter(Axes.get_visible, figure.axes):
        paths = [line.get_path() for line in axes.lines if line.get_linestyle() != "None"]
        paths += [path for bars in axes.collections for path in bars.get_paths()]
        marks = [(path.interpolated(30).vertices, 1) for path in paths]
        marks += [(line.get_xydata(), line.get_markersize() / 2 + 1) for line in axes.lines]
        marks = [
            np.insert(axes.transData.transform(points), 2, radius * pixels, axis=1)
            for points, radius in marks
        ]
        marks, taken, inside = (
            np.concatenate(marks),
            np.zeros((0, 4)),
            axes.bbox.padded(-3 * pixels),
        )
        for text in sorted(axes.texts, key=lambda text: (text.get_label(), -text.get_fontsize())):
            point = axes.transData.transform(text.xy)
            half = np.array(Text.get_window_extent(text).size) / 2 + pixels
            centers = (point + around * (half + rings[:, None] * pixels))[:, None]
            outside = (centers - half < inside.min) | (centers + half > inside.max)
            on_labels = (abs(taken[:, :2] - centers) < taken[:, 2:] + half).all(-1).sum(1)
            on_marks = (abs(marks[:, :2] - centers) < marks[:, 2:] + half).all(-1) @ marks[:, 2]
            costs = 1000 * (outside.any((1, 2)) + on_labels) + on_marks + rings
            best = np.argmin(costs)
            if text.get_label() and costs[best] > 8:
                text.remove()
                continue
            text.set_position((centers[best, 0] - point) / pixels)
            text.arrow_patch.set_visible(bool(rings[best] > 12))
            taken = np.append(taken, [[*centers[best, 0], *half]], axis=0)
            marks = np.append(
                marks,
                np.insert(np.linspace(point, centers[best, 0], 30), 2, pixels, axis=1),
                axis=0,
            )
    return figure


def trained(results: Sequence[Results]) -> dict[str, list[Results]]:
    """Returns the runs per training method, without the results of post-hoc methods."""
    return tables.by_method(run for run in results if "+" not in run["method"])


def main_settings(results: Sequence[Results]) -> list[Results]:
    """Returns each training method's runs with one choice of settings: the one with the most seeds,
    else the first.
    """
    return [
        run
        for runs in trained(results).values()
        for run in max(tables.groups(runs).values(), key=len)
    ]


def zero_shot_of(results: Sequence[Results]) -> Results:
    """Returns the results of the zero-shot model, which all runs share."""
    return results[0] | {
        "method": "zero-shot",
        "label": "zero-shot",
        "splits": results[0]["zero_shot"],
    }


def accuracies(runs: Sequence[Results], shift: str = "") -> Float[np.ndarray, "runs 2"]:
    """Returns each run's accuracy on a shift, or its mean over all, and that on the reference, in
    percent.
    """
    if any(not tables.shifts_of(run) for run in runs):
        raise Nothing("runs with shifts, for example --shifts painting sketch")
    references = [run["splits"][tables.reference_of(run)]["accuracy"] for run in runs]
    shifts = [
        run["splits"][shift]["accuracy"] if shift else tables.mean_of_shifts(run, "accuracy")
        for run in runs
    ]
    return 100 * np.array([shifts, references], float).T


def with_axes(figure: Figure, results: Sequence[Results], shifts: Sequence[str] = ()) -> Figure:
    """Completes a figure of reference against shifts: zero-shot in each panel, and the axes'
    labels.
    """
    for axes, shift in itertools.zip_longest(
        filter(Axes.get_visible, figure.axes), shifts, fillvalue=""
    ):
        plot(axes, accuracies([zero_shot_of(results)], shift), "zero-shot", "zero-shot")
    figure.supxlabel(
        "accuracy on the shift, %" if any(shifts) else "mean accuracy on the shifts, %", fontsize=10
    )
    figure.supylabel(f"accuracy on {tables.reference_of(results[0])}, %", fontsize=10)
    return place_labels(figure)


def trade_off_plot(results: Sequence[Results], shifts: Sequence[str] = ("",)) -> Figure:
    """Figures 2 and 7: each method's accuracy on the reference against that on a shift, or the mean
    of all ("").

    Means over seeds, standard deviations. A line joins runs that differ in one swept setting, the
    learning rate if any.
    """
    figure, panels = new_figure(len(shifts))
    for axes, shift in zip(panels, shifts, strict=True):
        joined = [draw_trade_off(axes, runs, shift) for runs in trained(results).values()]
        ends = "at the ends of lines: " * any(joined) + " or ".join(
            dict.fromkeys(filter(None, joined))
        )
        axes.set_title(f"{shift}   {ends}".strip(), fontsize=9, loc="left")
    return with_axes(figure, results, shifts)


def draw_trade_off(axes: Axes, method_runs: Sequence[Results], shift: str) -> str:
    """Draws the runs of one method, and returns the setting in which those differ that a line
    joins, if any.
    """
    method, joined = method_runs[0]["method"], ""
    *fixed, last = sorted(
        tables.varied_settings(method_runs), key=lambda name: name == "learning_rate"
    ) or [""]
    lines: dict[str, list[list[Results]]] = {}
    for runs in tables.groups(method_runs).values():
        line = ", ".join(f"{name.replace('_', ' ')} {runs[0]['settings'][name]}" for name in fixed)
        lines.setdefault(line, []).append(runs)
    for line, points in lines.items():
        per_point = [accuracies(runs, shift) for runs in points]
        cells = np.array([[each.mean(0), each.std(0, ddof=len(each) > 1)] for each in per_point])
        (x, y), (x_error, y_error) = cells.transpose(1, 2, 0)
        axes.errorbar(x, y, y_error, x_error, elinewidth=0.8, **look(method))
        if len(points) > 1:
            joined = last.replace("_", " ")
            add_label(axes, line, (x[:2].mean(), y[:2].mean()), method, optional=True)
        for index in (0, -1) if len(points) > 1 and method in LOOKS else ():
            add_label(
                axes,
                str(points[index][0]["settings"][last]),
                (x[index], y[index]),
                method,
                optional=True,
            )
    point = accuracies(main_settings(method_runs), shift).mean(0)
    add_label(
        axes, method_runs[0]["label"], point, method, optional=bool(shift) and method not in LOOKS
    )
    return joined


def trade_off_per_shift_plot(results: Sequence[Results]) -> Figure:
    """Figure 8: the trade-off on each shift."""
    return trade_off_plot(results, tables.shifts_of(results[0]) or [""])


def distortion_plot(results: Sequence[Results]) -> Figure:
    """Figures 3 and 9 to 12: feature distortion per method and split; means over seeds, standard
    deviations.
    """
    splits = [tables.reference_of(results[0]), *tables.shifts_of(results[0])]
    methods = tables.by_method(
        run for run in main_settings(results) if "distortion" in run["splits"][splits[0]]
    )
    if not methods:
        raise Nothing("runs whose results.json contains the feature distortion")
    figure, (axes,) = new_figure(1)
    for column, (method, runs) in enumerate(methods.items()):
        values = np.array([[run["splits"][name]["distortion"] for name in splits] for run in runs])
        (level, *means), (_, *errors) = values.mean(axis=0), values.std(axis=0, ddof=len(runs) > 1)
        style = look(method) | {"linestyle": "none", "markersize": 5, "elinewidth": 0.8}
        axes.errorbar(column + np.linspace(-0.3, 0.3, len(means)), means, errors, **style)
        axes.plot([column - 0.4, column + 0.4], [level, level], color=style["color"], linewidth=2.5)
    axes.set_title(
        f"level: {splits[0]} (reference), points from left: {', '.join(splits[1:])}",
        fontsize=9,
        loc="left",
    )
    axes.set_xticks(
        range(len(methods)),
        [runs[0]["label"] for runs in methods.values()],
        rotation=40,
        ha="right",
    )
    axes.set_ylabel("mean distance of features from the zero-shot ones")
    return figure


def energy_gap_plot(results: Sequence[Results]) -> Figure:
    """Figures 4 and 13: relative accuracy against the energy gap, a panel per shift, a point per
    run and zero-shot.
    """
    shifts = tables.shifts_of(results[0])
    if not any(tables.relative_accuracies(results, shift, "energy_gap") for shift in shifts):
        raise Nothing("runs with shifts whose results.json contains the energy gap")
    figure, panels = new_figure(len(shifts))
    for axes, shift in zip(panels, shifts, strict=True):
        for relative, gap, run in tables.relative_accuracies(
            [*results, zero_shot_of(results)], shift, "energy_gap"
        ):
            small = {"markersize": 0.7 * look(run["method"])["markersize"], "markeredgewidth": 0.7}
            plot(axes, [(gap, relative)], run["method"], **small)
        for method, runs in tables.by_method(
            [*main_settings(results), zero_shot_of(results)]
        ).items():
            if found := tables.relative_accuracies(runs, shift, "energy_gap"):
                point = np.mean([(gap, relative) for relative, gap, _ in found], axis=0)
                add_label(axes, runs[0]["label"], point, method, optional=method not in LOOKS)
        pearson = tables.correlation(results, shift, "energy_gap")
        axes.set_title(shift + ("" if pearson is None else f"   PCC {pearson:.2f}"), fontsize=10)
        axes.set_xscale("symlog", linthresh=1e-3)  # gaps span three orders of magnitude
    hollow = (
        "   (hollow: after post-hoc methods)"
        if any("+" in run["method"] for run in results)
        else ""
    )
    figure.supxlabel(f"energy gap, squared cosine{hollow}", fontsize=10)
    figure.supylabel(f"accuracy relative to {tables.reference_of(results[0])}", fontsize=10)
    return place_labels(figure)


def post_hoc_curves_plot(results: Sequence[Results]) -> Figure:
    """Figures 5 and 14:

    WiSE over alpha and TPGM over the penalty, for each fine-tuned run; means over seeds.
    """

    def position(run: Results) -> int | float:
        return run.get("post_hoc", {}).get("penalty", 0) - run.get("post_hoc", {}).get("alpha", 0)

    main = tables.by_method(main_settings(results))
    curves: dict[tuple[str, str], list[list[Results]]] = {}
    for runs in tables.groups(sorted(results, key=position)).values():
        base, _, suffix = runs[0]["method"].partition("+")
        kind = tables.post_hoc_kind(suffix)
        if kind and "+" not in suffix:
            start = (
                [main[base]] if kind == "wise" and base in main else []
            )  # alpha 1 is the run itself
            curves.setdefault((base, kind), start).append(runs)
    if not curves:
        raise Nothing("python eval.py wise RUN, or tpgm RUN")
    figure, (axes,) = new_figure(1)
    for (base, kind), groups in curves.items():
        means = [accuracies(runs).mean(0) for runs in groups]
        style = {"linestyle": {"wise": "-", "tpgm": "none", "tpgm-c": "--"}[kind], "markersize": 5}
        plot(axes, means, f"{base}+{kind}", groups[-1][0]["label"], **style)
    for method, runs in main.items():
        if method in {base for base, _ in curves}:
            plot(axes, [accuracies(runs).mean(0)], method, runs[0]["label"])
    return with_axes(figure, results)


def soups_plot(results: Sequence[Results]) -> Figure:
    """Figure 6: soups and ensembles, hollow, beside the runs that they were chosen from."""
    made = [run for run in results if run["method"].endswith(("+soup", "+ensemble"))]
    if not made:
        raise Nothing("python eval.py soup RUNS, or ensemble RUNS")
    figure, (axes,) = new_figure(1)
    for method, runs in trained(results).items():
        if any(method in run["method"].partition("+")[0].split(",") for run in made):
            plot(axes, accuracies(runs), method, linestyle="none")
            add_label(axes, runs[0]["label"], accuracies(main_settings(runs)).mean(0), method)
    for run in made:
        plot(axes, accuracies([run]), run["method"], run["label"], markersize=10, markeredgewidth=2)
    return with_axes(figure, results)


def weights_plot(results: Sequence[Results]) -> Figure:
    """Reference against shifts over lambda or EMA's decay (docs/settings.md), and Lipsum-FT's;
    means over seeds.
    """

    def swept(method: str) -> str:
        return "decay" if method == "ema" else "weight"

    curves: dict[str, dict[str, Float[np.ndarray, "2"]]] = {}
    for method, runs in trained(results).items():
        name = swept(method)
        if tables.varied_settings(runs) == ([] if method == "ft" else [name]):
            groups = {
                f"{same[0]['settings'].get(name, 0):.4g}": same
                for same in tables.groups(runs).values()
            }
            curves[method] = {value: accuracies(same).mean(0) for value, same in groups.items()}
    fixed = {name: curves.pop(name) for name in ("ft", "lipsum") if name in curves}
    if not curves:
        raise Nothing(
            "python train.py --method kd --weight 0.3 1 3, or another method with several of them "
            "or --decay"
        )
    figure, panels = new_figure(len(curves), sharex=True, sharey=True)
    for axes, (method, curve) in zip(panels, curves.items(), strict=True):
        for name, points in {**fixed, method: curve}.items():
            style = {"color": "0.3", "zorder": 6} if name == method else {}
            plot(
                axes,
                [*points.values()][::-1],
                name,
                "" if style else tables.names(name)["label"],
                **style,
            )
            for value, point in points.items() if name != "ft" else ():
                add_label(axes, value, point, name, optional=not style)
        axes.set_title(f"{tables.names(method)['label']}, by {swept(method)}", fontsize=10)
    return with_axes(figure, results)


def energy_vectors(
    before: Mapping[str, Float[np.ndarray, "_ dim"]],
    after: Mapping[str, Mapping[str, Float[np.ndarray, "_ dim"]]],
    second_moment: Float[np.ndarray, "dim dim"],
) -> Figure:
    """Figure 15: t-SNE of energy vectors before and after fine-tuning, a panel per method.

    Takes each split's features, zero-shot (`before`) and per method (`after`). `C2^(1/2) F(x)` has
    D coordinates and the same distances as the energy vectors over all the texts of
    `second_moment`, such as 10,000.
    """
    values, vectors = np.linalg.eigh(second_moment)
    root = vectors * np.sqrt(np.maximum(values, 0))
    figure, panels = new_figure(len(after))
    colors = {tables.names(method)["label"]: style["color"] for method, style in LOOKS.items()}
    style = {"marker": "o", "linestyle": "none", "markersize": 5 / len(after) ** 0.5}
    for axes, (label, features) in zip(panels, after.items(), strict=True):
        points = np.concatenate([*before.values(), *features.values()]) @ root
        points = (
            points / points.std()
        )  # energies are small, and t-SNE's stopping thresholds are absolute
        placed = TSNE(random_state=0, perplexity=min(30, (len(points) - 1) / 3)).fit_transform(
            points
        )
        old, new = np.split(placed, 2)
        axes.plot(*new.T, color=colors.get(label, OTHER["color"]), markeredgewidth=0, **style)
        axes.plot(*old.T, color="black", markeredgewidth=0.3, fillstyle="none", **style)
        clouds = np.split(old, np.cumsum([len(features) for features in before.values()])[:-1])
        for name, cloud in (
            zip(before, clouds, strict=True) if label in colors or axes is panels[0] else ()
        ):
            add_label(axes, name, np.median(cloud, axis=0), "")
        axes.set_title(label, fontsize=10, color=colors.get(label, "0.4"))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="0.8")
    figure.supxlabel("hollow: zero-shot, full: fine-tuned", fontsize=10)
    return place_labels(figure)


def contact_sheet(setup: Setup, most: int = 10) -> Figure:
    """Figure 16: the first image of each of the first `most` classes (columns) in every split
    (rows), preprocessed.
    """
    splits = list(setup.data.reports.values())
    classes = setup.classes[:most]
    figure = Figure(
        figsize=(0.7 * len(classes) + 0.9, 0.7 * len(splits) + 0.3), layout="constrained"
    )
    grid = figure.subplots(len(splits), len(classes), squeeze=False)
    for row, split in zip(grid, splits, strict=True):
        row[0].set_ylabel(split.name, rotation=0, ha="right", va="center", fontsize=9)
        for label, axes in enumerate(row):
            found = np.flatnonzero(split.labels == label)
            if len(found):
                axes.imshow(
                    data.read_image(split.images[found[0]], setup.model.clip.config.image_size)
                )
            axes.set(xticks=[], yticks=[])
            axes.set_title(classes[label] if split is splits[0] else "", fontsize=9)
            axes.spines[:].set_visible(False)
    return figure


def write_figures(figures: Mapping[str, Callable[[], Figure]], folder: Path) -> None:
    """Writes each figure as PNG and SVG. Prints the paths, or the data that a figure lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        try:
            figure = draw()
            for suffix in ("png", "svg"):
                figure.savefig(folder / f"{name}.{suffix}", dpi=200)
            print(f"{folder / name}.png, .svg")
        except Nothing as nothing:
            print(f"{name}: nothing to show yet, it needs {nothing}")


DRAWN = (
    trade_off_plot,
    trade_off_per_shift_plot,
    distortion_plot,
    energy_gap_plot,
    post_hoc_curves_plot,
    soups_plot,
    weights_plot,
)
FROM_FILES = {draw.__name__.removesuffix("_plot"): draw for draw in DRAWN}
