"""The paper's figures for finished runs, drawn with matplotlib from results.json.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py figures runs --out figures` writes them.

Each function returns one figure, or raises Nothing if the runs lack the data that it shows.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

import data
import lipsum
from support import tables
from support.opening import Setup
from support.tables import Results


class Nothing(Exception):
    """These runs lack the data of a figure; the message says which runs or command would provide it."""


# Okabe and Ito's palette, which colour-blind readers can distinguish, without its yellow, which is too pale for lines.
# There are more methods than colours, so each method also has its own marker.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "d", "8")
PANELS_PER_ROW = 5


def look(method: str) -> dict[str, Any]:
    """Returns the colour and marker of a training method, the same in every figure."""
    names = list(lipsum.METHODS)
    index = names.index(method) if method in names else sum(map(ord, method))
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def new_figure(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure with `count` panels of the given size in inches, and room on the right for one legend."""
    columns = min(count, PANELS_PER_ROW)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 1.9, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_prop_cycle(color=COLORS)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def with_legend(figure: Figure) -> Figure:
    """Adds one legend for all panels, which contains each label once."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def trained(results: Sequence[Results]) -> list[Results]:
    """Returns the runs of training methods, without the results of post-hoc methods."""
    return [result for result in results if "+" not in result["method"]]


def main_settings(results: Sequence[Results]) -> list[Results]:
    """Returns each training method's runs with one choice of settings: the one with the most seeds, else the first."""
    methods = tables.by_method(trained(results)).values()
    return [run for runs in methods for run in max(tables.groups(runs).values(), key=len)]


def accuracies(runs: Sequence[Results]) -> Float[np.ndarray, "2 runs"]:
    """Returns each run's mean accuracy on the shifts and its accuracy on the reference, in percent."""
    shifts = [tables.mean_of_shifts(run, "accuracy") for run in runs]
    if None in shifts:
        raise Nothing("runs with shifts, for example --shifts painting sketch")
    return 100 * np.array([shifts, [run["splits"][tables.reference_of(run)]["accuracy"] for run in runs]])


def zero_shot_accuracies(results: Sequence[Results]) -> Float[np.ndarray, "2 1"]:
    """Returns `accuracies` of the zero-shot model, which all runs share."""
    return accuracies([results[0] | {"splits": results[0]["zero_shot"]}])


def with_axes(figure: Figure, results: Sequence[Results]) -> Figure:
    """Adds the zero-shot accuracy, axis labels and legend to a figure of reference against shifts."""
    (axes,) = figure.axes
    star = {"color": "black", "markersize": 15, "markeredgecolor": "white", "zorder": 5}
    axes.plot(*zero_shot_accuracies(results), "*", label="zero-shot", **star)
    axes.set_xlabel("mean accuracy on the shifts, %")
    axes.set_ylabel(f"accuracy on {tables.reference_of(results[0])}, %")
    return with_legend(figure)


# --------------------------------------------------------------------------------- from results.json and metrics.jsonl


def trade_off_plot(results: Sequence[Results]) -> Figure:
    """Figures 2, 7 and 8: each method's accuracy on the reference against that on the shifts.

    Points are means over seeds with standard deviations. A line joins runs that differ in one swept setting, which is
    the learning rate if it was swept.
    """
    figure, (axes,) = new_figure(1, 5.4, 4.6)
    swept: dict[str, None] = {}
    for method, method_runs in tables.by_method(trained(results)).items():
        varied = sorted(tables.varied_settings(method_runs), key=lambda name: name == "learning_rate")
        swept |= dict.fromkeys(varied)
        lines: dict[tuple[str, ...], list[tuple[float | None, ...]]] = {}
        for runs in tables.groups(method_runs).values():
            values = tuple(str(runs[0]["settings"][name]) for name in varied)
            shifts, reference = map(tables.cell, accuracies(runs).tolist())
            point = (shifts.mean, reference.mean, shifts.deviation or 0, reference.deviation or 0)
            lines.setdefault(values[:-1], []).append(point)
            axes.annotate(", ".join(values), point[:2], xytext=(5, 4), textcoords="offset points", fontsize=6)
        for points in lines.values():
            x, y, x_error, y_error = zip(*points, strict=True)
            style = look(method) | {"linewidth": 1, "elinewidth": 0.8, "markersize": 7, "markeredgecolor": "white"}
            axes.errorbar(x, y, y_error, x_error, label=tables.names(method)["label"], **style)
    if swept:
        axes.set_title("at the points: " + ", ".join(swept).replace("_", " "), fontsize=7, loc="left")
    return with_axes(figure, results)


