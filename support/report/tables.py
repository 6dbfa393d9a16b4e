"""Tables of finished runs, made from their results.json alone: accuracy, calibration, training
costs, correlation.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py table runs` prints the table of
finished runs.

Files, CSV and JSON contain accuracy and ECE as fractions and NLL in nats. The other formats show
percent and nats.
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

from support.errors import InputError, exit_code, expanded, read_json

Results = dict[str, Any]  # the content of a results.json, with its `path`

# ------------------------------------------------------------------------------------------ reading


def read_results(runs: Sequence[Path]) -> list[Results]:
    """Returns every `results.json` in or under the given folders.

    An unreadable one is skipped with a warning.

    Raises InputError if none is left, if two runs differ in data, model or splits, or if two are
    the same run.
    """
    paths: dict[Path, Path] = {}
    for run in runs:
        found = sorted(run.rglob("results.json"))
        if not found:
            raise InputError(f"{run} holds no results.json: give the folders of finished runs")
        for path in found:
            paths.setdefault(path.resolve(), path)
    results = []
    for path in paths.values():
        try:
            results.append(read_one(path))
        except InputError as error:
            print(f"warning: skipped: {error}", file=sys.stderr)
    if not results:
        raise InputError(f"no readable results.json under {', '.join(map(str, runs))}: train again")
    seen: dict[str, Path] = {}
    for run in results:
        check_comparable(results[0], run)
        identity = json.dumps(
            [run.get(name) for name in ("method", "seed", "settings", "post_hoc")]
        )
        if identity in seen:
            raise InputError(
                f"{seen[identity]} and {run['path']} are the same run: leave one of them out"
            )
        seen[identity] = run["path"]
    return results


def read_one(path: Path) -> Results:
    """Returns the content of a results.json. Raises InputError if it is broken or incomplete."""
    content = read_json(path)
    missing = {"method", "seed", "splits", "zero_shot"} - set(
        content if isinstance(content, dict) else ()
    )
    if missing:
        raise InputError(f"{path} lacks {', '.join(sorted(missing))}")
    return with_names(content) | {"path": path}


def check_comparable(one: Results, other: Results) -> None:
    """Raises InputError if two runs differ in data, model, reference split or evaluated splits."""
    for kind, values in {
        "data set": lambda run: [str(run.get("data"))],
        "model": lambda run: [str(run.get("model"))],
        "reference": lambda run: [name for name in run["splits"] if name not in shifts_of(run)],
        "splits": lambda run: [
            f"{name} ({split['n']} images)" for name, split in run["splits"].items()
        ],
    }.items():
        if sorted(values(one)) != sorted(values(other)):
            raise InputError(
                f"{one['path']} has {kind} {', '.join(values(one))}, "
                f"{other['path']} has {', '.join(values(other))}: "
                "give runs of the same data, model and splits"
            )


def reference_of(results: Results) -> str:
    """Returns the name of the split that the run was trained on."""
    return next(name for name, split in results["splits"].items() if split["role"] == "reference")


def shifts_of(results: Results) -> list[str]:
    """Returns the names of the splits that were only evaluated."""
    return [name for name, split in results["splits"].items() if split["role"] != "reference"]


def mean_of_shifts(results: Results, metric: str) -> float | None:
    """Returns the run's mean over its shifts, or None if it has no shifts or one of them lacks the
    metric.
    """
    return cell([results["splits"][name].get(metric) for name in shifts_of(results)]).mean


POST_HOC = {"wise": "WiSE", "tpgm-c": "TPGM-C", "tpgm": "TPGM"}


def post_hoc_kind(suffix: str) -> str:
    """Returns the key of `POST_HOC` for a method's suffix such as `wise-0.9`, or "" if there is
    none.
    """
    return next(
        (kind for kind in POST_HOC if suffix.startswith(kind)), ""
    )  # `tpgm-c` comes before `tpgm`


def names(method: str) -> dict[str, Any]:
    """Returns a method's label in tables, such as Lipsum-FT + WiSE 0.9 for `lipsum+wise-0.9`, and
    its row.
    """
    from lipsum import METHODS  # imports JAX, which most calls of this module do without

    base, *suffixes = method.split("+")
    label = [
        ", ".join(METHODS[name].label if name in METHODS else name for name in base.split(","))
    ]
    for suffix in suffixes:
        kind = post_hoc_kind(suffix)
        label.append(POST_HOC.get(kind, "") + suffix.removeprefix(kind).replace("-", " "))
    return {
        "label": " + ".join(label),
        "row": list(METHODS).index(base) if base in METHODS else len(METHODS),
    }


def with_names(results: Results) -> Results:
    """Adds what results.json of earlier versions lack: `names` and `settings`."""
    return {"settings": {}} | results | ({} if "label" in results else names(results["method"]))


def by_method(results: Iterable[Results]) -> dict[str, list[Results]]:
    """Returns the runs per method, in the order of `lipsum.METHODS`."""
    methods: dict[str, list[Results]] = {}
    for result in sorted(results, key=lambda result: result["row"]):
        methods.setdefault(result["method"], []).append(result)
    return methods


def varied_settings(runs: Sequence[Results]) -> list[str]:
    """Returns the names of the settings that differ among the runs.

    What some of them do not have does not differ.
    """
    known = [run["settings"] for run in runs if run["settings"]]
    names = [
        name for name in (known[0] if known else ()) if all(name in settings for settings in known)
    ]
    return [
        name
        for name in names
        if any(run["settings"].get(name) != runs[0]["settings"].get(name) for run in runs)
    ]


def groups(results: Iterable[Results]) -> dict[str, list[Results]]:
    """Returns the runs per table row: those that differ in their seed alone, under the row's label.

    The label is the method's, with the settings that vary among its runs. A method's rows are
    sorted by those settings.
    """

    def position(value: Any) -> tuple[int | float, str]:
        return value if isinstance(value, int | float) else math.inf, str(value)

    grouped: dict[str, list[Results]] = {}
    for runs in by_method(results).values():
        varied = varied_settings(runs)
        for run in sorted(
            runs, key=lambda run: [position(run["settings"].get(name)) for name in varied]
        ):
            values = ", ".join(
                f"{name.replace('_', ' ')} {run['settings'].get(name)}" for name in varied
            )
            grouped.setdefault(runs[0]["label"] + (f" ({values})" if values else ""), []).append(
                run
            )
    return grouped


# ------------------------------------------------------------------------------------------- tables


class Metric(NamedTuple):
    """How tables show a number of results.json."""

    factor: float
    decimals: int
    best: Callable[[Iterable[float]], float]
    heading: str = ""


METRICS = {
    "accuracy": Metric(100, 1, max, "accuracy, %"),
    "ece": Metric(100, 1, min, "ECE, %"),
    "nll": Metric(1, 3, min, "NLL, nats"),
    "nll-capped": Metric(1, 3, min, "NLL as in the authors' script, nats"),
    "energy-gap": Metric(1e3, 2, min, "energy gap, 1e-3"),
    "distortion": Metric(1, 3, min, "feature distortion"),
    "seen": Metric(100, 1, max, "accuracy on seen classes, %"),
    "unseen": Metric(100, 1, max, "accuracy on unseen classes, %"),
    "harmonic-mean": Metric(100, 1, max, "harmonic mean of seen and unseen, %"),
}
MetricName = Literal[*METRICS]  # pyrefly: ignore[invalid-literal] (names of the table above)
Format = Literal["text", "markdown", "latex", "csv", "json"]


class Cell(NamedTuple):
    """A mean over seeds and the sample standard deviation, which needs two seeds."""

    mean: float | None
    deviation: float | None = None


class Table(NamedTuple):
    """Rows of cells, one per column.

    The first `without_best` rows do not compete for the best of a column.
    """

    heading: str
    columns: dict[str, Metric]
    rows: dict[str, list[Cell]]
    without_best: int = 0


def cell(values: Sequence[float | None]) -> Cell:
    """Returns the cell for one value per seed. It is empty if a value is missing."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return Cell(None)
    return Cell(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def rows_of(
    grouped: Mapping[str, list[Results]], values: Callable[..., list[float | None]]
) -> dict[str, list[Cell]]:
    """Returns the cells per row. `values` maps a run to its numbers, one per column."""
    return {
        label: [cell(column) for column in zip(*map(values, runs), strict=True)]
        for label, runs in grouped.items()
    }


def table(results: Sequence[Results], name: str) -> Table:
    """Returns a metric's table: rows for zero-shot and each method, columns for each split and the
    shifts' mean.
    """
    first, metric, key = results[0], METRICS[name], name.replace("-", "_")
    shifts_mean = ["mean of shifts"] if shifts_of(first) else []

    def values(run: Results) -> list[float | None]:
        per_split = [run["splits"][split].get(key) for split in first["splits"]]
        return per_split + [mean_of_shifts(run, key) for _ in shifts_mean]

    rows = rows_of(
        {"zero-shot": [first | {"splits": first["zero_shot"]}], **groups(results)}, values
    )
    if all(each.mean is None for cells in rows.values() for each in cells):
        raise InputError(
            f"{first['path']} has no {name}: seen, unseen and harmonic-mean need runs with --unseen"
        )
    return Table(
        metric.heading,
        dict.fromkeys([*first["splits"], *shifts_mean], metric),
        rows,
        without_best=1,
    )


def costs(results: Sequence[Results]) -> Table:
    """Returns the table of appendix B.3, "Analysis on training costs": time per step and per run,
    and ratio to FT's.
    """
    timed = {
        label: [run for run in runs if run.get("seconds_per_step")]
        for label, runs in groups(results).items()
    }
    timed = {
        label: runs for label, runs in timed.items() if runs
    }  # linear probes and post-hoc methods take no steps
    if not timed:
        raise InputError(
            "none of these runs says how long its steps took: give runs of twenty steps or more"
        )
    ft_runs = next((runs for runs in timed.values() if runs[0]["method"] == "ft"), [])
    ft = cell([run["seconds_per_step"] for run in ft_runs]).mean

    def values(run: Results) -> list[float | None]:
        seconds = run["seconds_per_step"]
        return [
            seconds,
            seconds / ft if ft else None,
            run["settings"]["batch_size"] / seconds,
            run["seconds"],
        ]

    columns = {
        "seconds per step": Metric(1, 4, min),
        "ratio to FT": Metric(1, 2, min),
        "images per second": Metric(1, 1, max),
        "seconds in all": Metric(1, 1, min),
    }
    return Table("training costs", columns, rows_of(timed, values))


def rendered(table: Table, format: Format, bold: bool = False) -> str:
    """Returns the table as text.

    The best of each column is bold in Markdown and LaTeX, and in text if `bold`.
    """
    if format in ("csv", "json"):
        return machine_readable(table, format)
    separator, plus_minus, before, after = {
        "text": ("  ", "±", "\033[1m", "\033[0m"),
        "markdown": (" | ", "±", "**", "**"),
        "latex": (" & ", r"$\pm$", r"\textbf{", "}"),
    }[format]

    def escaped(text: str) -> str:
        return text.replace("%", r"\%").replace("_", r"\_") if format == "latex" else text

    def shown(each: Cell, metric: Metric) -> str:
        numbers = [
            f"{metric.factor * value:.{metric.decimals}f}" for value in each if value is not None
        ]
        return f" {plus_minus} ".join(numbers) or "-"

    labels = [escaped(text) for text in (table.heading, *table.rows)]
    columns = [[label.ljust(max(map(len, labels))) for label in labels]]
    for index, (name, metric) in enumerate(table.columns.items()):
        texts = [escaped(name), *(shown(cells[index], metric) for cells in table.rows.values())]
        rivals = list(enumerate(texts))[1 + table.without_best :]
        means = {
            row: float(text.split()[0]) for row, text in rivals if text != "-"
        }  # those shown alike are equal
        best = (
            metric.best(means.values())
            if len(means) > 1 and (bold or format != "text")
            else math.nan
        )
        marked = [
            before + text + after if means.get(row) == best else text
            for row, text in enumerate(texts)
        ]
        width = max(map(len, texts))
        columns.append(
            [" " * (width - len(text)) + mark for text, mark in zip(texts, marked, strict=True)]
        )
    head, *body = [separator.join(line) for line in zip(*columns, strict=True)]
    if format == "markdown":
        rule = " | ".join(["---", *["---:"] * len(table.columns)])
        return "\n".join(f"| {line} |" for line in [head, rule, *body])
    if format == "latex":
        begin = r"\begin{tabular}{l" + "r" * len(table.columns) + "}"
        lines = [r"\hline", head + r" \\", r"\hline", *(line + r" \\" for line in body), r"\hline"]
        return "\n".join([begin, *lines, r"\end{tabular}"])
    return "\n".join([head, "-" * len(head), *body])


def machine_readable(table: Table, format: Format) -> str:
    """Returns the table as CSV or JSON, unrounded and in the units of the files: fractions, nats,
    seconds.
    """
    if format == "json":
        rows = {}
        for label, cells in table.rows.items():
            rows[label] = dict(zip(table.columns, map(Cell._asdict, cells), strict=True))
        return json.dumps({"table": table.heading.split(",")[0], "rows": rows}, indent=2)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["", *(f"{column} {kind}" for column in table.columns for kind in Cell._fields)]
    )
    writer.writerows(
        [label, *(value for each in cells for value in each)] for label, cells in table.rows.items()
    )
    return text.getvalue().rstrip("\n")


