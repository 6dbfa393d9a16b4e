"""The paper's figures for one's own runs, drawn with matplotlib from what their results.json and metrics.jsonl tell.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py figures runs --out figures` writes them.

Each function returns one figure, or raises Nothing where the runs do not hold what it shows.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

import data
import lipsum
from support import tables
from support.opening import Setup
from support.tables import Results


class Nothing(Exception):
    """These runs hold nothing for a figure to show; the message says what would."""


# Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, too pale for lines. More
# methods than colours differ in their markers.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "d", "8")
ZERO_SHOT = {"color": "black", "marker": "*", "markersize": 15, "linestyle": "none", "markeredgecolor": "white"}


def look(method: str) -> dict[str, Any]:
    """Colour and marker of a training method, the same in every figure."""
    names = list(lipsum.METHODS)
    index = names.index(method) if method in names else sum(map(ord, method))
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def axes_of(count: int, most_columns: int = 5, height: float = 3.2, width: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, room on the right for its one legend."""
    columns = min(count, most_columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns + 1.9, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def add_legend(figure: Figure) -> None:
    """One legend for all panels, each label once."""
    handles = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)


def trained(results: Sequence[Results]) -> list[Results]:
    """The runs of training methods, without what post-hoc methods made."""
    return [result for result in results if "+" not in result["method"]]


def main_settings(results: Sequence[Results]) -> list[Results]:
    """Of each training method the runs of one choice of settings: the one with the most seeds, else the first."""
    methods = tables.by_method(trained(results)).values()
    return [run for runs in methods for run in max(tables.groups(runs).values(), key=len)]


def by_label(results: Sequence[Results]) -> dict[str, tuple[str, list[Results]]]:
    """The method and the runs (a run for each seed) under each row's label of the tables."""
    return {label: (runs[0]["method"], runs) for label, runs in tables.groups(results).items()}


def accuracies(runs: Sequence[Results]) -> tuple[list[float], list[float]]:
    """Percent on the shifts' mean and on the reference, of each run."""
    shifts = [tables.mean_of_shifts(run, "accuracy") for run in runs]
    if None in shifts:
        raise Nothing("runs with shifts, for example --shifts painting sketch")
    return [100 * shift for shift in shifts], [
        100 * run["splits"][tables.reference_of(run)]["accuracy"] for run in runs
    ]


def zero_shot_star(axes: Axes, results: Sequence[Results]) -> None:
    x, y = accuracies([results[0] | {"splits": results[0]["zero_shot"]}])
    axes.plot(x, y, label="zero-shot", zorder=5, **ZERO_SHOT)


def label_accuracies(axes: Axes, results: Sequence[Results]) -> None:
    axes.set_xlabel("mean accuracy on the shifts, %")
    axes.set_ylabel(f"accuracy on {tables.reference_of(results[0])}, %")


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# ------------------------------------------------------------------------------------------------- from results.json


def trade_off(results: Sequence[Results]) -> Figure:
    """Figures 2, 7 and 8: what each method gains on the reference and loses on the shifts.

    Means over seeds with standard deviations. A line joins the learning rates of a method (or the values of another
    swept setting), all else being equal.
    """
    figure, (axes,) = axes_of(1, width=5.4, height=4.6)
    swept: dict[str, None] = {}
    for method, of_method in tables.by_method(trained(results)).items():
        varied = sorted(tables.varied_settings(of_method), key=lambda name: name == "learning_rate")
        swept |= dict.fromkeys(varied)
        lines: dict[tuple[Any, ...], list[tuple[float, float, float, float]]] = {}
        for runs in tables.groups(of_method).values():
            values = tuple(str(runs[0]["settings"][name]) for name in varied)
            shifts, reference = accuracies(runs)
            point = (statistics.fmean(shifts), statistics.fmean(reference), spread(shifts), spread(reference))
            lines.setdefault(values[:-1], []).append(point)
            axes.annotate(", ".join(values), point[:2], xytext=(5, 4), textcoords="offset points", fontsize=6)
        for points in lines.values():
            x, y, x_error, y_error = zip(*points, strict=True)
            style = look(method) | {"linewidth": 1, "elinewidth": 0.8, "markersize": 7, "markeredgecolor": "white"}
            axes.errorbar(x, y, y_error, x_error, label=tables.names(method)["label"], **style)
    if swept:
        names = ", ".join(name.replace("_", " ") for name in swept)
        axes.set_title(f"at the points: {names}", fontsize=7, loc="left")
    zero_shot_star(axes, results)
    label_accuracies(axes, results)
    add_legend(figure)
    return figure