def distortion_plot(results: Sequence[Results]) -> Figure:
    """Figures 3 and 9 to 12: the feature distortion per split and method; means over seeds, standard deviations."""
    splits = list(results[0]["splits"])
    groups = {}
    for label, runs in tables.groups(main_settings(results)).items():
        cells = [tables.cell([run["splits"][name].get("distortion") for run in runs]) for name in splits]
        if cells[0].mean is not None:
            groups[label] = cells
    if not groups:
        raise Nothing("runs whose results.json contains the feature distortion")
    figure, (axes,) = new_figure(1, 1.2 + 0.75 * len(groups), 3.6)
    width = 0.8 / len(splits)
    for index, name in enumerate(splits):
        positions = np.arange(len(groups)) + (index - (len(splits) - 1) / 2) * width
        label = f"{name} (reference)" if name == tables.reference_of(results[0]) else name
        means, deviations = zip(*(cells[index] for cells in groups.values()), strict=True)
        errors = [deviation or 0 for deviation in deviations]
        axes.bar(positions, means, width, yerr=errors, label=label, error_kw={"elinewidth": 0.7})
    axes.set_xticks(range(len(groups)), groups.keys(), rotation=35, ha="right")
    axes.set_ylabel("mean distance of features\nfrom the zero-shot ones")
    axes.grid(visible=False, axis="x")
    return with_legend(figure)


def energy_gap_plot(results: Sequence[Results]) -> Figure:
    """Figures 4 and 13: relative accuracy against the energy gap, a panel per shift, a point per run.

    Gaps span three orders of magnitude: the axis is linear to 1e-3 and logarithmic above. The correlation is that of
    the values themselves.
    """
    pairs = {shift: tables.relative_accuracies(results, shift, "energy_gap") for shift in tables.shifts_of(results[0])}
    if not any(pairs.values()):
        raise Nothing("runs with shifts whose results.json contains the energy gap")
    figure, panels = new_figure(len(pairs), 3.4, 3.2)
    for axes, shift in zip(panels, pairs, strict=True):
        for relative, gap, run in pairs[shift]:
            base, *post_hoc = run["method"].split("+")
            fill = {"markerfacecolor": "none"} if post_hoc else {"markeredgecolor": "white"}
            label = tables.names(base)["label"] + (" + post-hoc" if post_hoc else "")
            style = look(base.split(",")[0]) | {"linestyle": "none", "markersize": 6, "markeredgewidth": 0.7} | fill
            axes.plot(gap, relative, label=label, **style)
        pearson = tables.correlation(results, shift, "energy_gap")
        axes.set_title(shift + ("" if pearson is None else f"   PCC {pearson:.2f}"), fontsize=10)
        axes.set_xlabel("energy gap, squared cosine")
        axes.set_xscale("symlog", linthresh=1e-3)
    panels[0].set_ylabel(f"accuracy relative to {tables.reference_of(results[0])}")
    return with_legend(figure)


