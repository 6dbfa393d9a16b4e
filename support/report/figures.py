"""The paper's figures for finished runs, drawn with matplotlib from results.json.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py figures runs --out figures`
writes them.

Zero-shot, FT and Lipsum-FT have a colour, a grey value and a marker of their own, the others are
grey. Names stand beside the points.
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
from clip import Preparation
from support.report import tables
from support.report.labels import label_method, post_hoc_kind
from support.report.tables import Results

Point = Sequence[float] | Float[np.ndarray, "2"]
Points = Sequence[Point] | Float[np.ndarray, "points 2"]
Features = Mapping[str, Float[np.ndarray, "_ dim"]]  # per split


class NoData(Exception):
    """The runs lack the data of a figure. `FROM_FILES` says what would provide it."""


# ------------------------------------------------------------------------------------------ panels

LOOKS = {
    "zero-shot": {"color": "black", "marker": "*", "markersize": 15, "zorder": 5},
    "ft": {"color": "#D55E00", "marker": "s", "markersize": 7, "zorder": 3},
    "lipsum": {"color": "#004488", "marker": "o", "markersize": 8, "zorder": 4},
}
OTHER = {"color": "0.68", "marker": "o", "markersize": 6, "zorder": 2}


def look_of(method: str) -> dict[str, Any]:
    """Returns the colour and marker of a method; that of a post-hoc result is hollow."""
    base, is_post_hoc, _ = method.partition("+")
    edge = {"markerfacecolor": "none"} if is_post_hoc else {"markeredgecolor": "white"}
    return LOOKS.get(base, OTHER) | edge


class Label(NamedTuple):
    """A text beside a point: the name of a method, or the value of a setting."""

    text: str
    point: Point
    method: str
    is_value: bool = False

    @property
    def is_main(self) -> bool:
        """Whether it names one of the methods that have a look of their own."""
        return self.method in LOOKS and not self.is_value


class Panel(NamedTuple):
    """A panel of a figure, and the labels to write in it when all else is drawn."""

    axes: Axes
    labels: list[Label]

    def plot(self, points: Points, method: str, name: str = "", **style: Any) -> None:
        """Draws points (x, y) as the method looks, and adds its name at the last."""
        self.axes.plot(*np.asarray(points).T, **look_of(method) | style)
        if name:
            self.labels.append(Label(name, points[-1], method))

    def place_labels(self) -> None:
        """Writes each label at a free place near its point: main names first, values last.

        One without a free place is left out.
        """
        axes = self.axes
        pixels = axes.figure.dpi / 72
        points, radii, lines = [], [], []
        for line in axes.lines:
            points += [*line.get_xydata()]
            radii += [line.get_markersize() / 2 * pixels] * len(line.get_xydata())
            if line.get_linestyle() != "None":
                lines.append(line.get_xydata())
        for error_bars in axes.collections:
            lines += error_bars.get_segments()
        labels = sorted(self.labels, key=lambda label: (label.is_value, not label.is_main))
        looks = [look_of(label.method) for label in labels]
        colors = ["0.4" if look["color"] == OTHER["color"] else look["color"] for look in looks]
        axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # lines to labels do not widen them
        textalloc.allocate(
            axes,
            x=[label.point[0] for label in labels],
            y=[label.point[1] for label in labels],
            text_list=[label.text for label in labels],
            x_scatter=[x for x, _ in points],
            y_scatter=[y for _, y in points],
            scatter_sizes=radii,
            text_scatter_sizes=[look["markersize"] / 2 * pixels for look in looks],
            x_lines=[line[:, 0] for line in lines],
            y_lines=[line[:, 1] for line in lines],
            textsize=[10 if label.is_main else 8 for label in labels],
            fontweight=["bold" if label.is_main else "normal" for label in labels],
            textcolor=colors,
            linecolor=colors,
            linewidth=0.5,
            margin=0.004,
            min_distance=0.006,
            max_distance=0.5,
            nbr_candidates=1000,
            avoid_label_lines_overlap=True,
            draw_all=False,
            va="bottom",
            in_layout=False,
            zorder=6,
        )


def new_figure(count: int, **shared: bool) -> tuple[Figure, list[Panel]]:
    """Returns a figure with a grid of panels, in which eight points are readable on a slide."""
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(7.2, 5.2 * rows / columns), dpi=200, layout="constrained")
    for index, axes in enumerate(figure.subplots(rows, columns, squeeze=False, **shared).flat):
        axes.set(visible=index < count, xmargin=0.09, ymargin=0.09)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, labelbottom=True, labelleft=True)
    return figure, [Panel(axes, []) for axes in figure.axes[:count]]


def finish(figure: Figure, panels: Sequence[Panel], x: str, y: str = "") -> Figure:
    """Completes a figure with the titles of its axes and the labels in its panels."""
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)
    for panel in panels:
        if panel.labels:
            panel.place_labels()
    return figure


# ---------------------------------------------------------------------------------- runs to points


def trained(results: Iterable[Results]) -> dict[str, list[Results]]:
    """Returns the runs per training method, without the results of post-hoc methods."""
    return tables.group_by_method(run for run in results if "+" not in run["method"])


def main_settings(results: Iterable[Results]) -> list[Results]:
    """Returns each training method's runs with the settings that have the most seeds."""
    found = []
    for runs in trained(results).values():
        found += max(tables.group_by_row(runs).values(), key=len)
    return found


