"""Tables against values computed by hand, in every format; broken results.json; runs that cannot
share a table.

Run them with `python -m pytest tests/commands/test_tables.py`.
"""

import csv
import io
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from support.errors import InputError
from support.report import tables
from support.report.labels import describe_method


def write_run(
    folder: Path, method: str, seed: int, accuracies: dict[str, float], **more: object
) -> None:
    """Writes a results.json whose first split is the reference.

    ECE is accuracy / 2, the energy gap accuracy^2.
    """

    def splits(accuracies: dict[str, float]) -> dict[str, dict[str, object]]:
        return {
            name: {
                "role": "shift" if index else "reference",
                "n": 10,
                "accuracy": a,
                "ece": a / 2,
                "nll": 1 - a,
                "energy_gap": a**2,
            }
            for index, (name, a) in enumerate(accuracies.items())
        }

    folder.mkdir(parents=True)
    content = {
        "method": method,
        **describe_method(method),
        "model": "ViT-B/16",
        "data": "domainnet",
        "seed": seed,
        "settings": {},
        "content": {},
        "splits": splits(accuracies),
        "zero_shot": splits(dict.fromkeys(accuracies, 0.5)),
    } | more
    (folder / "results.json").write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    write_run(tmp_path / "ft/seed-0", "ft", 0, {"photo": 0.8, "art": 0.3, "sketch": 0.1})
    write_run(tmp_path / "ft/seed-1", "ft", 1, {"photo": 0.9, "art": 0.5, "sketch": 0.1})
    write_run(tmp_path / "lipsum/seed-0", "lipsum", 0, {"photo": 0.85, "art": 0.6, "sketch": 0.4})
    return tmp_path


def test_table_matches_hand_computed_values(runs: Path) -> None:
    results = tables.read_results([runs])
    text = tables.render(tables.tabulate(results, "accuracy"), "text").splitlines()
    deviation = 100 * 0.1 / math.sqrt(2)
    assert [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text] == [
        ["accuracy, %", "photo", "art", "sketch", "mean of shifts"],
        ["-" * len(text[0])],
        ["zero-shot", "50.0", "50.0", "50.0", "50.0"],
        [
            "FT",
            f"85.0 ± {deviation:.1f}",
            f"40.0 ± {2 * deviation:.1f}",
            "10.0 ± 0.0",
            f"25.0 ± {deviation:.1f}",
        ],
        ["Lipsum-FT", "85.0", "60.0", "40.0", "50.0"],
    ]
    assert len({len(line) for line in text}) == 1
    assert "0.150 ± 0.071" in tables.render(tables.tabulate(results, "nll"), "text")
    assert "42.5 ± 3.5" in tables.render(tables.tabulate(results, "ece"), "text")
    with pytest.raises(InputError, match="has no harmonic-mean"):
        tables.tabulate(results, "harmonic-mean")


def test_best_of_each_column_is_bold(runs: Path) -> None:
    """The highest accuracy and the lowest ECE are bold; equal numbers are all bold; zero-shot never
    is.
    """
    results = tables.read_results([runs])
    markdown = tables.render(tables.tabulate(results, "accuracy"), "markdown").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown]
    assert cells[1] == ["---", "---:", "---:", "---:", "---:"]
    assert [cell.startswith("**") for cell in cells[3]] == [False, True, False, False, False]
    assert cells[4] == ["Lipsum-FT", "**85.0**", "**60.0**", "**40.0**", "**50.0**"]
    latex = tables.render(tables.tabulate(results, "ece"), "latex").splitlines()
    assert latex[0] == r"\begin{tabular}{lrrrr}" and r"ECE, \%" in latex[2]
    assert latex[5].split("&")[2].strip() == r"\textbf{20.0 $\pm$ 7.1}"
    bold = tables.render(tables.tabulate(results, "accuracy"), "text", bold=True)
    plain = tables.render(tables.tabulate(results, "accuracy"), "text")
    assert (
        bold.count("\033[1m") == 5 and bold.replace("\033[1m", "").replace("\033[0m", "") == plain
    )