def post_hoc_curves_plot(results: Sequence[Results]) -> Figure:
    """Figures 5 and 14: WiSE over alpha and TPGM over the penalty, for each fine-tuned run; means over seeds."""
    groups = tables.groups([*main_settings(results), *(run for run in results if "+" in run["method"])]).values()
    curves: dict[tuple[str, str], list[tuple[float, list[Results]]]] = {}
    for runs in groups:
        base, _, suffix = runs[0]["method"].partition("+")
        kind = tables.post_hoc_kind(suffix)
        if kind and "+" not in suffix:
            settings = runs[0].get("post_hoc", {})
            position = -settings["alpha"] if "alpha" in settings else settings.get("penalty", 0.0)
            curves.setdefault((base, kind), []).append((position, runs))
    if not curves:
        raise Nothing("python eval.py wise RUN, or tpgm RUN")
    bases = {base for base, _ in curves}
    fine_tuned = {runs[0]["method"]: runs for runs in groups if runs[0]["method"] in bases}
    figure, (axes,) = new_figure(1, 5.4, 4.6)
    for method, runs in fine_tuned.items():
        style = {"markersize": 9, "linestyle": "none"} | look(method)
        axes.plot(*accuracies(runs).mean(axis=1), label=runs[0]["label"], **style)
    markers = {"wise": ".", "tpgm": "P", "tpgm-c": "x"}
    lines = {"wise": "-", "tpgm": "none", "tpgm-c": "--"}
    for (base, kind), points in curves.items():
        means = [accuracies(runs).mean(axis=1) for _, runs in sorted(points, key=lambda point: point[0])]
        if kind == "wise" and base in fine_tuned:  # alpha 1 is the fine-tuned run itself
            means.insert(0, accuracies(fine_tuned[base]).mean(axis=1))
        style = look(base) | {"marker": markers[kind], "linestyle": lines[kind]}
        label = f"{tables.names(base)['label']} + {tables.POST_HOC[kind]}"
        axes.plot(*np.transpose(means), label=label, **style)
    return with_axes(figure, results)


def soups_plot(results: Sequence[Results]) -> Figure:
    """Figure 6: soups and ensembles beside the runs that they were chosen from."""
    made = [run for run in results if run["method"].endswith(("+soup", "+ensemble"))]
    if not made:
        raise Nothing("python eval.py soup RUNS, or ensemble RUNS")
    figure, (axes,) = new_figure(1, 5.4, 4.6)
    bases = {name for run in made for name in run["method"].partition("+")[0].split(",")}
    for run in results:
        if run["method"] in bases:
            style = look(run["method"]) | {"linestyle": "none", "markersize": 6, "alpha": 0.7}
            axes.plot(*accuracies([run]), label=run["label"], **style)
    for run in made:
        base, _, kind = run["method"].partition("+")
        color = look(base)["color"] if base in lipsum.METHODS else "0.4"
        style = {"color": color, "markersize": 10, "markerfacecolor": "none", "markeredgewidth": 2}
        axes.plot(*accuracies([run]), {"soup": "s", "ensemble": "D"}[kind], label=run["label"], **style)
    return with_axes(figure, results)


def weights_plot(results: Sequence[Results]) -> Figure:
    """Reference against shifts over lambda or EMA's decay: a panel per method, with Lipsum-FT's in each; seeds' means.

    At the points: lambda, or the decay. The paper's text lacks these digits (docs/settings.md).
    """
    curves: dict[str, dict[float, Float[np.ndarray, "2"]]] = {}
    for method, runs in tables.by_method(trained(results)).items():
        name = "decay" if method == "ema" else "weight"
        groups = {group[0]["settings"][name]: group for group in tables.groups(runs).values()}
        if tables.varied_settings(runs) == ([] if method == "ft" else [name]):
            curves[method] = {value: accuracies(group).mean(axis=1) for value, group in sorted(groups.items())}
    fixed = {name: curves.pop(name, {}) for name in ("ft", "lipsum")}
    if not curves:
        raise Nothing(
            "python train.py --method kd --weight 0.3 1 3, or another method with several --weight or --decay"
        )
    figure, panels = new_figure(len(curves), 3, 3)
    for axes, method in zip(panels, curves, strict=True):
        if axes is not panels[0]:
            axes.sharex(panels[0])
            axes.sharey(panels[0])
        for name, points in (fixed | {method: curves[method]}).items():
            if points:
                style = {"color": COLORS[0] if name == method else "0.6"}
                label = "the panel's method" if name == method else tables.names(name)["label"]
                marker = "s" if name == "ft" else "o-"
                axes.plot(*np.transpose(list(points.values())), marker, label=label, markersize=4, **style)
                for value, point in points.items() if name != "ft" else ():
                    offset = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 7}
                    axes.annotate(f"{value:.4g}", point, **style, **offset)
        axes.plot(*zero_shot_accuracies(results), "k*", label="zero-shot")
        axes.set_title(tables.names(method)["label"], fontsize=10)
        axes.set_xlabel("mean accuracy on the shifts, %")
    panels[0].set_ylabel(f"accuracy on {tables.reference_of(results[0])}, %")
    return with_legend(figure)