def accuracies_of(runs: Sequence[Results], shift: str = "") -> Float[np.ndarray, "runs 2"]:
    """Returns each run's accuracy on a shift, or the mean of all, and on the reference, in percent.

    Raises NoData if there are no shifts.
    """
    points = []
    for run in runs:
        accuracies = {name: split["accuracy"] for name, split in run["splits"].items()}
        shifts = [shift] if shift else tables.shifts_of(run)
        if not shifts:
            raise NoData
        on_shifts = [accuracies[name] for name in shifts]
        points.append((np.mean(on_shifts), accuracies[tables.reference_of(run)]))
    return 100 * np.array(points)


def finish_accuracies(
    figure: Figure, panels: Sequence[Panel], results: Sequence[Results], shifts: Sequence[str] = ()
) -> Figure:
    """Completes a figure of reference against each of `shifts`, or their mean, with zero-shot."""
    for panel, shift in zip(panels, shifts or [""] * len(panels), strict=True):
        panel.plot(accuracies_of(tables.zero_shot_of(results), shift), "zero-shot", "zero-shot")
    x = "accuracy on the shift, %" if shifts else "mean accuracy on the shifts, %"
    return finish(figure, panels, x, f"accuracy on {tables.reference_of(results[0])}, %")


# ----------------------------------------------------------------------------------------- figures


def draw_trade_off(results: Sequence[Results], shifts: Sequence[str] = ()) -> Figure:
    """Figures 2 and 7: accuracy on the reference against that on each of `shifts`, or their mean.

    Means over seeds, standard deviations. Lines join runs that differ in one swept setting.
    """
    figure, panels = new_figure(len(shifts) or 1)
    for panel, shift in zip(panels, shifts or [""], strict=True):
        joined = [draw_lines(panel, runs, shift) for runs in trained(results).values()]
        ends = " or ".join(dict.fromkeys(name for name in joined if name))
        title = f"at the ends of lines: {ends}" if ends and not shift else shift
        panel.axes.set_title(title, fontsize=9, loc="left")
    return finish_accuracies(figure, panels, results, shifts)


