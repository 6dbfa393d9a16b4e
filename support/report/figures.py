"""The paper's figures for finished runs, drawn with matplotlib from results.json.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py figures runs --out figures`
writes them.

Each `draw_` function returns one figure. Zero-shot, FT and Lipsum-FT have a colour, a grey value
and a marker of their own, the others are grey. Names stand beside the points.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import textalloc
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

import data
from support.report import tables
from support.report.labels import label_method, post_hoc_kind
from support.report.tables import Results

Point = Sequence[float] | Float[np.ndarray, "2"]
Points = Sequence[Point] | Float[np.ndarray, "points 2"]


class NoData(Exception):
    """The runs lack the data of a figure. `FROM_FILES` says what would provide it."""


# ------------------------------------------------------------------------------- looks and labels

LOOKS = {
    "zero-shot": {"color": "black", "marker": "*", "markersize": 15, "zorder": 5},
    "ft": {"color": "#D55E00", "marker": "s", "markersize": 7, "zorder": 3},
    "lipsum": {"color": "#004488", "marker": "o", "markersize": 8, "zorder": 4},
}
OTHER = {"color": "0.68", "marker": "o", "markersize": 6, "zorder": 2}


def look_of(method: str) -> dict[str, Any]:
    """Returns the colour and marker of a method, the same in every figure.

    A post-hoc result's marker is hollow.
    """
    base, is_post_hoc, _ = method.partition("+")
    hollow = {"markerfacecolor": "none"} if is_post_hoc else {"markeredgecolor": "white"}
    return LOOKS.get(base, OTHER) | hollow


class Label(NamedTuple):
    """A text for a point: the name of its method, or else the value of a setting."""

    text: str
    point: Point
    method: str
    is_name: bool = True

    @property
    def color(self) -> str:
        """The method's, darker if that is grey."""
        return LOOKS.get(self.method.partition("+")[0], {"color": "0.4"})["color"]

    @property
    def is_main(self) -> bool:
        """Whether it names one of the methods that have a look of their own."""
        return self.is_name and self.method in LOOKS


def new_figure(count: int, **shared: bool) -> tuple[Figure, list[Axes]]:
    """Returns a figure with a grid of `count` panels, of a size at which eight points are readable
    on a slide.
    """
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(7.2, 5.2 * rows / columns), dpi=200, layout="constrained")
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False, **shared).flat):
        axes.set(visible=index < count, xmargin=0.09, ymargin=0.09)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, labelbottom=True, labelleft=True)
    return figure, figure.axes[:count]


def plot(axes: Axes, points: Points, method: str, **style: Any) -> None:
    """Draws points (x, y) as the method looks."""
    axes.plot(*np.transpose(points), **look_of(method) | style)


