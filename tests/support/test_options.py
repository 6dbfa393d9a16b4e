"""The runs that a command makes, the defaults of data sets, and options in files."""

import itertools
import json
import re
from pathlib import Path

import pytest
from helpers import changed

import lipsum
from support import options
from support.errors import InputError
from support.options import Command


def test_runs_of_a_sweep(command: Command) -> None:
    """A run for each value that the method reads, no two in one folder; a value said twice is one."""
    command = changed(
        command,
        method=("lp", "ft", "lipsum", "lipsum-exact"),
        seed=(0, 1),
        learning_rate=(1e-3, 3e-4, 0.001),
        num_texts=(4, 8),
        text_length=(3, 5),
    )
    folders = [str(plan.folder.relative_to(command.out)) for plan in options.runs(command)]
    assert len(set(folders)) == len(folders) == 2 * (1 + 2 + 2 * 2 * 2 + 2 * 2)
    assert folders[:4] == [
        "lp/seed-0",
        "lp/seed-1",
        "ft/seed-0-learning-rate-0.001",
        "ft/seed-1-learning-rate-0.001",
    ]
    assert "lipsum/seed-1-learning-rate-0.0003-num-texts-8-text-length-5" in folders
    plan = next(plan for plan in options.runs(command) if "0.0003-num-texts-8-text-length-5" in str(plan.folder))
    own = plan.settings
    assert (own.learning_rate, own.num_texts, own.text_length, plan.seed) == (3e-4, 8, 5, 0)
    one = changed(command, learning_rate=(1e-3,), num_texts=(4,), text_length=(3,))
    assert str(list(options.runs(one))[-1].folder) == str(command.out / "lipsum-exact" / "seed-1")


def test_defaults_follow_the_data_set() -> None:
    """What is said on the command line comes before the data set's defaults, which come before the paper's."""
    command = options.parse(["--data", "imagenet", "--batch-size", "128", "512", "--method", "ft"])
    assert command.settings.steps == (50_000,) and command.settings.batch_size == (128, 512)
    assert command.sources.templates == "openai" and command.settings.learning_rate == (1e-5,)
    assert options.parse(["--data=minidomain"]).settings.augmentation == "off"
    with pytest.raises(InputError, match="unknown data set 'imagenett': did you mean imagenet"):
        options.parse(["--data", "imagenett"])


def test_options_survive_a_file(tmp_path: Path) -> None:
    """Boxes are equal after `flat` and JSON; options that a file lacks have their defaults."""
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
    saved = json.loads(json.dumps(options.flat(run.sources, run.settings, run.execution)))
    assert options.restored(options.Sources, saved) == run.sources
    assert vars(options.restored(lipsum.Settings, saved)) == vars(run.settings)
    assert options.restored(options.Execution, saved) == run.execution
    assert options.restored(options.Sources, {}) == options.Sources()


def test_settings_and_sources_may_not_change_and_execution_may() -> None:
    command = changed(options.DEFAULTS["domainnet"], reference=("real",))
    (run,) = options.runs(command)
    config = {"settings": options.flat(run.sources, run.settings)}
    (other,) = options.runs(changed(command, remat=True, precision="bfloat16", workers=7))
    options.check_unchanged(other, Path("run"), config)
    (other,) = options.runs(changed(command, decay=(0.5,), model="other"))
    with pytest.raises(InputError, match=r"\(--model tiny, now other, --decay 0.995, now 0.5\): give the same ones"):
        options.check_unchanged(other, Path("run"), config)


def test_settings_that_a_method_does_not_read_make_no_runs() -> None:
    command = changed(
        options.DEFAULTS["minidomain"], method=("ft", "ema", "car-ft"), temperature=(1.0, 2.0), decay=(0.5, 0.9)
    )
    assert [str(run.folder.relative_to("runs")) for run in options.runs(command)] == [
        "ft/seed-0",
        "ema/seed-0-decay-0.5",
        "ema/seed-0-decay-0.9",
        "car-ft/seed-0-temperature-1.0",
        "car-ft/seed-0-temperature-2.0",
    ]


@pytest.mark.parametrize("data_set", options.DEFAULTS)
def test_help_is_tidy(data_set: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every default is shown, and a line ends only where the next word does not fit."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        options.parse(["--data", data_set, "--help"])
    text = capsys.readouterr().out
    assert "(default: )" not in text and "(default: None)" not in text
    found = [re.fullmatch(r"[│ ] {21}(\S.*?)[│ ]*", line) for line in text.splitlines()]
    width = max(len(line[1]) for line in found if line)
    for line, following in itertools.pairwise(found):
        if line and following:
            assert len(line[1]) + 1 + len(following[1].split()[0]) > width, line[1]
