"""Tables of finished runs, made from their results.json alone.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py table runs` prints one.

Files and CSV contain accuracy and ECE as fractions and NLL in nats. The other formats show percent
and nats.
"""

import csv
import io
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from support.errors import InputError, exit_code, expanded, read_json, unknown, warn

Results = dict[str, Any]  # the content of a results.json, with its `path`

# ------------------------------------------------------------------------------------------ reading

REQUIRED = ["method", "label", "row", "data", "seed", "settings", "content", "splits", "zero_shot"]


def read_results(runs: Sequence[Path]) -> list[Results]:
    """Returns every `results.json` in or under the given folders, but skips broken ones.

    Raises InputError if none is left, or if two cannot share a table or are the same run.
    """
    paths: dict[Path, Path] = {}
    for run in runs:
        found = sorted(run.rglob("results.json"))
        if not found:
            raise InputError(f"{run} holds no results.json: give the folders of finished runs")
        paths |= {path.resolve(): path for path in found}
    results = []
    for path in paths.values():
        try:
            results.append(read_one(path))
        except InputError as error:
            warn(f"skipped: {error}")
    if not results:
        raise InputError(f"no readable results.json under {', '.join(map(str, runs))}: train again")
    name_by_content(results)
    seen: dict[str, Path] = {}
    for run in results:
        check_comparable(results[0], run)
        parts = [run.get(name) for name in ("method", "seed", "settings", "post_hoc")]
        identity = json.dumps(parts)
        if identity in seen:
            both = f"{seen[identity]} and {run['path']}"
            raise InputError(f"{both} are the same run: leave one of them out")
        seen[identity] = run["path"]
    return results


def read_one(path: Path) -> Results:
    """Returns the content of a results.json. Raises InputError if it is broken or incomplete."""
    content = read_json(path)
    known = content if isinstance(content, dict) else {}
    missing = [name for name in REQUIRED if name not in known]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}")
    return known | {"path": path}


def name_by_content(results: Sequence[Results]) -> None:
    """Replaces the settings that may be files by one name per content, that of the first run.

    So the same weights under two paths are one model, and other weights under its path another.
    """
    names: dict[tuple[str, int], str] = {}
    for run in results:
        for option, checksum in run["content"].items():
            if (option, checksum) not in names:
                name = str(run["settings"].get(option) or "default")
                name = os.path.basename(name) if os.path.isabs(name) else name
                taken = [known for (other, _), known in names.items() if other == option]
                names[option, checksum] = f"{name} {checksum:08x}" if name in taken else name
            run["settings"][option] = names[option, checksum]


def check_comparable(one: Results, other: Results) -> None:
    """Raises InputError if two runs differ in data, reference split or evaluated splits."""

    def describe(run: Results) -> dict[str, str]:
        splits = [f"{name} ({split['n']} images)" for name, split in run["splits"].items()]
        return {
            "data set": run["data"],
            "reference": reference_of(run) or "none",
            "splits": ", ".join(sorted(splits)),
        }

    others = describe(other)
    for kind, value in describe(one).items():
        if value != others[kind]:
            raise InputError(
                f"{one['path']} has {kind} {value}, {other['path']} has {others[kind]}: "
                "give runs of the same data and splits"
            )


def reference_of(results: Results) -> str:
    """Returns the name of the split that the run was trained on, or "" if that is not reported."""
    roles = {split["role"]: name for name, split in results["splits"].items()}
    return roles.get("reference", "")


def shifts_of(results: Results) -> list[str]:
    """Returns the names of the splits that were only evaluated."""
    return [name for name, split in results["splits"].items() if split["role"] != "reference"]


# ----------------------------------------------------------------------------------------- grouping


def group_by_method(results: Iterable[Results]) -> dict[str, list[Results]]:
    """Returns the runs per method, in the order of `lipsum.METHODS`."""
    methods: dict[str, list[Results]] = {}
    for run in sorted(results, key=lambda run: run["row"]):
        methods.setdefault(run["method"], []).append(run)
    return methods


def varied_settings(runs: Sequence[Results]) -> list[str]:
    """Returns the names of the settings that all of the runs have and in which they differ."""
    first, *others = [run["settings"] for run in runs]
    return [
        name
        for name, value in first.items()
        if all(name in settings for settings in others)
        and any(settings[name] != value for settings in others)
    ]


def describe_settings(run: Results, names: Iterable[str]) -> str:
    """Returns the values of some settings, such as `steps 100, learning rate 0.001`."""
    return ", ".join(f"{name.replace('_', ' ')} {run['settings'][name]}" for name in names)


def group_by_model(results: Sequence[Results]) -> dict[str, list[Results]]:
    """Returns the runs per model and prompts, by what differs among them: "" if nothing does."""
    varied = varied_models(results)
    models: dict[str, list[Results]] = {}
    for run in results:
        models.setdefault(describe_settings(run, varied), []).append(run)
    return models