def distortion(results: Sequence[Results]) -> Figure:
    """Figures 3 and 9 to 12: how far features moved, per split; the mean over seeds."""
    splits = list(results[0]["splits"])
    groups = {
        label: cells
        for label, (_, runs) in by_label(main_settings(results)).items()
        if None not in (cells := [[run["splits"][name].get("distortion") for run in runs] for name in splits])[0]
    }
    if not groups:
        raise Nothing("runs whose results.json tells the feature distortion")
    figure, (axes,) = axes_of(1, width=1.2 + 0.75 * len(groups), height=3.6)
    width = 0.8 / len(splits)
    for index, name in enumerate(splits):
        means = [statistics.fmean(cells[index]) for cells in groups.values()]
        errors = [spread(cells[index]) for cells in groups.values()]
        positions = np.arange(len(groups)) + (index - (len(splits) - 1) / 2) * width
        label = f"{name} (reference)" if name == tables.reference_of(results[0]) else name
        axes.bar(positions, means, width, yerr=errors, color=COLORS[index % len(COLORS)], label=label,
                 error_kw={"elinewidth": 0.7})  # fmt: skip
    axes.set_xticks(range(len(groups)), groups.keys(), rotation=35, ha="right")
    axes.set_ylabel("mean distance of features\nfrom the zero-shot ones")
    axes.grid(visible=False, axis="x")
    add_legend(figure)
    return figure


def energy_gap(results: Sequence[Results]) -> Figure:
    """Figures 4 and 13: accuracy on a shift relative to the reference's, against the energy gap there; each a run.

    Gaps span three orders of magnitude: the axis is linear to 1e-3 and logarithmic above. The correlation is of the
    values themselves.
    """
    shifts = tables.shifts_of(results[0])
    if not shifts or not any(tables.relative_accuracies(results, shift, "energy_gap") for shift in shifts):
        raise Nothing("runs with shifts whose results.json tells the energy gap")
    figure, panels = axes_of(len(shifts))
    for axes, shift in zip(panels, shifts, strict=True):
        for relative, gap, run in tables.relative_accuracies(results, shift, "energy_gap"):
            base, *post_hoc = run["method"].split("+")
            fill = {"markerfacecolor": "none"} if post_hoc else {"markeredgecolor": "white"}
            label = tables.names(base)["label"] + (" + post-hoc" if post_hoc else "")
            style = look(base.split(",")[0]) | {"linestyle": "none", "markersize": 6, "markeredgewidth": 0.7} | fill
            axes.plot(gap, relative, label=label, **style)
        of_pearson = tables.correlation(results, shift, "energy_gap")
        axes.set_title(shift + ("" if of_pearson is None else f"   PCC {of_pearson:.2f}"), fontsize=10)
        axes.set_xlabel("energy gap, squared cosine")
        axes.set_xscale("symlog", linthresh=1e-3)
    panels[0].set_ylabel(f"accuracy relative to {tables.reference_of(results[0])}")
    add_legend(figure)
    return figure


