"""The runs that a command makes, the defaults of data sets, and options in files."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
from helpers import changed

import lipsum
from support.errors import InputError
from support.run import checks, options
from support.run.options import Command


def test_runs_of_a_sweep(command: Command) -> None:
    """A run per value that the method reads, no two in one folder; a value said twice is one."""
    command = changed(
        command,
        method=("lp", "ft", "lipsum", "lipsum-exact"),
        seed=(0, 1),
        learning_rate=(1e-3, 3e-4, 0.001),
        num_texts=(4, 8),
        text_length=(3, 5),
    )
    folders = [str(plan.folder.relative_to(command.out)) for plan in options.runs(command)]
    # LP's result has no seed.
    assert len(set(folders)) == len(folders) == 1 + 2 * (2 + 2 * 2 * 2 + 2 * 2)
    assert folders[:4] == [
        "lp/seed-0",
        "ft/seed-0-learning-rate-0.001",
        "ft/seed-1-learning-rate-0.001",
        "ft/seed-0-learning-rate-0.0003",
    ]
    assert "lipsum/seed-1-learning-rate-0.0003-num-texts-8-text-length-5" in folders
    plan = next(
        plan
        for plan in options.runs(command)
        if "0.0003-num-texts-8-text-length-5" in str(plan.folder)
    )
    own = plan.settings
    assert (own.learning_rate, own.num_texts, own.text_length, plan.seed) == (3e-4, 8, 5, 0)
    one = changed(command, learning_rate=(1e-3,), num_texts=(4,), text_length=(3,))
    assert str(list(options.runs(one))[-1].folder) == str(command.out / "lipsum-exact" / "seed-1")


def test_defaults_follow_the_data_set() -> None:
    """What is said on the command line comes before the data set's defaults, which come before the
    paper's.
    """
    command = options.parse(["--data", "imagenet", "--batch-size", "128", "512", "--method", "ft"])
    assert command.settings.steps == 50_000 and command.sweep == {"batch_size": (128, 512)}
    assert [run.settings.batch_size for run in options.runs(command)] == [128, 512]
    assert command.sources.templates == "openai" and command.settings.learning_rate == 1e-5
    assert options.parse(["--data=minidomain"]).settings.augmentation == "off"
    with pytest.raises(InputError, match="unknown data set 'imagenett': did you mean imagenet"):
        options.parse(["--data", "imagenett"])


def test_the_paper_s_protocol_is_one_flag() -> None:
    """Section 5, appendix B and the authors' script; what the user gives beside it is named as not
    the paper's.
    """
    paper = ["--protocol", "paper", "--data"]
    command = options.parse([*paper, "domainnet", "--method", "ft"])
    (run,) = options.runs(command)
    assert (run.sources.reference, run.sources.shifts) == (
        "real",
        ("painting", "clipart", "infograph", "sketch"),
    )
    assert (run.sources.model, run.sources.templates, run.sources.select_on) == (
        "ViT-B/16",
        "openai",
        "test",
    )
    assert run.sources.keep_underscores
    settings = {
        "steps": 5_000,
        "batch_size": 256,
        "learning_rate": 1e-5,
        "warmup": 0.1,
        "eval_every": 1_000,
    }
    settings |= {
        "num_texts": 80,
        "text_length": 8,
        "augmentation": "crop",
        "guidance": None,
        "fixed_head": False,
    }
    assert {name: getattr(run.settings, name) for name in settings} == settings
    assert options.parse([*paper, "domainnet", "--model", "ViT-L/14"]).settings.batch_size == 128
    imagenet = options.parse([*paper, "imagenet", "--steps", "10", "--model=ViT-L/14"])
    assert imagenet.sources.shifts == ("imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch")
    assert imagenet.settings.batch_size == 128 and not imagenet.sources.keep_underscores
    first, second = options.describe_protocol(imagenet).split("\n")
    assert (
        first.startswith("protocol paper: ")
        and "--templates openai" in first
        and "--select-on test" in first
    )
    assert "--model ViT-L/14" in first and second == "not the paper's: --steps 10 instead of 50000"
    assert options.parse(["--data", "domainnet"]).sources.select_on == "val"
    with pytest.raises(
        InputError, match="--protocol paper is for --data domainnet, imagenet, cub, not minidomain"
    ):
        options.parse(["--protocol", "paper"])


def test_ema_averages_the_same_share_of_every_run() -> None:
    """At the end, theta_0 has the share `d^T` of the average, which tends to exp(-1 / 0.8)."""
    command = changed(
        options.DEFAULTS["minidomain"], method=("ema", "ft"), steps=(1, 250, 5_000, 50_000)
    )
    decays = {
        run.settings.steps: run.settings.decay
        for run in options.runs(command)
        if run.method == "ema"
    }
    assert decays == {1: 0.0, 250: 0.995, 5_000: 0.99975, 50_000: 0.999975}
    for steps in (5_000, 50_000):
        assert decays[steps] ** steps == pytest.approx(math.exp(-1.25), rel=1e-3)
    given = changed(command, decay=(0.5,))
    assert {run.settings.decay for run in options.runs(given)} == {0.5}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": ("lipsum", "ft"), "num_texts": (3,), "learning_rate": (1e-4,)}, []),
        (
            {"method": ("ft", "lp"), "temperature": (2.0,)},
            ["--temperature 2.0 has no effect on ft lp"],
        ),
        (
            {"method": ("lipsum-exact",), "num_texts": (3, 4), "text_length": (4,)},
            ["--num-texts 3 4 has no effect on lipsum-exact"],
        ),
        (
            {"method": ("car-ft",), "guidance": Path("texts")},
            ["--guidance texts has no effect on car-ft"],
        ),
        ({"method": ("lipsum", "ft"), "weight": (0.0, 1.0)}, ["lipsum with --weight 0 is ft"]),
        (
            {"method": ("ft", "lp"), "learning_rate": (0.0,)},
            ["ft with --learning-rate 0 stays as it starts"],
        ),
        ({"method": ("ema",), "decay": (0.0, 0.9), "seed": (0, 1)}, ["ema with --decay 0 is ft"]),
        (
            {"method": ("ema",), "decay": (0.9999,), "steps": (100,)},
            [
                "ema with --decay 0.9999 and --steps 100 averages 99% of the zero-shot model: "
                "give a smaller decay"
            ],
        ),
        ({"method": ("ema",), "unseen": ("dog",), "fixed_head": True}, []),
    ],
)
def test_what_has_no_effect_is_said(changes: dict[str, object], expected: list[str]) -> None:
    command = changed(options.DEFAULTS["minidomain"], **changes)
    found = checks.warnings_for_options(command, options.runs(command))
    assert list(dict.fromkeys(found)) == expected


def test_options_survive_a_file(tmp_path: Path) -> None:
    """Groups are equal after JSON."""
    command = changed(
        options.DEFAULTS["domainnet"],
        data_root=tmp_path,
        reference=("real",),
        shifts=("sketch",),
        unseen=("dog",),
        guidance=tmp_path / "texts.txt",
        fsdp=True,
    )
    (run,) = options.runs(command)
    saved = json.loads(json.dumps(options.to_json(run.sources, run.settings, run.execution)))
    assert options.from_json(options.Sources, saved) == run.sources
    assert vars(options.from_json(lipsum.Settings, saved)) == vars(run.settings)
    assert options.from_json(options.Execution, saved) == run.execution


def test_settings_and_sources_may_not_change_and_execution_may() -> None:
    command = changed(options.DEFAULTS["domainnet"], method=("ema",), reference="real", decay=0.9)
    (run,) = options.runs(command)
    saved = options.to_json(run.sources, run.settings)
    (other,) = options.runs(changed(command, remat=True, precision="bfloat16", workers=7))
    assert not list(checks.changed_settings(other, saved))
    (other,) = options.runs(changed(command, decay=0.5, model="other"))
    changes = list(checks.changed_settings(other, saved))
    assert changes == ["--model tiny, now other", "--decay 0.9, now 0.5"]


@pytest.mark.parametrize("after", [[], ["--steps", "3"]])
def test_a_list_without_values_is_not_the_default(after: list[str]) -> None:
    with pytest.raises(
        InputError, match="--shifts has no value: give one or more, or leave it out"
    ):
        options.parse(["--shifts", *after])


def test_files_may_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are absolute in config.json.

    A run goes on where data and models lie elsewhere, if the names stay.
    """
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        for name in ("clip.pt", "b.pt"):
            (tmp_path / place / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path / "here")
    command = changed(
        options.DEFAULTS["domainnet"],
        reference=("real",),
        model="clip.pt",
        templates="a {}.",
        data_root=Path("set"),
    )
    (run,) = options.runs(options.resolved(command))
    assert (run.sources.model, run.execution.data_root) == (
        str(tmp_path / "here/clip.pt"),
        tmp_path / "here/set",
    )
    for name in ("tiny", "openai"):  # names, whatever lies in the working folder
        (tmp_path / "here" / name).mkdir()
        named = options.Sources(model=name, templates=name)
        assert options.absolute(named) == named
    saved = options.to_json(run.sources, run.settings)
    monkeypatch.chdir(tmp_path / "there")
    (moved,) = options.runs(options.resolved(changed(command, data_root=Path("other"))))
    assert moved.sources.model == str(tmp_path / "there/clip.pt")
    assert not list(checks.changed_settings(moved, saved))
    (other,) = options.runs(options.resolved(changed(command, model="b.pt")))
    assert list(checks.changed_settings(other, saved)) == ["--model clip.pt, now b.pt"]


