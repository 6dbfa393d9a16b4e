"""Finished runs as their files tell them: results.json read back, tables, correlation, training costs. No model is run.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py table runs` prints the table of finished runs.

Accuracies and ECE are fractions and NLL is in nats in files, CSV and JSON; the tables that people read show percent.
"""

import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from support.errors import InputError, exit_code, read_json

Results = dict[str, Any]  # a results.json, with its `path`

# ------------------------------------------------------------------------------------------------------------- reading


def read_results(runs: Sequence[Path]) -> list[Results]:
    """Every `results.json` in or under the given folders, of runs that share data and splits.

    One that is unreadable is skipped with a warning. Raises InputError where none is left, or naming two that differ.
    """
    paths: dict[Path, None] = {}
    for run in runs:
        found = sorted(run.rglob("results.json"))
        if not found:
            raise InputError(f"{run} holds no results.json: give the folders of finished runs")
        paths |= dict.fromkeys(path for path in found if path.resolve() not in {other.resolve() for other in paths})
    results = [content | {"path": path} for path in paths if (content := read_one(path))]
    if not results:
        raise InputError(f"no readable results.json under {', '.join(map(str, runs))}: train again")
    first, seen = results[0], {}
    for other in results:
        check_comparable(first, other)
        identity = json.dumps([other.get(name) for name in ("method", "seed", "settings", "post_hoc")])
        if identity in seen:
            raise InputError(f"{seen[identity]} and {other['path']} are the same run: leave one of them out")
        seen[identity] = other["path"]
    return results


def read_one(path: Path) -> Results | None:
    """The content of a results.json; None, with a warning on stderr, where it is no whole one."""
    try:
        content = read_json(path)
    except InputError as error:
        print(f"warning: skipped: {error}", file=sys.stderr)
        return None
    missing = {"method", "seed", "splits", "zero_shot"} - set(content if isinstance(content, dict) else ())
    if missing:
        print(f"warning: skipped: {path} lacks {', '.join(sorted(missing))}", file=sys.stderr)
        return None
    return with_names(content)


def check_comparable(one: Results, other: Results) -> None:
    """Raises InputError where two runs have other data, models or splits."""
    for what, of in (
        ("data set", lambda results: results.get("data")),
        ("model", lambda results: results.get("model")),
        ("reference", lambda results: [name for name, split in results["splits"].items() if is_reference(split)]),
        ("splits", lambda results: {name: split["n"] for name, split in results["splits"].items()}),
    ):
        if of(one) != of(other):
            raise InputError(
                f"{one['path']} has {what} {shown(of(one))}, {other['path']} has {shown(of(other))}: "
                "give runs of the same data, model and splits"
            )


