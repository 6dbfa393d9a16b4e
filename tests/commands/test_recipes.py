"""The recipes of the paper's tables and figures: each line parses, and finds what it reads."""

import glob
import itertools
import shlex
import sys
from pathlib import Path

import pytest

import eval as evaluation
import train
from support.layouts import minidomain
from support.report import recipes, tables
from support.run import options

# What `eval.py` makes of a run, by its arguments.
SUFFIXES = {
    "wise": lambda given: [f"wise-{alpha}" for alpha in given["alphas"]],
    "tpgm": lambda given: [f"tpgm-c-{value}" for value in given.get("penalty", [])] or ["tpgm"],
    "soup": lambda given: ["soup"],
    "ensemble": lambda given: ["ensemble"],
}


def split_line(line: str) -> tuple[str, list[str], dict[str, list[str]]]:
    """Returns the program, its paths with wildcards resolved, and its options."""
    _, program, *words = shlex.split(line)
    values: dict[str, list[str]] = {"": []}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            values[name] = []
        else:
            values[name].append(word)
    paths = []
    for word in values.pop(""):
        found = sorted(glob.glob(word))
        assert found or "/" not in word, f"{line}: nothing is at {word}"
        paths += found or [word]
    return program, paths, values


@pytest.mark.parametrize("short", [False, True])
def test_lines_parse_and_find_their_runs(
    short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the paper's order, from an empty folder, with empty folders for the runs."""
    monkeypatch.chdir(tmp_path)
    for name in recipes.RECIPES:
        for line in recipes.commands(name, Path("some runs"), short):
            program, paths, given = split_line(line)
            if program == "train.py":
                command = options.parse(shlex.split(line)[2:])
                assert (command.protocol is None) == short
                folders = [run.folder for run in options.runs(command)]
                assert len(set(folders)) == len(folders)
                for folder in folders:
                    folder.mkdir(parents=True, exist_ok=True)
                assert "resume" in given  # runs are shared
                continue
            kind, *paths = paths
            assert kind in evaluation.COMMANDS | tables.COMMANDS
            assert paths
            for path, suffix in itertools.product(paths, SUFFIXES.get(kind, lambda _: [])(given)):
                run = Path(path)
                made = run.parents[1] / f"{run.parent.name}+{suffix}" / run.name
                made.mkdir(parents=True, exist_ok=True)


@pytest.fixture
def small_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded benchmark with few images, in a cache of its own."""
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(minidomain, "SIZES", {"train": 80, "val": 40, "test": 40})


def run_line(line: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a line in this process. Returns what it prints."""
    program, paths, given = split_line(line)
    words = [[f"--{name}", *values] for name, values in given.items()]
    arguments = [*paths, *itertools.chain(*words)]
    if program == "train.py":
        code = train.exit_code_of(options.parse(arguments))
    else:
        monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
        code = tables.run_command(evaluation.COMMANDS)
    captured = capsys.readouterr()
    assert code == 0, f"{line}: {captured.err}"
    return captured.out


def check_recipe(name: str, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    for line in recipes.commands(name, Path("runs"), short=True):
        printed = run_line(line, capsys, monkeypatch)
        kind = line.split()[2]
        if kind in ("table", "costs"):
            rows = printed.split("\n\n")[0].splitlines()[2:]
            folders = [path for path in split_line(line)[1] if path != kind]
            assert len(rows) >= len(folders)
        elif kind == "figures":
            assert ".png, .svg" in printed


@pytest.mark.parametrize("names", [("table-1", "table-2"), ("table-6",), ("table-11",)])
def test_recipes(names, small_benchmark, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for name in names:
        check_recipe(name, capsys, monkeypatch)


@pytest.mark.slow
def test_every_recipe(small_benchmark, tmp_path: Path, monkeypatch, capsys) -> None:
    """In the paper's order, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name in recipes.RECIPES:
        check_recipe(name, capsys, monkeypatch)