def test_several_values_make_a_sweep() -> None:
    """Of any setting, in either spelling; the last of repeated options counts."""
    words = ["--weight", "0.3", "1", "--learning_rate", "1e-3", "1e-4", "--steps=7", "--seed", "0"]
    command = options.parse(
        [*words, "--steps", "3", "--steps", "5", "--reference", "real", "sketch"]
    )
    assert command.sweep == {
        "learning_rate": (1e-3, 1e-4),
        "weight": (0.3, 1.0),
        "reference": ("real", "sketch"),
    }
    assert command.settings.steps == 5 and command.seed == (0,)


def test_settings_that_a_method_does_not_read_make_no_runs() -> None:
    command = changed(
        options.DEFAULTS["minidomain"],
        method=("ft", "ema", "car-ft"),
        temperature=(1.0, 2.0),
        decay=(0.5, 0.9),
    )
    assert [str(run.folder.relative_to("runs")) for run in options.runs(command)] == [
        "ft/seed-0",
        "ema/seed-0-decay-0.5",
        "ema/seed-0-decay-0.9",
        "car-ft/seed-0-temperature-1.0",
        "car-ft/seed-0-temperature-2.0",
    ]


@pytest.mark.parametrize("data_set", options.DEFAULTS)
def test_help_is_tidy(
    data_set: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every default is shown, and a line ends only where the next word does not fit."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        options.parse(["--data", data_set, "--help"])
    text = capsys.readouterr().out
    assert "(default: )" not in text
    found = [re.fullmatch(r"[│ ] {12,}([^│ ].*?)[│ ]*", line) for line in text.splitlines()]
    width = max(len(line[1]) for line in found if line)
    for line, following in itertools.pairwise(found):
        if line and following:
            assert len(line[1]) + 1 + len(following[1].split()[0]) > width, line[1]