def draw_lines(panel: Panel, runs: Sequence[Results], shift: str) -> str:
    """Draws the runs of one method, with the values of settings if the shifts' mean is shown.

    Returns the setting along which lines join them, or "".
    """
    method = runs[0]["method"]
    joined = ""
    main = accuracies_of(main_settings(runs), shift).mean(axis=0)
    panel.labels.append(Label(runs[0]["label"], main, method))
    swept, lines = group_by_line(runs)
    for name, rows in lines.items():
        seeds = [accuracies_of(row, shift) for row in rows]
        means = np.array([points.mean(axis=0) for points in seeds])
        x_errors, y_errors = np.transpose([points.std(0, ddof=len(points) > 1) for points in seeds])
        panel.axes.errorbar(*means.T, y_errors, x_errors, elinewidth=0.8, **look_of(method))
        if len(rows) > 1:
            joined = swept.replace("_", " ")
            texts = {name: means[:2].mean(axis=0)} if name else {}
            if method in LOOKS:
                texts |= {str(rows[end][0]["settings"][swept]): means[end] for end in (0, -1)}
            if not shift:
                panel.labels.extend(Label(text, texts[text], method, True) for text in texts)
    return joined


def group_by_line(runs: Sequence[Results]) -> tuple[str, dict[str, list[list[Results]]]]:
    """Returns the setting along which lines join runs of a method, and the rows of runs per line.

    It is the learning rate if that varies. A line's name contains the other settings that vary.
    """
    varied = tables.varied_settings(runs)
    swept = "learning_rate" if "learning_rate" in varied else "".join(varied[-1:])
    lines: dict[str, list[list[Results]]] = {}
    for row in tables.group_by_row(runs).values():
        others = tables.describe_settings(row[0], [name for name in varied if name != swept])
        lines.setdefault(others, []).append(row)
    return swept, lines


def draw_trade_off_per_shift(results: Sequence[Results]) -> Figure:
    """Figure 8: the trade-off on each shift."""
    return draw_trade_off(results, tables.shifts_of(results[0]))


def draw_distortion(results: Sequence[Results]) -> Figure:
    """Figures 3 and 9 to 12: feature distortion per method and split, a panel per model.

    Means over seeds, standard deviations.
    """
    splits = [tables.reference_of(results[0]), *tables.shifts_of(results[0])]
    models = tables.group_by_model([x for x in results if "distortion" in x["splits"][splits[0]]])
    if not models:
        raise NoData
    figure, panels = new_figure(len(models), sharey=True)
    for (axes, _), (model, runs) in zip(panels, models.items(), strict=True):
        draw_distortions(axes, main_settings(runs), splits)
        axes.set_title(model, fontsize=10)
    title = f"level: {splits[0]} (reference), points from left: {', '.join(splits[1:])}"
    return finish(figure, panels, title, "mean distance of features from the zero-shot ones")


def draw_distortions(axes: Axes, runs: Sequence[Results], splits: Sequence[str]) -> None:
    """Draws the feature distortion of the runs of a model: a column per method."""
    methods = tables.group_by_method(runs)
    for column, (method, runs) in enumerate(methods.items()):
        values = np.array([[run["splits"][name]["distortion"] for name in splits] for run in runs])
        (level, *means), (_, *errors) = values.mean(axis=0), values.std(axis=0, ddof=len(runs) > 1)
        style = look_of(method) | {"linestyle": "none", "markersize": 5, "elinewidth": 0.8}
        axes.errorbar(column + np.linspace(-0.3, 0.3, len(means)), means, errors, **style)
        axes.plot([column - 0.4, column + 0.4], [level, level], color=style["color"], linewidth=2.5)
    names = [label_method(method) for method in methods]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right")


def draw_energy_gap(results: Sequence[Results]) -> Figure:
    """Figures 4 and 13: relative accuracy of every run against its energy gap, for each shift."""
    shifts = tables.shifts_of(results[0])
    if not any(tables.relative_accuracies(results, shift, "energy_gap") for shift in shifts):
        raise NoData
    figure, panels = new_figure(len(shifts))
    (zero_shot,) = tables.zero_shot_of(results)
    named = [zero_shot, *(runs[0] for runs in trained(main_settings(results)).values())]
    for panel, shift in zip(panels, shifts, strict=True):
        shown = tables.relative_accuracies([*results, zero_shot], shift, "energy_gap")
        for relative, gap, run in shown:
            name = run["label"] if run in named else ""
            size = 0.7 * look_of(run["method"])["markersize"]
            panel.plot([(gap, relative)], run["method"], name, markersize=size, markeredgewidth=0.7)
        pearson = tables.correlate(results, shift, "energy_gap")
        title = shift if pearson is None else f"{shift}   PCC {pearson:.2f}"
        panel.axes.set_title(title, fontsize=10)
        panel.axes.set_xscale("symlog", linthresh=1e-3)  # gaps span three orders of magnitude
    has_hollow = any("+" in run["method"] for run in results)
    x = "energy gap, squared cosine" + "   (hollow: after post-hoc methods)" * has_hollow
    return finish(figure, panels, x, f"accuracy relative to {tables.reference_of(results[0])}")