def test_csv_is_unrounded(runs: Path) -> None:
    table = tables.tabulate(tables.read_results([runs]), "accuracy")
    rows = list(csv.reader(io.StringIO(tables.render(table, "csv"))))
    assert rows[0][:3] == ["", "photo mean", "photo deviation"]
    np.testing.assert_allclose(
        [float(rows[2][3]), float(rows[2][4])], [0.4, 0.2 / math.sqrt(2)], rtol=1e-12
    )
    assert rows[3][1:3] == ["0.85", ""]


def test_each_value_of_a_swept_setting_has_its_own_row(tmp_path: Path) -> None:
    for rate, seed in itertools.product((0.2, 0.1), (0, 1)):
        settings = {"learning_rate": rate, "weight": 1.0}
        accuracies = {"photo": rate, "art": 0.5}
        write_run(tmp_path / f"{rate}-{seed}", "ft", seed, accuracies, settings=settings)
    settings = {"learning_rate": 0.2, "weight": 3.0}
    write_run(tmp_path / "kd", "kd", 0, {"photo": 0.5, "art": 0.5}, settings=settings)
    rows = tables.tabulate(tables.read_results([tmp_path]), "accuracy").rows
    assert list(rows) == ["zero-shot", "FT (learning rate 0.1)", "FT (learning rate 0.2)", "KD"]
    assert rows["FT (learning rate 0.2)"][0] == (0.2, 0.0)


def test_costs_match_hand_computed_values(tmp_path: Path) -> None:
    accuracies = {"photo": 0.5, "art": 0.5}
    more = {"settings": {"batch_size": 10}, "seconds": 9.0}
    for method, seconds in (("ft", 0.5), ("lipsum", 0.75), ("lp", None)):
        write_run(tmp_path / method, method, 0, accuracies, seconds_per_step=seconds, **more)
    table = tables.tabulate_costs(tables.read_results([tmp_path]))
    assert list(table.rows) == ["FT", "Lipsum-FT"]
    assert [cell.mean for cell in table.rows["Lipsum-FT"]] == [0.75, 1.5, 10 / 0.75, 9.0]
    with pytest.raises(InputError, match="give runs of twenty steps or more"):
        tables.tabulate_costs(tables.read_results([tmp_path / "lp"]))


def test_correlation_matches_its_definition(tmp_path: Path) -> None:
    """Accuracies of 0.1, 0.2 and 0.4, and 0.5 on the reference; energy gaps are the squared
    accuracies.
    """
    for seed, accuracy in enumerate((0.1, 0.2, 0.4)):
        write_run(tmp_path / str(seed), "ft", seed, {"photo": 0.5, "art": accuracy})
    results = tables.read_results([tmp_path])
    relative, gaps = np.array([0.2, 0.4, 0.8]), np.array([0.01, 0.04, 0.16])
    deviations = [values - values.mean() for values in (relative, gaps)]
    expected = deviations[0] @ deviations[1] / math.prod(np.linalg.norm(deviations, axis=1))
    found = tables.correlate(results, "art", "energy_gap")
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert tables.correlate(results[:2], "art", "energy_gap") is None
    assert tables.correlate(results, "art", "distortion") is None


@pytest.mark.parametrize(
    ("more", "accuracies", "message"),
    [
        (
            {},
            {"photo": 0.8, "clipart": 0.3},
            r"has splits art \(10 images\), photo .*has clipart .*photo",
        ),
        (
            {"data": "minidomain"},
            {"photo": 0.8, "art": 0.3},
            "has data set domainnet, .* has minidomain",
        ),
        ({}, {"art": 0.8, "photo": 0.3}, "has reference photo, .* has art"),
        ({}, {"photo": 0.8, "art": 0.3}, "a/results.json and .*b/results.json are the same run"),
    ],
)
def test_incomparable_runs_raise_an_error_that_names_them(
    more, accuracies, message: str, tmp_path: Path
) -> None:
    write_run(tmp_path / "a", "ft", 0, {"photo": 0.8, "art": 0.3})
    write_run(tmp_path / "b", "ft", 0, accuracies, **more)
    with pytest.raises(InputError, match=message):
        tables.read_results([tmp_path])


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"method": "f', "cannot be read"), ("{}", "lacks method, label, row"), ("[1]", "lacks")],
)
def test_broken_results_are_skipped_with_a_warning(
    content: str, message: str, runs: Path, capsys
) -> None:
    broken = runs / "lipsum" / "seed-0" / "results.json"
    broken.write_text(content)
    assert [run["method"] for run in tables.read_results([runs])] == ["ft", "ft"]
    warning = capsys.readouterr().err
    assert (
        warning.startswith("warning: skipped: ") and str(broken) in warning and message in warning
    )
    with pytest.raises(InputError, match=r"no readable results\.json"):
        tables.read_results([runs / "lipsum"])
    with pytest.raises(InputError, match=r"holds no results\.json"):
        tables.read_results([runs / "nothing"])


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("ft", "FT"),
        ("mine", "mine"),
        ("lipsum+wise-0.9", "Lipsum-FT + WiSE 0.9"),
        ("ft+tpgm", "FT + TPGM"),
        ("kd+tpgm-c-0.5-mars", "KD + TPGM-C 0.5 mars"),
        ("ft,lipsum+soup", "FT, Lipsum-FT + soup"),
        ("ft+wise-0.5+tpgm", "FT + WiSE 0.5 + TPGM"),
    ],
)
def test_labels(method: str, label: str) -> None:
    assert describe_method(method)["label"] == label