def varied_models(runs: Sequence[Results]) -> list[str]:
    """Returns which of model and prompts differ among the runs."""
    return [name for name in varied_settings(runs) if name in ("model", "templates")]


def group_by_row(results: Sequence[Results]) -> dict[str, list[Results]]:
    """Returns the runs per table row: those that differ in their seed alone.

    A row's label is the method's, with the settings that vary among its runs, in their order, and
    with model and prompts if those vary among all runs.
    """

    def position(value: Any) -> tuple[int | float, str]:
        return value if isinstance(value, int | float) else math.inf, str(value)

    of_all = varied_models(results)
    rows: dict[str, list[Results]] = {}
    for runs in group_by_method(results).values():
        varied = list(dict.fromkeys([*of_all, *varied_settings(runs)]))
        runs.sort(key=lambda run: [position(run["settings"][name]) for name in varied])
        for run in runs:
            settings = f" ({describe_settings(run, varied)})" if varied else ""
            rows.setdefault(run["label"] + settings, []).append(run)
    return rows


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
Format = Literal["text", "markdown", "latex", "csv"]


class Cell(NamedTuple):
    """A mean over seeds and the sample standard deviation, which needs two seeds."""

    mean: float | None
    deviation: float | None = None


class Table(NamedTuple):
    """Rows of cells, one per column. The first `without_best` rows are never bold."""

    heading: str
    columns: dict[str, Metric]
    rows: dict[str, list[Cell]]
    without_best: int = 0