def shown(value: Any) -> str:
    """A value as messages show it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} ({n} images)" for name, n in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def is_reference(split: Mapping[str, Any]) -> bool:
    return split["role"] == "reference"


def reference_of(results: Results) -> str:
    return next(name for name, split in results["splits"].items() if is_reference(split))


def shifts_of(results: Results) -> list[str]:
    return [name for name, split in results["splits"].items() if not is_reference(split)]


def mean_of_shifts(results: Results, metric: str) -> float | None:
    """The mean over the shifts, of a run; None where there are none, or where a file lacks it."""
    values = [results["splits"][name].get(metric) for name in shifts_of(results)]
    return None if not values or None in values else statistics.fmean(values)


# --------------------------------------------------------------------------------------------------------------- names

POST_HOC = {"wise": "WiSE", "tpgm": "TPGM", "tpgm-c": "TPGM-C"}


def names(method: str) -> dict[str, Any]:
    """What results.json has for tables: the method's label, and its place among the rows.

    The label of `lipsum+wise-0.9` is Lipsum-FT + WiSE 0.9.
    """
    from lipsum import METHODS  # loads JAX, which reading results.json does not need

    base, *suffixes = method.split("+")
    label = [", ".join(METHODS[name].label if name in METHODS else name for name in base.split(","))]
    for suffix in suffixes:
        name = next((name for name in sorted(POST_HOC, reverse=True) if suffix.startswith(name)), "")
        label.append(POST_HOC.get(name, "") + suffix.removeprefix(name).replace("-", " "))
    return {"label": " + ".join(label), "row": list(METHODS).index(base) if base in METHODS else len(METHODS)}


def with_names(results: Results) -> Results:
    """The results, with the `names` that those of earlier versions lack."""
    return results if "label" in results else results | names(results["method"])


def by_method(results: Iterable[Results]) -> dict[str, list[Results]]:
    """The runs per method, in the order of `lipsum.METHODS`."""
    methods: dict[str, list[Results]] = {}
    for result in sorted(results, key=lambda result: result["row"]):
        methods.setdefault(result["method"], []).append(result)
    return methods


def varied_settings(runs: Sequence[Results]) -> list[str]:
    """The settings that are not the same in all of the runs."""
    settings = [run.get("settings", {}) for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if any(each.get(name) != settings[0].get(name) for each in settings)]


def groups(results: Iterable[Results]) -> dict[str, list[Results]]:
    """The runs that differ in nothing but the seed, under the label of their row.

    The label is the method's, with the settings that vary among the runs of that method, from low to high.
    """
    grouped: dict[str, list[Results]] = {}
    for runs in by_method(results).values():
        varied = varied_settings(runs)
        rows: dict[tuple[Any, ...], list[Results]] = {}
        for run in runs:
            rows.setdefault(tuple(str(run.get("settings", {}).get(name)) for name in varied), []).append(run)
        for values in sorted(rows, key=lambda values: [(number_of(value), value) for value in values]):
            said = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(varied, values, strict=True))
            grouped[runs[0]["label"] + (f" ({said})" if said else "")] = rows[values]
    return grouped


def number_of(text: str) -> float:
    """The number that a text says; infinity for other texts."""
    try:
        return float(text)
    except ValueError:
        return math.inf


# -------------------------------------------------------------------------------------------------------------- tables


class Metric(NamedTuple):
    """How tables show a number of results.json."""

    heading: str
    factor: float
    decimals: int
    best: Callable[[Iterable[float]], float]


METRICS = {
    "accuracy": Metric("accuracy, %", 100, 1, max),
    "ece": Metric("ECE, %", 100, 1, min),
    "nll": Metric("NLL, nats", 1, 3, min),
    "energy-gap": Metric("energy gap, 1e-3", 1e3, 2, min),
    "distortion": Metric("feature distortion", 1, 3, min),
    "seen": Metric("accuracy on seen classes, %", 100, 1, max),
    "unseen": Metric("accuracy on unseen classes, %", 100, 1, max),
    "harmonic-mean": Metric("harmonic mean of seen and unseen, %", 100, 1, max),
}
MetricName = Literal["accuracy", "ece", "nll", "energy-gap", "distortion", "seen", "unseen", "harmonic-mean"]
Format = Literal["text", "markdown", "latex", "csv", "json"]


class Cell(NamedTuple):
    """A mean over seeds and the sample standard deviation, where there are two or more."""

    mean: float | None
    deviation: float | None = None


class Table(NamedTuple):
    """Rows of cells under headings. The best of a column is looked for below the first `without_best` rows."""

    heading: str
    columns: list[str]
    rows: dict[str, list[Cell]]
    metrics: list[Metric]  # one a column
    without_best: int = 0


def cell(values: Sequence[float | None]) -> Cell:
    """Cell of the values of several seeds; empty where one is unknown."""
    if not values or None in values:
        return Cell(None)
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def table(results: Sequence[Results], name: str) -> Table:
    """Zero-shot and each method in rows, each split and the shifts' mean in columns."""
    metric, key = METRICS[name], name.replace("-", "_")
    zero_shot = results[0] | {"splits": results[0]["zero_shot"]}
    rows = {}
    for label, runs in {"zero-shot": [zero_shot], **groups(results)}.items():
        cells = [cell([run["splits"][split].get(key) for run in runs]) for split in results[0]["splits"]]
        rows[label] = [*cells, *([cell([mean_of_shifts(run, key) for run in runs])] if shifts_of(results[0]) else [])]
    columns = [*results[0]["splits"], *(["mean of shifts"] if shifts_of(results[0]) else [])]
    if all(each.mean is None for cells in rows.values() for each in cells):
        raise InputError(f"{results[0]['path']} has no {name}: it is in the results of runs with --unseen alone")
    return Table(metric.heading, columns, rows, [metric] * len(columns), without_best=1)