def relative_accuracies(
    results: Sequence[Results], shift: str, metric: str
) -> list[tuple[float, float, Results]]:
    """Returns (relative accuracy, metric, run) on a shift, for each run that has both (figures 4
    and 13).

    The relative accuracy is the accuracy on the shift divided by that on the reference.
    """
    reference = reference_of(results[0])
    return [
        (
            run["splits"][shift]["accuracy"] / run["splits"][reference]["accuracy"],
            run["splits"][shift][metric],
            run,
        )
        for run in results
        if run["splits"][shift].get(metric) is not None and run["splits"][reference]["accuracy"] > 0
    ]


def correlation(results: Sequence[Results], shift: str, metric: str) -> float | None:
    """Returns Pearson's correlation of relative accuracy with `metric`, or None if fewer than three
    runs differ.
    """
    pairs = relative_accuracies(results, shift, metric)
    accuracies = [accuracy for accuracy, _, _ in pairs]
    values = [value for _, value, _ in pairs]
    if len(pairs) < 3 or len(set(accuracies)) == 1 or len(set(values)) == 1:
        return None
    return statistics.correlation(accuracies, values)


def correlations(results: Sequence[Results]) -> str:
    """Returns two lines: the correlation of relative accuracy with energy gap and with distortion,
    per shift.
    """
    lines = []
    for name in ("energy gap", "distortion"):
        found = {
            shift: correlation(results, shift, name.replace(" ", "_"))
            for shift in shifts_of(results[0])
        }
        numbers = ", ".join(
            f"{shift} {value:.2f}" for shift, value in found.items() if value is not None
        )
        numbers = numbers or "needs three runs that differ"
        lines.append(f"Pearson's correlation of relative accuracy with {name}: {numbers}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- commands

Paths = Annotated[
    tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATH ...", help_behavior_hint="")
]


def print_accuracies(results: Sequence[Results]) -> None:
    """Prints the accuracy table, with which commands end."""
    print(rendered(table(results, "accuracy"), "text", bold=sys.stdout.isatty()))


def table_command(runs: Paths, metric: MetricName = "accuracy", format: Format = "text") -> None:
    """Print the table of finished runs: a row per method, a column per split, mean ± standard
    deviation over seeds.

    Args:
        runs: Folders of runs, or folders that hold some.
        metric: What to show; seen, unseen and harmonic-mean are those of runs with --unseen.
        format: csv and json are unrounded, in fractions and nats.
    """
    results = read_results(runs)
    print(rendered(table(results, metric), format, bold=sys.stdout.isatty()))
    if metric in ("energy-gap", "distortion") and format == "text":
        print(correlations(results))


def costs_command(runs: Paths, format: Format = "text") -> None:
    """Print training costs per method: time per step, its ratio to FT's, images per second, time
    per run.

    Args:
        runs: Folders of runs, or folders that hold some.
        format: csv and json are unrounded.
    """
    print(rendered(costs(read_results(runs)), format))


COMMAND_LINE = (tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed, tyro.conf.OmitArgPrefixes)
COMMANDS: dict[str, Callable[..., None]] = {"table": table_command, "costs": costs_command}


def run(more: Mapping[str, Callable[..., None]] | None = None) -> int:
    """Runs eval.py's command line: the commands above and `more`. Returns the exit code."""
    app = tyro.extras.SubcommandApp()
    for name, command in (COMMANDS | dict(more or {})).items():
        app.command(name=name)(command)
    description = "Commands on finished runs: tables, figures, post-hoc methods."
    arguments = {
        "args": expanded(sys.argv[1:]),
        "prog": "python eval.py",
        "description": description,
    }
    return exit_code(lambda: app.cli(**arguments, config=COMMAND_LINE))