def average(values: Sequence[float | None]) -> Cell:
    """Returns the cell for one value per seed. It is empty if a value is missing."""
    numbers = [value for value in values if value is not None]
    if not numbers or len(numbers) < len(values):
        return Cell(None)
    return Cell(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


def average_rows(
    rows: Mapping[str, Sequence[Results]], values: Callable[[Results], list[float | None]]
) -> dict[str, list[Cell]]:
    """Returns the cells per row. `values` maps a run to its numbers, one per column."""
    return {
        label: [average(column) for column in zip(*map(values, runs), strict=True)]
        for label, runs in rows.items()
    }


def zero_shot_of(results: Sequence[Results]) -> list[Results]:
    """Returns the results of the zero-shot models of runs, one per model and prompts."""
    found = []
    for first, *_ in group_by_model(results).values():
        settings = {name: first["settings"].get(name) for name in ("model", "templates")}
        new = {"method": "zero-shot", "label": "zero-shot", "row": -1, "settings": settings}
        found.append(first | new | {"splits": first["zero_shot"]})
    return found


def tabulate(results: Sequence[Results], name: str, average_of: str = "shifts") -> Table:
    """Returns a metric's table: zero-shot and methods by splits and the shifts' mean.

    With `average_of` all, it has the mean of all splits, too. Zero-shot has a row per model and
    prompts. Raises InputError if no run has the metric.
    """
    first, metric, key = results[0], METRICS[name], name.replace("-", "_")
    means = mean_columns(first["splits"], shifts_of(first), average_of == "all")

    def values(run: Results) -> list[float | None]:
        numbers = {split: run["splits"][split].get(key) for split in first["splits"]}
        for column, splits in means.items():
            numbers[column] = average([numbers[split] for split in splits]).mean
        return list(numbers.values())

    zero_shot = zero_shot_of(results)
    trained = [run for run in results if run["method"] != "zero-shot"]
    rows = average_rows(group_by_row([*zero_shot, *trained]), values)
    if all(cell.mean is None for cells in rows.values() for cell in cells):
        raise InputError(
            f"{first['path']} has no {name}: seen, unseen and harmonic-mean need runs with --unseen"
        )
    return Table(
        metric.heading, dict.fromkeys([*first["splits"], *means], metric), rows, len(zero_shot)
    )


def mean_columns(splits: Iterable[str], shifts: list[str], of_all: bool) -> dict[str, list[str]]:
    """Returns the splits that each column of means is over."""
    means = {"mean of shifts": shifts, "mean of all": list(splits) if of_all else []}
    return {column: averaged for column, averaged in means.items() if averaged}


def tabulate_paper(name: str, results: Sequence[Results], average_of: str = "shifts") -> Table:
    """Returns the paper's values for the methods of some runs, from the block `name`.

    Raises InputError if paper.json has no such block.
    """
    paper = read_json(Path(__file__).with_name("paper.json"))
    blocks = {block["name"]: block for block in paper["tables"]}
    if name not in blocks:
        raise unknown("table of the paper", name, blocks)
    block = blocks[name]
    metric = METRICS[block["metric"]]
    unit = 1 if block["metric"] in ("ece", "nll") else 100  # else the file has percent
    shifts = [split for split in block["splits"] if split != block["reference"]]
    splits = [block["reference"], *shifts]  # as ours
    means = mean_columns(splits, shifts, average_of == "all")
    labels = {run["method"]: run["label"] for run in results} | {"zero-shot": "zero-shot"}
    rows = {}
    for row in block["rows"]:
        label = row.get("label") or labels.get(row["method"])  # quoted or unnamed, or a method
        if not label:
            continue
        settings = {key: row[key] for key in ("num_texts", "text_length") if key in row}
        named = f" ({describe_settings({'settings': settings}, settings)})" if settings else ""
        cells: dict[str, Cell] = {}
        for index, split in enumerate(block["splits"]):
            deviation = row["deviation"][index] / unit if "deviation" in row else None
            cells[split] = Cell(row["mean"][index] / unit, deviation)
        averages = [average([cells[split].mean for split in x]).mean for x in means.values()]
        rows[label + named] = [*(cells[split] for split in splits), *map(Cell, averages)]
    heading = f"the paper's {name.partition('/')[0].replace('-', ' ')}: {metric.heading}"
    return Table(heading, dict.fromkeys([*splits, *means], metric), rows)


def tabulate_costs(results: Sequence[Results]) -> Table:
    """Returns the table of appendix B.3, "Analysis on training costs".

    Raises InputError if no run says how long a step took.
    """
    timed = {}
    for label, runs in group_by_row(results).items():
        # Linear probes and post-hoc methods take no steps.
        if with_steps := [run for run in runs if run.get("seconds_per_step")]:
            timed[label] = with_steps
    if not timed:
        raise InputError(
            "none of these runs says how long its steps took: give runs of twenty steps or more"
        )
    ft_runs = next((runs for runs in timed.values() if runs[0]["method"] == "ft"), [])
    ft = average([run["seconds_per_step"] for run in ft_runs]).mean

    def values(run: Results) -> list[float | None]:
        seconds = run["seconds_per_step"]
        ratio = seconds / ft if ft else None
        return [seconds, ratio, run["settings"]["batch_size"] / seconds, run["seconds"]]

    columns = {
        "seconds per step": Metric(1, 4, min),
        "ratio to FT": Metric(1, 2, min),
        "images per second": Metric(1, 1, max),
        "seconds in all": Metric(1, 1, min),
    }
    return Table("training costs", columns, average_rows(timed, values))


# ---------------------------------------------------------------------------------------- rendering

STYLES = {  # what separates columns, what stands before a deviation, how a text is bold
    "text": ("  ", "±", "\033[1m{}\033[0m"),
    "markdown": (" | ", "±", "**{}**"),
    "latex": (" & ", r"$\pm$", r"\textbf{{{}}}"),
}


def render(table: Table, format: Format, bold: bool = False) -> str:
    """Returns the table as text.

    The best of each column is bold in Markdown and LaTeX, and in text if `bold`.
    """
    if format == "csv":
        return render_csv(table)
    separator, plus_minus, bold_text = STYLES[format]

    def escape(text: str) -> str:
        return text.replace("%", r"\%").replace("_", r"\_") if format == "latex" else text

    labels = [escape(text) for text in (table.heading, *table.rows)]
    width = max(map(len, labels))
    columns = [[label.ljust(width) for label in labels]]
    for index, (name, metric) in enumerate(table.columns.items()):
        texts = [render_cell(cells[index], metric, plus_minus) for cells in table.rows.values()]
        marked = best_rows(texts, metric, table.without_best) if bold or format != "text" else []
        width = max(map(len, [escape(name), *texts]))
        column = [escape(name).rjust(width)]
        for row, text in enumerate(texts):
            padding = " " * (width - len(text))
            column.append(padding + (bold_text.format(text) if row in marked else text))
        columns.append(column)
    head, *body = [separator.join(line) for line in zip(*columns, strict=True)]
    if format == "markdown":
        rule = " | ".join(["---", *["---:"] * len(table.columns)])
        return "\n".join(f"| {line} |" for line in [head, rule, *body])
    if format == "latex":
        begin = r"\begin{tabular}{l" + "r" * len(table.columns) + "}"
        lines = [r"\hline", head + r" \\", r"\hline", *(line + r" \\" for line in body), r"\hline"]
        return "\n".join([begin, *lines, r"\end{tabular}"])
    return "\n".join([head, "-" * len(head), *body])


def render_cell(cell: Cell, metric: Metric, plus_minus: str) -> str:
    """Returns mean ± deviation in the metric's unit, or - for an empty cell."""
    numbers = [metric.factor * value for value in cell if value is not None]
    texts = [f"{number:.{metric.decimals}f}" for number in numbers]
    return f" {plus_minus} ".join(texts) or "-"


def best_rows(texts: Sequence[str], metric: Metric, first: int) -> list[int]:
    """Returns the rows, from `first` on, that show the best mean of a column with two rivals."""
    rivals = [row for row, text in enumerate(texts) if row >= first and text != "-"]
    means = {row: float(texts[row].split()[0]) for row in rivals}
    if len(means) < 2:
        return []
    best = metric.best(means.values())
    return [row for row, mean in means.items() if mean == best]


def render_csv(table: Table) -> str:
    """Returns the table as CSV, unrounded, in the units of the files: fractions, nats, seconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *(f"{name} {kind}" for name in table.columns for kind in Cell._fields)])
    for label, cells in table.rows.items():
        writer.writerow([label, *(value for cell in cells for value in cell)])
    return text.getvalue().rstrip("\n")


# -------------------------------------------------------------------------------------- correlation


def relative_accuracies(
    results: Sequence[Results], shift: str, key: str
) -> list[tuple[float, float, Results]]:
    """Returns (accuracy on a shift / on the reference, metric there, run) where both exist."""
    found = []
    for run in results:
        on_reference, on_shift = run["splits"][reference_of(run)], run["splits"][shift]
        if on_shift.get(key) is not None and on_reference["accuracy"] > 0:
            found.append((on_shift["accuracy"] / on_reference["accuracy"], on_shift[key], run))
    return found


def correlate(results: Sequence[Results], shift: str, key: str) -> float | None:
    """Returns Pearson's correlation of relative accuracy with a metric; None of too few runs."""
    pairs = relative_accuracies(results, shift, key)
    accuracies = [accuracy for accuracy, _, _ in pairs]
    values = [value for _, value, _ in pairs]
    if len(pairs) < 3 or len(set(accuracies)) == 1 or len(set(values)) == 1:
        return None
    return statistics.correlation(accuracies, values)


def print_correlations(results: Sequence[Results]) -> None:
    """Prints the correlation of relative accuracy with energy gap and distortion, per shift."""
    for name in ("energy gap", "distortion"):
        found = []
        for shift in shifts_of(results[0]):
            value = correlate(results, shift, name.replace(" ", "_"))
            if value is not None:
                found.append(f"{shift} {value:.2f}")
        numbers = ", ".join(found) or "needs three runs that differ"
        print(f"Pearson's correlation of relative accuracy with {name}: {numbers}")


# ----------------------------------------------------------------------------------------- commands

Paths = Annotated[
    tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PATH ...", help_behavior_hint="")
]


def print_accuracies(results: Sequence[Results]) -> None:
    """Prints the accuracy table, with which commands end."""
    name_by_content(results)
    print(render(tabulate(results, "accuracy"), "text", bold=sys.stdout.isatty()))


def table_command(
    runs: Paths,
    metric: MetricName = "accuracy",
    average_of: Annotated[Literal["shifts", "all"], tyro.conf.arg(name="average")] = "shifts",
    format: Format = "text",
    paper: str = "",
) -> None:
    """Print the table of finished runs: a row per method, a column per split, mean ± standard
    deviation over seeds.

    Args:
        runs: Folders of runs, or folders that hold some.
        metric: What to show; seen, unseen and harmonic-mean are those of runs with --unseen.
        average_of: all: also the mean of all splits, the reference included, as in Table 10.
        format: csv is unrounded, in fractions and nats.
        paper: Also print the paper's values for these methods, such as table-1/domainnet.
    """
    results = read_results(runs)
    found = [tabulate(results, metric, average_of)]
    if paper:
        found.append(tabulate_paper(paper, results, average_of))
    print(*(render(each, format, bold=sys.stdout.isatty()) for each in found), sep="\n\n")
    if metric in ("energy-gap", "distortion") and format == "text":
        print_correlations(results)


def costs_command(runs: Paths, format: Format = "text") -> None:
    """Print training costs per method: time per step, its ratio to FT's, images per second, time
    per run.

    Args:
        runs: Folders of runs, or folders that hold some.
        format: csv is unrounded.
    """
    print(render(tabulate_costs(read_results(runs)), format))


COMMAND_LINE = (tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed, tyro.conf.OmitArgPrefixes)
COMMANDS: dict[str, Callable[..., None]] = {"table": table_command, "costs": costs_command}


def run_command(more: Mapping[str, Callable[..., None]] | None = None) -> int:
    """Runs eval.py's command line: the commands above and `more`. Returns the exit code."""
    app = tyro.extras.SubcommandApp()
    for name, command in (COMMANDS | dict(more or {})).items():
        app.command(name=name)(command)
    arguments = {
        "args": expanded(sys.argv[1:]),
        "prog": "python eval.py",
        "description": "Commands on finished runs: tables, figures, post-hoc methods.",
    }
    return exit_code(lambda: app.cli(**arguments, config=COMMAND_LINE))