def post_hoc_curves(results: Sequence[Results]) -> Figure:
    """Figures 5 and 14: WiSE and TPGM over their settings, from each fine-tuned run; the mean over seeds."""
    groups = by_label([*main_settings(results), *(run for run in results if "+" in run["method"])])
    curves: dict[tuple[str, str], list[tuple[float, list[Results]]]] = {}
    for method, runs in groups.values():
        base, _, suffix = method.partition("+")
        kind = next((kind for kind in ("wise", "tpgm-c", "tpgm") if suffix.startswith(kind)), "")
        if kind and "+" not in suffix:
            how = runs[0].get("post_hoc", {})
            curves.setdefault((base, kind), []).append((how.get("alpha", how.get("penalty", 0.0)), runs))
    if not curves:
        raise Nothing("python eval.py wise RUN, or tpgm RUN")
    figure, (axes,) = axes_of(1, width=5.4, height=4.6)
    styles = {"wise": "-", "tpgm": "none", "tpgm-c": "--"}
    for method, runs in groups.values():
        if any(method == base for base, _ in curves):
            x, y = map(statistics.fmean, accuracies(runs))
            axes.plot(x, y, label=tables.names(method)["label"], markersize=9, linestyle="none", **look(method))
    for (base, kind), points in curves.items():
        ordered = sorted(points, key=lambda point: -point[0] if kind == "wise" else point[0])
        means = [tuple(map(statistics.fmean, accuracies(runs))) for _, runs in ordered]
        if kind == "wise":  # alpha 1 is the fine-tuned run itself
            own = [runs for method, runs in groups.values() if method == base]
            means = [tuple(map(statistics.fmean, accuracies(runs))) for runs in own] + means
        color = look(base)["color"]
        label = f"{tables.names(base)['label']} + {tables.POST_HOC[kind]}"
        marker = {"wise": ".", "tpgm": "P", "tpgm-c": "x"}[kind]
        axes.plot(*zip(*means, strict=True), color=color, linestyle=styles[kind], marker=marker, label=label)
    zero_shot_star(axes, results)
    label_accuracies(axes, results)
    add_legend(figure)
    return figure


def soups(results: Sequence[Results]) -> Figure:
    """Figure 6: soups and ensembles beside the runs that they were chosen from."""
    made = [run for run in results if run["method"].endswith(("+soup", "+ensemble"))]
    if not made:
        raise Nothing("python eval.py soup RUNS, or ensemble RUNS")
    figure, (axes,) = axes_of(1, width=5.4, height=4.6)
    bases = {name for run in made for name in run["method"].partition("+")[0].split(",")}
    for run in results:
        if run["method"] in bases:
            x, y = accuracies([run])
            axes.plot(x, y, linestyle="none", markersize=6, alpha=0.7, label=run["label"],
                      **look(run["method"]))  # fmt: skip
    for run in made:
        base, _, kind = run["method"].partition("+")
        color = look(base)["color"] if base in lipsum.METHODS else "0.4"
        marker = {"soup": "s", "ensemble": "D"}[kind]
        x, y = accuracies([run])
        axes.plot(x, y, linestyle="none", marker=marker, markersize=10, markerfacecolor="none", markeredgewidth=2,
                  color=color, label=run["label"])  # fmt: skip
    zero_shot_star(axes, results)
    label_accuracies(axes, results)
    add_legend(figure)
    return figure


def reliability(results: Sequence[Results]) -> Figure:
    """Accuracy against confidence in 15 bins, a panel for each method, a line for each split; seeds pooled."""
    groups = {"zero-shot": [results[0]["zero_shot"]]}
    groups |= {label: [run["splits"] for run in runs] for label, (_, runs) in by_label(main_settings(results)).items()}
    groups = {
        label: runs for label, runs in groups.items() if all("reliability" in s for r in runs for s in r.values())
    }
    if not groups:
        raise Nothing("runs whose results.json tells the reliability bins")
    figure, panels = axes_of(len(groups), height=2.6, width=2.6)
    for axes, (label, runs) in zip(panels, groups.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1, label="calibrated")
        for index, name in enumerate(runs[0]):
            bins = {
                key: np.sum([run[name]["reliability"][key] for run in runs], axis=0)
                for key in ("count", "correct", "confidence")
            }
            filled = bins["count"] >= 10  # fewer images tell little
            x, y = (bins[key][filled] / bins["count"][filled] for key in ("confidence", "correct"))
            axes.plot(x, y, color=COLORS[index % len(COLORS)], marker=".", linewidth=1.2, label=name)
        axes.set_title(label, fontsize=10)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    for axes in panels[-min(5, len(panels)) :]:
        axes.set_xlabel("confidence")
    for axes in panels[::5]:
        axes.set_ylabel("accuracy")
    add_legend(figure)
    return figure


# ------------------------------------------------------------------------------------------------ from metrics.jsonl