def draw_post_hoc_curves(results: Sequence[Results]) -> Figure:
    """Figures 5 and 14: WiSE over alpha and TPGM over the penalty, for each fine-tuned run.

    Means over seeds.
    """

    def strength(run: Results) -> tuple[int | float, ...]:
        how = run.get("post_hoc", {})
        return how.get("penalty", 0), -how.get("alpha", 0)

    main = tables.group_by_method(main_settings(results))
    curves: dict[tuple[str, str], list[list[Results]]] = {}
    for runs in tables.group_by_row(sorted(results, key=strength)).values():
        base, _, suffix = runs[0]["method"].partition("+")
        kind = post_hoc_kind(suffix)
        if kind and "+" not in suffix:
            # WiSE's alpha of 1 is the run itself.
            start = [main[base]] if kind == "wise" and base in main else []
            curves.setdefault((base, kind), start).append(runs)
    if not curves:
        raise NoData
    figure, (panel,) = new_figure(1)
    for (base, kind), rows in curves.items():
        means = [accuracies_of(runs).mean(axis=0) for runs in rows]
        style = {"linestyle": {"wise": "-", "tpgm": "none", "tpgm-c": "--"}[kind], "markersize": 5}
        panel.plot(means, f"{base}+{kind}", rows[-1][0]["label"], **style)
    for method, runs in main.items():
        if method in {base for base, _ in curves}:
            panel.plot([accuracies_of(runs).mean(axis=0)], method, runs[0]["label"])
    return finish_accuracies(figure, [panel], results)


def draw_soups(results: Sequence[Results]) -> Figure:
    """Figure 6: soups and ensembles, hollow, beside the runs that they were chosen from."""
    made = [run for run in results if run["method"].endswith(("+soup", "+ensemble"))]
    if not made:
        raise NoData
    figure, (panel,) = new_figure(1)
    for method, runs in trained(results).items():
        if any(method in run["method"].partition("+")[0].split(",") for run in made):
            panel.plot(accuracies_of(runs), method, linestyle="none")
            named = accuracies_of(main_settings(runs))[0]
            panel.labels.append(Label(runs[0]["label"], named, method))
    for run in made:
        style = {"markersize": 10, "markeredgewidth": 2}
        panel.plot(accuracies_of([run]), run["method"], run["label"], **style)
    return finish_accuracies(figure, [panel], results)


def draw_weights(results: Sequence[Results]) -> Figure:
    """Reference against shifts over lambda or EMA's decay (docs/settings.md), and Lipsum-FT's.

    Means over seeds.
    """

    def swept(method: str) -> str:
        return "decay" if method == "ema" else "weight"

    curves: dict[str, dict[str, Point]] = {}  # a point per value
    for method, runs in trained(results).items():
        setting = swept(method)
        if tables.varied_settings(runs) == ([] if method == "ft" else [setting]):
            curves[method] = {}
            for row in tables.group_by_row(runs).values():
                value = f"{row[0]['settings'].get(setting, 0):.4g}"
                curves[method][value] = accuracies_of(row).mean(axis=0)
    shared = {method: curves.pop(method) for method in ("ft", "lipsum") if method in curves}
    if not curves:
        raise NoData
    figure, panels = new_figure(len(curves), sharex=True, sharey=True)
    for panel, (method, curve) in zip(panels, curves.items(), strict=True):
        panel.plot([*curve.values()], method, color="0.3", zorder=6)
        for other, points in shared.items():
            panel.plot([*points.values()][::-1], other, label_method(other))
        for name, points in {method: curve, **shared}.items():
            if name != "ft":
                panel.labels.extend(Label(value, points[value], name, True) for value in points)
        panel.axes.set_title(f"{label_method(method)}, by {swept(method)}", fontsize=10)
    return finish_accuracies(figure, panels, results)