def settings_of(model: str, checksum: int) -> dict[str, object]:
    """What a results.json has of the model and the prompts."""
    settings = {"model": model, "templates": "a {}.", "steps": 5}
    return {"settings": settings, "content": {"model": checksum, "templates": 3}}


def rows_of(folder: Path) -> list[str]:
    table = tables.tabulate(tables.read_results([folder]), "accuracy")
    return [f"{label}: {cells[0].mean:.2f}" for label, cells in table.rows.items()]


def test_the_same_weights_under_two_paths_are_one_model(tmp_path: Path) -> None:
    """Seeds from two machines make one row."""
    for seed, model in enumerate(("/home/a/clip.pt", "/data/b/model.safetensors")):
        accuracies = {"photo": 0.8 + seed / 10}
        write_run(tmp_path / str(seed), "ft", seed, accuracies, **settings_of(model, 1))
    assert rows_of(tmp_path) == ["zero-shot: 0.50", "FT: 0.85"]


def test_a_zero_shot_row_per_model(tmp_path: Path) -> None:
    """Other weights under the same name, too; a run by `--method zero-shot` adds no row."""
    for number, model in enumerate(("ViT-B/32", "/a/best", "/b/best")):
        given = settings_of(model, number)
        write_run(tmp_path / f"ft-{number}", "ft", 0, {"photo": 0.7 + number / 10}, **given)
    write_run(tmp_path / "zero-shot", "zero-shot", 0, {"photo": 0.5}, **settings_of("/a/best", 1))
    assert rows_of(tmp_path) == [
        "zero-shot (model ViT-B/32): 0.50",
        "zero-shot (model best): 0.50",
        "zero-shot (model best 00000002): 0.50",
        "FT (model ViT-B/32): 0.70",
        "FT (model best): 0.80",
        "FT (model best 00000002): 0.90",
    ]


def test_the_mean_of_all_splits_is_that_of_table_10(tmp_path: Path, capsys) -> None:
    """FT on paintings in the paper: 60.4, its columns' mean 60.42; below it, the paper's values."""
    accuracies = {"painting": 0.798, "real": 0.742, "clipart": 0.609, "infograph": 0.387}
    write_run(tmp_path / "ft", "ft", 0, accuracies | {"sketch": 0.485})
    tables.table_command((tmp_path,), average_of="all", paper="table-10/painting")
    ours, papers = (text.splitlines() for text in capsys.readouterr().out.split("\n\n"))
    assert ours[0].split("  ")[-1] == papers[0].split("  ")[-1] == "mean of all"
    assert ours[-1].split()[-2:] == papers[-1].split()[-2:] == ["55.6", "60.4"]
    assert papers[0].startswith("the paper's table 10: accuracy, %") and len(papers) == 3
    assert papers[-1].split()[:7] == ["FT", "79.8", "±", "0.0", "74.2", "±", "0.1"]
    assert papers[0].index("painting") < papers[0].index("real")
    with pytest.raises(InputError, match="unknown table of the paper 'table-10': did you mean"):
        tables.table_command((tmp_path,), paper="table-10")