# ------------------------------------------------------------------------------------------------- from model and data


def energy_vectors(
    before: Mapping[str, Float[np.ndarray, "_ dim"]],
    after: Mapping[str, Mapping[str, Float[np.ndarray, "_ dim"]]],
    second_moment: Float[np.ndarray, "dim dim"],
) -> Figure:
    """Figure 15: t-SNE of energy vectors before and after fine-tuning, a panel per method.

    Takes each split's features, zero-shot (`before`) and per method (`after`). `C2^(1/2) F(x)` has D coordinates and
    the same distances as the energy vectors over all the texts of `second_moment`, such as 10,000.
    """
    values, vectors = np.linalg.eigh(second_moment)
    root = vectors * np.sqrt(np.maximum(values, 0))
    figure, panels = new_figure(len(after), 2.9, 2.9)
    for axes, (label, features) in zip(panels, after.items(), strict=True):
        parts = [*before.values(), *features.values()]
        points = np.concatenate(parts) @ root
        points = points / points.std()  # energies are small, and t-SNE's stopping thresholds are absolute
        placed = TSNE(random_state=0, perplexity=min(30, (len(points) - 1) / 3)).fit_transform(points)
        clouds = np.split(placed, np.cumsum([len(part) for part in parts])[:-1])
        for name, old, new in zip(before, clouds[: len(before)], clouds[len(before) :], strict=True):
            hollow = {"markersize": 3.5, "markerfacecolor": "none", "markeredgewidth": 0.6}
            (circles,) = axes.plot(*old.T, "o", label=f"{name}, zero-shot", **hollow)
            axes.plot(*new.T, ".", color=circles.get_color(), markersize=4, label=f"{name}, fine-tuned")
        axes.set_title(label, fontsize=10)
        axes.set(xticks=[], yticks=[])
    return with_legend(figure)


def contact_sheet(setup: Setup, most: int = 20) -> Figure:
    """Figure 16: the first image of each of the first `most` classes (columns) in every split (rows), preprocessed."""
    splits = list(setup.data.reports.values())
    classes = setup.classes[:most]
    figure = Figure(figsize=(0.7 * len(classes) + 0.9, 0.7 * len(splits) + 0.3), layout="constrained")
    grid = figure.subplots(len(splits), len(classes), squeeze=False)
    for axes, name in zip(grid[0], classes, strict=True):
        axes.set_title(name, fontsize=8)
    for row, split in zip(grid, splits, strict=True):
        row[0].set_ylabel(split.name, rotation=0, ha="right", va="center", fontsize=8)
        for label, axes in enumerate(row):
            found = np.flatnonzero(split.labels == label)
            if len(found):
                axes.imshow(data.read_image(split.images[found[0]], setup.model.config.image_size))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return figure


def write_figures(figures: Mapping[str, Callable[[], Figure]], folder: Path) -> None:
    """Writes each figure as PNG and SVG. Prints the paths, or the data that a figure lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        try:
            figure = draw()
        except Nothing as nothing:
            print(f"{name}: nothing to show yet, it needs {nothing}")
            continue
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=200)
        print(f"{folder / name}.png, .svg")


DRAWN = (trade_off_plot, distortion_plot, energy_gap_plot, post_hoc_curves_plot, soups_plot, weights_plot)
FROM_FILES = {draw.__name__.removesuffix("_plot"): draw for draw in DRAWN}