def place_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Writes each label at a free place near its point: main methods first, settings last.

    One that has no free place is left out. Everything else must have been drawn.
    """
    labels = sorted(labels, key=lambda label: (not label.is_main, not label.is_name))
    points = [(*xy, line.get_markersize()) for line in axes.lines for xy in line.get_xydata()]
    lines = [line.get_xydata() for line in axes.lines if line.get_linestyle() != "None"]
    for error_bars in axes.collections:
        lines += error_bars.get_segments()
    x, y, sizes = np.transpose(points)
    axes.autoscale(False)  # lines to the labels would widen it
    textalloc.allocate(
        axes,
        *np.transpose([label.point for label in labels]),
        [label.text for label in labels],
        x_scatter=x,
        y_scatter=y,
        scatter_sizes=sizes / 2 * axes.figure.dpi / 72,
        x_lines=[line[:, 0] for line in lines],
        y_lines=[line[:, 1] for line in lines],
        textsize=[10 if label.is_main else 8 for label in labels],
        fontweight=["bold" if label.is_main else "normal" for label in labels],
        textcolor=[label.color for label in labels],
        linecolor=[label.color for label in labels],
        linewidth=0.5,
        draw_all=False,
        zorder=6,
        in_layout=False,
    )


# ---------------------------------------------------------------------------------- runs to points


def trained(results: Iterable[Results]) -> dict[str, list[Results]]:
    """Returns the runs per training method, without the results of post-hoc methods."""
    return tables.group_by_method(run for run in results if "+" not in run["method"])


def main_settings(results: Iterable[Results]) -> list[Results]:
    """Returns each training method's runs with one choice of settings: the one with the most seeds,
    else the first.
    """
    found = []
    for runs in trained(results).values():
        found += max(tables.group_by_row(runs).values(), key=len)
    return found


def zero_shot_of(results: Sequence[Results]) -> Results:
    """Returns the results of the zero-shot model, which all runs share."""
    name = {"method": "zero-shot", "label": "zero-shot"}
    return results[0] | name | {"splits": results[0]["zero_shot"]}


def accuracies_of(runs: Sequence[Results], shift: str = "") -> Float[np.ndarray, "runs 2"]:
    """Returns each run's accuracy on a shift, or its mean over all, and that on the reference, in
    percent.

    Raises NoData if there are no shifts.
    """
    points = []
    for run in runs:
        if not tables.shifts_of(run):
            raise NoData
        splits = run["splits"]
        on_shift = splits[shift]["accuracy"] if shift else tables.average_shifts(run, "accuracy")
        points.append((100 * on_shift, 100 * splits[tables.reference_of(run)]["accuracy"]))
    return np.array(points)


def group_by_line(runs: Sequence[Results]) -> tuple[str, dict[str, list[list[Results]]]]:
    """Returns the setting along which a line joins runs of a method, and the rows of runs per line.

    It is the learning rate if that varies. A line's name contains the other settings that vary.
    """
    varied = tables.varied_settings(runs)
    joined = "learning_rate" if "learning_rate" in varied else "".join(varied[-1:])
    lines: dict[str, list[list[Results]]] = {}
    for row in tables.group_by_row(runs).values():
        others = tables.describe_settings(row[0], [name for name in varied if name != joined])
        lines.setdefault(others, []).append(row)
    return joined, lines


# ----------------------------------------------------------------------------------------- figures


def draw_mean(axes: Axes, runs: Sequence[Results], shift: str = "") -> Label:
    """Draws the mean point of a method's runs. Returns the method's name as a label."""
    point = accuracies_of(runs, shift).mean(axis=0)
    plot(axes, [point], runs[0]["method"])
    return Label(runs[0]["label"], point, runs[0]["method"])


def accuracy_titles(results: Sequence[Results], shift: str = "mean") -> tuple[str, str]:
    """Returns the titles of both axes of a figure of reference against shifts."""
    x = "mean accuracy on the shifts, %" if shift == "mean" else "accuracy on the shift, %"
    return x, f"accuracy on {tables.reference_of(results[0])}, %"


def finish(figure: Figure, labels: Mapping[Axes, Sequence[Label]], x: str, y: str = "") -> Figure:
    """Completes a figure with the titles of its axes and the labels of each panel."""
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    for axes, own in labels.items():
        place_labels(axes, own)
    return figure


def draw_trade_off(results: Sequence[Results], shifts: Sequence[str] = ("",)) -> Figure:
    """Figures 2 and 7: each method's accuracy on the reference against that on a shift, or the mean
    of all ("").

    Means over seeds, standard deviations. A line joins runs that differ in one swept setting, the
    learning rate if any.
    """
    figure, panels = new_figure(len(shifts))
    labels: dict[Axes, list[Label]] = {}
    for axes, shift in zip(panels, shifts, strict=True):
        labels[axes] = [draw_mean(axes, [zero_shot_of(results)], shift)]
        ends = []
        for method, runs in trained(results).items():
            point = accuracies_of(main_settings(runs), shift).mean(axis=0)
            labels[axes].append(Label(runs[0]["label"], point, method))
            joined, lines = group_by_line(runs)
            for name, rows in lines.items():
                labels[axes] += draw_line(axes, name, rows, joined, shift)
                if len(rows) > 1:
                    ends.append(joined.replace("_", " "))
        joined_by = f"at the ends of lines: {' or '.join(dict.fromkeys(ends))}" if ends else ""
        axes.set_title(f"{shift}   {joined_by}".strip(), fontsize=9, loc="left")
    return finish(figure, labels, *accuracy_titles(results, shifts[0]))


def draw_line(
    axes: Axes, name: str, rows: Sequence[Sequence[Results]], joined: str, shift: str
) -> list[Label]:
    """Draws the means of rows of runs, joined by a line, and their standard deviations.

    Returns the line's name and the values of the joined setting at its ends as labels.
    """
    method = rows[0][0]["method"]
    per_row = [accuracies_of(runs, shift) for runs in rows]
    means = np.array([points.mean(axis=0) for points in per_row])
    x_errors, y_errors = np.transpose([points.std(0, ddof=len(points) > 1) for points in per_row])
    axes.errorbar(*means.T, y_errors, x_errors, elinewidth=0.8, **look_of(method))
    labels = []
    if len(rows) > 1 and name:
        labels.append(Label(name, means[:2].mean(axis=0), method, is_name=False))
    if len(rows) > 1 and method in LOOKS:
        for end in (0, -1):
            value = str(rows[end][0]["settings"][joined])
            labels.append(Label(value, means[end], method, is_name=False))
    return labels


def draw_trade_off_per_shift(results: Sequence[Results]) -> Figure:
    """Figure 8: the trade-off on each shift."""
    return draw_trade_off(results, tables.shifts_of(results[0]) or [""])


def draw_distortion(results: Sequence[Results]) -> Figure:
    """Figures 3 and 9 to 12: feature distortion per method and split; means over seeds, standard
    deviations.
    """
    splits = [tables.reference_of(results[0]), *tables.shifts_of(results[0])]
    runs_with_it = [run for run in results if "distortion" in run["splits"][splits[0]]]
    methods = tables.group_by_method(main_settings(runs_with_it))
    if not methods:
        raise NoData
    figure, (axes,) = new_figure(1)
    for column, (method, runs) in enumerate(methods.items()):
        values = np.array([[run["splits"][name]["distortion"] for name in splits] for run in runs])
        (level, *means), (_, *errors) = values.mean(axis=0), values.std(axis=0, ddof=len(runs) > 1)
        style = look_of(method) | {"linestyle": "none", "markersize": 5, "elinewidth": 0.8}
        axes.errorbar(column + np.linspace(-0.3, 0.3, len(means)), means, errors, **style)
        axes.plot([column - 0.4, column + 0.4], [level, level], color=style["color"], linewidth=2.5)
    title = f"level: {splits[0]} (reference), points from left: {', '.join(splits[1:])}"
    axes.set_title(title, fontsize=9, loc="left")
    names = [label_method(method) for method in methods]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
    axes.set_ylabel("mean distance of features from the zero-shot ones")
    return figure


def draw_energy_gap(results: Sequence[Results]) -> Figure:
    """Figures 4 and 13: relative accuracy against the energy gap, a panel per shift, a point per
    run and zero-shot.
    """
    shifts = tables.shifts_of(results[0])
    if not any(tables.relative_accuracies(results, shift, "energy_gap") for shift in shifts):
        raise NoData
    zero_shot = zero_shot_of(results)
    figure, panels = new_figure(len(shifts))
    labels: dict[Axes, list[Label]] = {axes: [] for axes in panels}
    for axes, shift in zip(panels, shifts, strict=True):
        shown = tables.relative_accuracies([*results, zero_shot], shift, "energy_gap")
        for relative, gap, run in shown:
            size = 0.7 * look_of(run["method"])["markersize"]
            plot(axes, [(gap, relative)], run["method"], markersize=size, markeredgewidth=0.7)
        for method, runs in tables.group_by_method([*main_settings(results), zero_shot]).items():
            found = tables.relative_accuracies(runs, shift, "energy_gap")
            if found:
                point = np.mean([(gap, relative) for relative, gap, _ in found], axis=0)
                labels[axes].append(Label(runs[0]["label"], point, method))
        pearson = tables.correlate(results, shift, "energy_gap")
        axes.set_title(shift + ("" if pearson is None else f"   PCC {pearson:.2f}"), fontsize=10)
        axes.set_xscale("symlog", linthresh=1e-3)  # gaps span three orders of magnitude
    has_hollow = any("+" in run["method"] for run in results)
    x = "energy gap, squared cosine" + "   (hollow: after post-hoc methods)" * has_hollow
    return finish(figure, labels, x, f"accuracy relative to {tables.reference_of(results[0])}")


def draw_post_hoc_curves(results: Sequence[Results]) -> Figure:
    """Figures 5 and 14: WiSE over alpha and TPGM over the penalty, for each fine-tuned run.

    Means over seeds.
    """

    def distance_from_tuned(run: Results) -> tuple[float, float]:
        how = run.get("post_hoc", {})
        return how.get("penalty", 0), -how.get("alpha", 0)

    main = tables.group_by_method(main_settings(results))
    curves: dict[tuple[str, str], list[list[Results]]] = {}
    for runs in tables.group_by_row(sorted(results, key=distance_from_tuned)).values():
        base, _, suffix = runs[0]["method"].partition("+")
        kind = post_hoc_kind(suffix)
        if not kind or "+" in suffix:
            continue
        if (base, kind) not in curves:  # alpha 1 is the run itself
            curves[base, kind] = [main[base]] if kind == "wise" and base in main else []
        curves[base, kind].append(runs)
    if not curves:
        raise NoData
    figure, (axes,) = new_figure(1)
    labels = [draw_mean(axes, [zero_shot_of(results)])]
    for (base, kind), rows in curves.items():
        points = [accuracies_of(runs).mean(axis=0) for runs in rows]
        style = {"linestyle": {"wise": "-", "tpgm": "none", "tpgm-c": "--"}[kind], "markersize": 5}
        plot(axes, points, f"{base}+{kind}", **style)
        labels.append(Label(rows[-1][0]["label"], points[-1], f"{base}+{kind}"))
    for method, runs in main.items():
        if method in {base for base, _ in curves}:
            labels.append(draw_mean(axes, runs))
    return finish(figure, {axes: labels}, *accuracy_titles(results))


def draw_soups(results: Sequence[Results]) -> Figure:
    """Figure 6: soups and ensembles, hollow, beside the runs that they were chosen from."""
    made = [run for run in results if run["method"].endswith(("+soup", "+ensemble"))]
    if not made:
        raise NoData
    figure, (axes,) = new_figure(1)
    labels = [draw_mean(axes, [zero_shot_of(results)])]
    for method, runs in trained(results).items():
        if any(method in run["method"].partition("+")[0].split(",") for run in made):
            plot(axes, accuracies_of(runs), method, linestyle="none")
            point = accuracies_of(main_settings(runs)).mean(axis=0)
            labels.append(Label(runs[0]["label"], point, method))
    for run in made:
        (point,) = accuracies_of([run])
        plot(axes, [point], run["method"], markersize=10, markeredgewidth=2)
        labels.append(Label(run["label"], point, run["method"]))
    return finish(figure, {axes: labels}, *accuracy_titles(results))


def draw_weights(results: Sequence[Results]) -> Figure:
    """Reference against shifts over lambda or EMA's decay (docs/settings.md), and Lipsum-FT's.

    Means over seeds.
    """
    curves: dict[str, dict[str, Point]] = {}  # point per value
    for method, runs in trained(results).items():
        setting = "decay" if method == "ema" else "weight"
        if tables.varied_settings(runs) == ([] if method == "ft" else [setting]):
            curves[method] = {
                f"{row[0]['settings'].get(setting, 0):.4g}": accuracies_of(row).mean(axis=0)
                for row in tables.group_by_row(runs).values()
            }
    shared = {method: curves.pop(method) for method in ("ft", "lipsum") if method in curves}
    if not curves:
        raise NoData
    figure, panels = new_figure(len(curves), sharex=True, sharey=True)
    labels: dict[Axes, list[Label]] = {}
    for axes, (method, curve) in zip(panels, curves.items(), strict=True):
        labels[axes] = [draw_mean(axes, [zero_shot_of(results)])]
        plot(axes, [*curve.values()], method, color="0.3", zorder=6)
        labels[axes] += [Label(value, point, method, False) for value, point in curve.items()]
        for other, points in shared.items():
            plot(axes, [*points.values()], other)
            labels[axes].append(Label(label_method(other), [*points.values()][0], other))
            if other != "ft":
                labels[axes] += [Label(value, xy, other, False) for value, xy in points.items()]
        setting = "decay" if method == "ema" else "weight"
        axes.set_title(f"{label_method(method)}, by {setting}", fontsize=10)
    return finish(figure, labels, *accuracy_titles(results))


Features = Mapping[str, Float[np.ndarray, "_ dim"]]  # per split


def draw_energy_vectors(
    before: Features, after: Mapping[str, Features], second_moment: Float[np.ndarray, "dim dim"]
) -> Figure:
    """Figure 15: t-SNE of energy vectors before and after fine-tuning, a panel per method.

    Takes each split's features, zero-shot (`before`) and per method (`after`). `C2^(1/2) F(x)` has
    D coordinates and the same distances as the energy vectors over all the texts of
    `second_moment`, such as 10,000.
    """
    values, vectors = np.linalg.eigh(second_moment)
    root = vectors * np.sqrt(np.maximum(values, 0))
    figure, panels = new_figure(len(after))
    colors = {label_method(method): look["color"] for method, look in LOOKS.items()}
    style = {"marker": "o", "linestyle": "none", "markersize": 5 / len(after) ** 0.5}
    ends = np.cumsum([len(features) for features in before.values()])
    labels: dict[Axes, list[Label]] = {}
    for axes, (label, features) in zip(panels, after.items(), strict=True):
        points = np.concatenate([*before.values(), *features.values()]) @ root
        points = points / points.std()  # t-SNE's stopping thresholds are absolute
        perplexity = min(30, (len(points) - 1) / 3)
        # Without n_jobs, it asks the system for its number of cores, and warns if that fails.
        placed = TSNE(random_state=0, perplexity=perplexity, n_jobs=1).fit_transform(points)
        old, new = np.split(placed, 2)
        axes.plot(*new.T, color=colors.get(label, OTHER["color"]), markeredgewidth=0, **style)
        axes.plot(*old.T, color="black", markeredgewidth=0.3, fillstyle="none", **style)
        clouds = zip(before, np.split(old, ends[:-1]), strict=True)
        labels[axes] = [Label(name, np.median(cloud, axis=0), "") for name, cloud in clouds]
        axes.set_title(label, fontsize=10, color=colors.get(label, "0.4"))
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="0.8")
    return finish(figure, labels, "hollow: zero-shot, full: fine-tuned")


def draw_contact_sheet(
    splits: Sequence[data.Split], classes: Sequence[str], image_size: int, most: int = 10
) -> Figure:
    """Figure 16: the first image of each of the first `most` classes (columns) in every split
    (rows), preprocessed.
    """
    classes = classes[:most]
    size = (0.7 * len(classes) + 0.9, 0.7 * len(splits) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(splits), len(classes), squeeze=False)
    for row, split in zip(grid, splits, strict=True):
        row[0].set_ylabel(split.name, rotation=0, ha="right", va="center", fontsize=9)
        for label, axes in enumerate(row):
            found = np.flatnonzero(split.labels == label)
            if len(found):
                axes.imshow(data.read_image(split.images[found[0]], image_size))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, name in zip(grid[0], classes, strict=True):
        axes.set_title(name, fontsize=9)
    return figure


# -------------------------------------------------------------------------------------------- files

SHIFTS = "runs with shifts, for example --shifts painting sketch"
FROM_FILES: dict[str, tuple[Callable[[Sequence[Results]], Figure], str]] = {
    "trade_off": (draw_trade_off, SHIFTS),
    "trade_off_per_shift": (draw_trade_off_per_shift, SHIFTS),
    "distortion": (draw_distortion, "runs whose results.json contains the feature distortion"),
    "energy_gap": (draw_energy_gap, f"{SHIFTS}, whose results.json contains the energy gap"),
    "post_hoc_curves": (draw_post_hoc_curves, f"python eval.py wise RUN, or tpgm RUN, of {SHIFTS}"),
    "soups": (draw_soups, f"python eval.py soup RUNS, or ensemble RUNS, of {SHIFTS}"),
    "weights": (
        draw_weights,
        "python train.py --method kd --weight 0.3 1 3, or another method with several of them or "
        f"--decay; {SHIFTS}",
    ),
}  # a figure's name, the function that draws it from results, and what it needs


def write_figures(figures: Mapping[str, tuple[Callable[[], Figure], str]], folder: Path) -> None:
    """Writes each figure as PNG and SVG. Prints the paths, or what a figure needs that is not there.

    Takes a figure's function and what it needs, by the figure's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, needs) in figures.items():
        try:
            figure = draw()
        except NoData:
            print(f"{name}: nothing to show yet, it needs {needs}")
            continue
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=200)
        print(f"{folder / name}.png, .svg")