def training_curves(results: Sequence[Results]) -> Figure:
    """Cross-entropy, regulariser and gradient norm over the steps; the mean over seeds."""
    panels_of = {
        "cross-entropy, nats": lambda line: line.get("cross_entropy", line["loss"]),
        "regulariser": lambda line: line.get("regularizer"),
        "gradient norm": lambda line: line["gradient_norm"],
    }
    curves: dict[str, tuple[str, list[list[dict[str, float]]]]] = {}
    for label, (method, runs) in by_label(main_settings(results)).items():
        logs = [run["path"].with_name("metrics.jsonl") for run in runs]
        lines = [
            [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            for log in logs
            if log.exists()
        ]
        if lines := [each for each in lines if each]:
            curves[label] = method, lines
    if not curves:
        raise Nothing("runs with their metrics.jsonl")
    figure, panels = axes_of(len(panels_of), width=4.0, height=3.4)
    for axes, (name, read) in zip(panels, panels_of.items(), strict=True):
        lowest = []
        for label, (method, seeds) in curves.items():
            steps = [line["step"] for line in seeds[0]]
            columns = zip(*[{line["step"]: read(line) for line in lines}.values() for lines in seeds], strict=False)
            means = [statistics.fmean(column) for column in columns if None not in column]
            if means:
                lowest.append(min(means[1:], default=means[0]))
                axes.plot(steps[: len(means)], means, label=label, linewidth=1.2, markevery=max(1, len(means) // 6),
                          markersize=4, **look(method))  # fmt: skip
        axes.set(xlabel="step", ylabel=name, yscale="log")
        if lowest:  # before the first update regularisers are zero but for rounding
            axes.set_ylim(bottom=min(lowest) / 1.5)
    add_legend(figure)
    return figure


# ------------------------------------------------------------------------------------------------ from model and data


def energy_vectors(
    before: Mapping[str, Float[np.ndarray, "_ dim"]],
    after: Mapping[str, Mapping[str, Float[np.ndarray, "_ dim"]]],
    second_moment: Float[np.ndarray, "dim dim"],
) -> Figure:
    """Figure 15: t-SNE of energy vectors before and after fine-tuning, a panel for each method.

    Takes the features of each split, zero-shot and by each method. Distances between the energy vectors over all the
    texts of `second_moment` are those between `C2^(1/2) F(x)`, so that D coordinates stand for 10,000.
    """
    values, vectors = np.linalg.eigh(second_moment)
    root = vectors * np.sqrt(np.maximum(values, 0))
    figure, panels = axes_of(len(after), height=2.9, width=2.9)
    start = np.concatenate(list(before.values())) @ root
    for axes, (label, features) in zip(panels, after.items(), strict=True):
        points = np.concatenate([start, np.concatenate(list(features.values())) @ root])
        points = points / points.std()  # energies are small numbers; t-SNE's own stopping rules are not
        placed = TSNE(random_state=0, perplexity=min(30, (len(points) - 1) / 3)).fit_transform(points)
        pairs = zip(np.split(placed[: len(start)], bounds(before)), np.split(placed[len(start) :], bounds(before)),
                    strict=True)  # fmt: skip
        for index, (name, (old, new)) in enumerate(zip(before, pairs, strict=True)):
            color = COLORS[index % len(COLORS)]
            axes.plot(*old.T, linestyle="none", marker="o", markersize=3.5, markerfacecolor="none", color=color,
                      markeredgewidth=0.6, label=f"{name}, zero-shot")  # fmt: skip
            axes.plot(*new.T, linestyle="none", marker=".", markersize=4, color=color, label=f"{name}, fine-tuned")
        axes.set_title(label, fontsize=10)
        axes.set(xticks=[], yticks=[])
    add_legend(figure)
    return figure


def bounds(parts: Mapping[str, Float[np.ndarray, "_ dim"]]) -> Int[np.ndarray, " _"]:
    """Where the concatenation of the parts is to be split again."""
    return np.cumsum([len(part) for part in parts.values()])[:-1]


def contact_sheet(setup: Setup, most: int = 20) -> Figure:
    """Figure 16: the first image of each of the first classes (columns) in every split (rows), as evaluated."""
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


def save(figures: Mapping[str, Callable[[], Figure]], folder: Path) -> None:
    """Writes each figure as PNG and SVG, and names those that have nothing to show."""
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


FROM_FILES = {
    "trade_off": trade_off,
    "distortion": distortion,
    "energy_gap": energy_gap,
    "post_hoc_curves": post_hoc_curves,
    "soups": soups,
    "reliability": reliability,
    "training_curves": training_curves,
}