def costs(results: Sequence[Results]) -> Table:
    """Appendix B.3, "Analysis on training costs": time per step and per run by method, and their ratio to FT's."""
    seconds, rate, ratio = Metric("", 1, 4, min), Metric("", 1, 1, max), Metric("", 1, 2, min)
    columns = ["seconds per step", "ratio to FT", "images per second", "seconds in all"]
    grouped = {label: [run for run in runs if run.get("seconds_per_step")] for label, runs in groups(results).items()}
    rows, ft = {}, next((runs for runs in grouped.values() if runs and runs[0]["method"] == "ft"), [])
    base = cell([run["seconds_per_step"] for run in ft]).mean
    for label, runs in grouped.items():
        if not runs:  # a linear probe and post-hoc methods take no steps
            continue
        steps = [run["seconds_per_step"] for run in runs]
        rows[label] = [
            cell(steps),
            cell([step / base for step in steps]) if base else Cell(None),
            cell([run["settings"]["batch_size"] / step for run, step in zip(runs, steps, strict=True)]),
            cell([run["seconds"] for run in runs]),
        ]
    if not rows:
        raise InputError("none of these runs says how long its steps took: give runs of twenty steps or more")
    return Table("training costs", columns, rows, [seconds, ratio, rate, Metric("", 1, 1, min)])


def rendered(table: Table, format: Format, bold: bool = False) -> str:
    """The table as text, with the best of each column in bold where the format has it or `bold` asks for it."""
    if format in ("csv", "json"):
        return machine_readable(table, format)
    marks = {"text": ("\033[1m", "\033[0m"), "markdown": ("**", "**"), "latex": (r"\textbf{", "}")}[format]
    plus_minus = {"text": "±", "markdown": "±", "latex": r"$\pm$"}[format]

    def number(each: Cell, metric: Metric) -> str:
        if each.mean is None:
            return "-"
        scaled = [metric.factor * value for value in each if value is not None]
        return f" {plus_minus} ".join(f"{value:.{metric.decimals}f}" for value in scaled)

    rows = [[label, *map(number, cells, table.metrics)] for label, cells in table.rows.items()]
    best = set()
    for column, metric in enumerate(table.metrics, start=1):
        # As shown: what looks the same is marked the same.
        means = {row: float(rows[row][column].split()[0]) for row in range(table.without_best, len(rows))
                 if rows[row][column] != "-"}  # fmt: skip
        if len(means) > 1 and (bold or format != "text"):
            best |= {(row, column) for row, mean in means.items() if mean == metric.best(means.values())}
    escaped = [[text.replace("%", r"\%").replace("_", r"\_") if format == "latex" else text for text in row]
               for row in [[table.heading, *table.columns], *rows]]  # fmt: skip
    widths = [max(len(row[column]) for row in escaped) for column in range(len(escaped[0]))]

    def marked(row: int, column: int) -> str:
        text = escaped[row][column]
        before, after = marks if (row - 1, column) in best else ("", "")
        pad = " " * (widths[column] - len(text))
        return before + text + after + pad if column == 0 else pad + before + text + after

    lines = [[marked(row, column) for column in range(len(widths))] for row in range(len(escaped))]
    if format == "markdown":
        rule = ["---", *["---:"] * (len(widths) - 1)]
        return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    if format == "latex":
        body = [" & ".join(line) + r" \\" for line in lines]
        begin = r"\begin{tabular}{l" + "r" * (len(widths) - 1) + "}"
        return "\n".join([begin, r"\hline", body[0], r"\hline", *body[1:], r"\hline", r"\end{tabular}"])
    return "\n".join(["  ".join(lines[0]), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map("  ".join, lines[1:])])