def draw_energy_vectors(
    before: Features, after: Mapping[str, Features], second_moment: Float[np.ndarray, "dim dim"]
) -> Figure:
    """Figure 15: t-SNE of energy vectors before and after fine-tuning, a panel per method.

    `C2^(1/2) F(x)` has D coordinates and the same distances as the energy vectors over all texts of
    `second_moment`.
    """
    values, vectors = np.linalg.eigh(second_moment)
    root = vectors * np.sqrt(np.maximum(values, 0))
    figure, panels = new_figure(len(after))
    style = {"marker": "o", "linestyle": "none", "markersize": 5 / len(after) ** 0.5}
    ends = np.cumsum([len(features) for features in before.values()])
    for (axes, labels), (method, features) in zip(panels, after.items(), strict=True):
        points = np.concatenate([*before.values(), *features.values()]) @ root
        points = points / points.std()  # t-SNE's stopping thresholds are absolute
        perplexity = min(30, (len(points) - 1) / 3)
        # Without n_jobs, it asks the system for its number of cores, and warns if that fails.
        placed = TSNE(random_state=0, perplexity=perplexity, n_jobs=1).fit_transform(points)
        old, new = np.split(placed, 2)
        color = look_of(method)["color"]
        axes.plot(*new.T, color=color, markeredgewidth=0, **style)
        axes.plot(*old.T, color="black", markeredgewidth=0.3, fillstyle="none", **style)
        for name, cloud in zip(before, np.split(old, ends[:-1]), strict=True):
            labels.append(Label(name, np.median(cloud, axis=0), ""))
        axes.set_title(label_method(method), fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="0.8")
    return finish(figure, panels, "hollow: zero-shot, full: fine-tuned")


def draw_contact_sheet(
    splits: Sequence[data.Split], classes: Sequence[str], preparation: Preparation, most: int = 10
) -> Figure:
    """Figure 16: the first image of each of `most` classes (columns) in each split (rows)."""
    classes = classes[:most]
    size = (0.7 * len(classes) + 0.9, 0.7 * len(splits) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(splits), len(classes), squeeze=False)
    for row, split in zip(grid, splits, strict=True):
        row[0].set_ylabel(split.name, rotation=0, ha="right", va="center", fontsize=9)
        for label, axes in enumerate(row):
            found = np.flatnonzero(split.labels == label)
            if len(found):
                axes.imshow(data.read_image(split.images[found[0]], preparation))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    for axes, name in zip(grid[0], classes, strict=True):
        axes.set_title(name, fontsize=9)
    return figure


# -------------------------------------------------------------------------------------------- files

SHIFTS = "runs with shifts, for example --shifts painting sketch"
FROM_FILES: dict[str, tuple[Callable[[Sequence[Results]], Figure], str]] = {  # and what they need
    "trade_off": (draw_trade_off, SHIFTS),
    "trade_off_per_shift": (draw_trade_off_per_shift, SHIFTS),
    "distortion": (draw_distortion, "runs whose results.json contains the feature distortion"),
    "energy_gap": (draw_energy_gap, f"energy gaps of {SHIFTS}"),
    "post_hoc_curves": (draw_post_hoc_curves, f"python eval.py wise or tpgm on {SHIFTS}"),
    "soups": (draw_soups, f"python eval.py soup or ensemble on {SHIFTS}"),
    "weights": (draw_weights, f"several --weight of a method, or --decay of ema, in {SHIFTS}"),
}


def write_figures(figures: Mapping[str, tuple[Callable[[], Figure], str]], folder: Path) -> None:
    """Writes each figure as PNG and SVG. Prints the paths, or what a figure lacks.

    Takes the function that draws a figure and what it needs, by the figure's name.
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