def machine_readable(table: Table, format: Format) -> str:
    """Unrounded, in the units of the files: fractions, nats, seconds."""
    if format == "json":
        rows = {
            label: {column: each._asdict() for column, each in zip(table.columns, cells, strict=True)}
            for label, cells in table.rows.items()
        }
        return json.dumps({"table": table.heading.split(",")[0], "rows": rows}, indent=2)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *(f"{column} {kind}" for column in table.columns for kind in ("mean", "deviation"))])
    for label, cells in table.rows.items():
        writer.writerow([label, *("" if value is None else value for each in cells for value in each)])
    return text.getvalue().rstrip("\n")


# --------------------------------------------------------------------------------------------------------- correlation


def relative_accuracies(results: Sequence[Results], shift: str, of: str) -> list[tuple[float, float, Results]]:
    """Figures 4 and 13: (relative accuracy, `of`) of a shift, a pair for each run whose files hold both.

    Relative accuracy is that on the shift divided by that on the reference; `of` is `energy_gap` or `distortion`.
    """
    pairs = []
    for run in results:
        reference, split = run["splits"][reference_of(run)], run["splits"][shift]
        if split.get(of) is not None and reference["accuracy"] > 0:
            pairs.append((split["accuracy"] / reference["accuracy"], split[of], run))
    return pairs


def correlation(results: Sequence[Results], shift: str, of: str) -> float | None:
    """Pearson's, of relative accuracy with `energy_gap` or `distortion`; None where fewer than three runs tell it."""
    pairs = relative_accuracies(results, shift, of)
    accuracies, others = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    if len(pairs) < 3 or min(accuracies) == max(accuracies) or min(others) == max(others):
        return None
    return statistics.correlation(accuracies, others)


def correlations(results: Sequence[Results]) -> str:
    """Two lines: how relative accuracy on each shift goes with the energy gap there, and with feature distortion."""
    lines = []
    for of, name in (("energy_gap", "energy gap"), ("distortion", "distortion")):
        found = {shift: correlation(results, shift, of) for shift in shifts_of(results[0])}
        known = ", ".join(f"{shift} {value:.2f}" for shift, value in found.items() if value is not None)
        lines.append(
            f"Pearson's correlation of relative accuracy with {name}: {known or 'needs three runs that differ'}"
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------ commands

Runs = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATH ...", help_behavior_hint="")]


def print_accuracies(results: Sequence[Results]) -> None:
    """Prints the table that commands end with."""
    print(rendered(table(results, "accuracy"), "text", bold=sys.stdout.isatty()))


def table_command(runs: Runs, metric: MetricName = "accuracy", format: Format = "text") -> None:
    """Print the table of finished runs: a row per method, a column per split, mean ± standard deviation over seeds.

    Args:
        runs: Folders of runs, or folders that hold some.
        metric: What to show; seen, unseen and harmonic-mean are those of runs with --unseen.
        format: csv and json are unrounded, in fractions and nats.
    """
    results = read_results(runs)
    print(rendered(table(results, metric), format, bold=sys.stdout.isatty()))
    if metric in ("energy-gap", "distortion") and format == "text":
        print(correlations(results))


def costs_command(runs: Runs, format: Format = "text") -> None:
    """Print what training cost: time per step and images per second by method, and the ratio to FT's.

    Args:
        runs: Folders of runs, or folders that hold some.
        format: csv and json are unrounded.
    """
    print(rendered(costs(read_results(runs)), format))


def main(more: Mapping[str, Callable[..., None]] | None = None) -> int:
    """The command line of eval.py, here with the commands that read files alone. Returns the exit code."""
    app = tyro.extras.SubcommandApp()
    for name, command in {"table": table_command, "costs": costs_command, **(more or {})}.items():
        app.command(name=name)(command)
    description = "Commands on finished runs: tables, figures, post-hoc methods."
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed)
    return exit_code(lambda: app.cli(prog="python eval.py", description=description, config=config))
