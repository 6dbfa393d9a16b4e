"""Runs that are stopped, killed, out of disk space or in conflict, and how they resume."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scaling
from helpers import changed, tiny_command

import eval as evaluation
import lipsum
import train
from support import devices, disk, errors, weights
from support.run import setup
from support.run.checkpoints import Checkpoint, Checkpoints, read_checkpoint
from support.run.finished import delete_run
from support.run.options import Command


@pytest.fixture(scope="module")
def unbroken(model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of `command`."""
    out = tmp_path_factory.mktemp("unbroken")
    train.main(tiny_command(model, root, out))
    return out / "lipsum" / "seed-0"


@pytest.fixture
def folder(command: Command) -> Path:
    """The folder of the run of `command`."""
    return command.out / "lipsum" / "seed-0"


def best_of(folder: Path) -> bytes:
    return (folder / "best" / "model.safetensors").read_bytes()


def test_interrupted_run_resumes_to_the_same_bits(
    command: Command, folder: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = lipsum.training_step(lipsum.METHODS["lipsum"])

    def breaks(state, *rest):
        if int(state.step) == 4:  # a checkpoint was made at step 4
            raise KeyboardInterrupt
        return step(state, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(lipsum, "training_step", lambda *_: breaks)
        train.main(command)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write('{"step": 5, "lo')  # what a kill may leave
    assert not (folder / "results.json").exists()
    newest = Checkpoints.newest

    def an_hour_later(checkpoints: Checkpoints) -> Checkpoint:
        found = newest(checkpoints)
        return found._replace(progress=found.progress | {"seconds": 3600.0})

    monkeypatch.setattr(Checkpoints, "newest", an_hour_later)
    train.main(changed(command, resume=True))
    assert json.loads((folder / "results.json").read_text())["seconds"] > 3600
    contents = []
    for each in (unbroken, folder):
        losses = [
            json.loads(line)["loss"] for line in (each / "metrics.jsonl").read_text().splitlines()
        ]
        results = json.loads((each / "results.json").read_text())["splits"]
        contents.append((best_of(each), losses, results))
    assert contents[0] == contents[1]


def test_checksum_of_weights_is_that_in_files_of_earlier_versions() -> None:
    assert setup.checksum(weights.load("tiny")[0]) == 1333880499


def test_resume_keeps_finished_runs_and_refuses_other_settings(
    command: Command, folder: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    shutil.copytree(unbroken, folder)
    before = (folder / "results.json").stat().st_mtime_ns
    train.main(changed(command, resume=True))
    assert "is finished: kept" in capsys.readouterr().out
    assert (folder / "results.json").stat().st_mtime_ns == before
    (folder / "results.json").unlink()
    assert errors.exit_code(lambda: train.main(changed(command, resume=True, weight=(2.0,)))) == 2
    assert "made with other settings (--weight 1.0, now 2.0)" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"content": config["content"] | {"class_names": 0}})
    )
    assert errors.exit_code(lambda: train.main(changed(command, resume=True))) == 2
    assert "was made with other classes" in capsys.readouterr().err
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder / "checkpoint").iterdir():
        path.write_bytes(b"{}\n")
    assert errors.exit_code(lambda: train.main(changed(command, resume=True))) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    train.main(changed(command, overwrite=True))
    assert (folder / "results.json").exists()


def test_resume_skips_a_damaged_checkpoint(
    command: Command, folder: Path, unbroken: Path, capsys
) -> None:
    """The run resumes from the one before, and ends with the same bits."""
    shutil.copytree(unbroken, folder)
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == [
        "step-4.safetensors",
        "step-6.safetensors",
    ]
    (folder / "results.json").unlink()
    shutil.rmtree(folder / "best")
    newest = folder / "checkpoint" / "step-6.safetensors"
    newest.write_bytes(
        newest.read_bytes()[:-100] + bytes(100)
    )  # of the right size, with a right header
    train.main(changed(command, resume=True))
    printed = capsys.readouterr()
    assert (
        f"checkpoint {newest} is damaged (its content has changed" in printed.err
        and "from step 4" in printed.out
    )
    assert best_of(folder) == best_of(unbroken)
    assert read_checkpoint(newest).progress["step"] == 6


# ----------------------------------------------------------------------------- killed, full, locked


def test_a_signal_saves_after_the_step_and_prints_how_to_continue(
    command: Command, folder: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    step = lipsum.training_step(lipsum.METHODS["lipsum"])
    handler = signal.getsignal(
        signal.SIGINT
    )  # that of Python, or none in a command started with nohup

    def signalled(state, *rest):
        if int(state.step) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(state, *rest)

    monkeypatch.setattr(sys, "argv", ["train.py", "--overwrite", "--model", "a b"])
    with monkeypatch.context() as patched:
        patched.setattr(lipsum, "training_step", lambda *_: signalled)
        assert train.exit_code_of(changed(command, overwrite=True)) == 130
    output = capsys.readouterr().out
    assert "stopped by SIGINT; to go on:\n  python train.py --model 'a b' --resume\n" in output
    assert read_checkpoint(folder / "checkpoint/step-3.safetensors").progress["step"] == 3
    train.main(changed(command, resume=True))
    assert "going on from step 3" in capsys.readouterr().out
    assert best_of(folder) == best_of(unbroken)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_signal_in_an_evaluation_acts_at_once(
    command: Command, folder: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run resumes with that evaluation. A second signal does not wait for a step."""
    accuracy = evaluation.selection_accuracy

    def interrupted(*_):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal did not act")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "selection_accuracy", interrupted)
        assert train.exit_code_of(command) == 143
    evaluated = []

    def recorded(*arguments):
        evaluated.append(accuracy(*arguments))
        return evaluated[-1]

    monkeypatch.setattr(evaluation, "selection_accuracy", recorded)
    train.main(changed(command, resume=True))
    assert len(evaluated) == 3
    one, other = (json.loads((each / "results.json").read_text()) for each in (unbroken, folder))
    assert one["selection"] == other["selection"] and one["splits"] == other["splits"]

    signals = train.Signals()
    with signals.heard(), signals.deferred():
        signal.raise_signal(signal.SIGINT)
        assert signals.received(devices.device_mesh(8), waits=False) == signal.SIGINT
        with pytest.raises(train.Stopped):
            signal.raise_signal(signal.SIGINT)


def test_a_lost_terminal_saves_unless_it_is_to_be_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with train.Signals().heard(), pytest.raises(train.Stopped):
            signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by nohup
        with train.Signals().heard():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("last", [5, 6])  # a checkpoint would be made after step 6
def test_a_loss_that_is_not_finite_is_an_error_and_keeps_checkpoints(
    last: int, command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    step = lipsum.training_step(lipsum.METHODS["lipsum"])

    def breaks(state, *rest):
        broken = int(state.step) == last - 1
        state, metrics = step(state, *rest)
        return state, metrics | ({"gradient_norm": jnp.float32(jnp.inf)} if broken else {})

    monkeypatch.setattr(lipsum, "training_step", lambda *_: breaks)
    assert errors.exit_code(lambda: train.main(command)) == 2
    error = capsys.readouterr().err
    assert f"at step {last} the loss is" in error
    assert "the gradient's norm inf" in error and "lower --learning-rate" in error
    assert f"{folder} keeps what was saved before" in error
    assert read_checkpoint(folder / "checkpoint/step-4.safetensors").progress["step"] == 4
    assert not (folder / "checkpoint/step-6.safetensors").exists()


def test_two_runs_on_one_folder(command: Command, folder: Path, capsys) -> None:
    """The second is refused before it loads anything. No lock file remains."""
    with disk.locked(folder):
        assert errors.exit_code(lambda: train.main(changed(command, model="missing.pt"))) == 2
        assert f"another process writes to {folder}: wait until it ends" in capsys.readouterr().err
    train.main(command)
    assert [path.name for path in command.out.rglob(".*")] == []


def test_a_full_disk_is_an_error_and_the_run_resumes(
    command: Command, folder: Path, unbroken: Path, capsys
) -> None:
    """A limit on file sizes simulates it. No partial file remains, and the run resumes later."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert errors.exit_code(lambda: train.main(command)) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert (
        f"error: {folder / 'checkpoint/step-2.safetensors'} cannot be written" in error
        and "too large" in error
    )
    assert not list(folder.rglob("*.new"))
    train.main(changed(command, resume=True))
    assert best_of(folder) == best_of(unbroken)


# ----------------------------------------------------------------------------------------- watching


def test_tensorboard_and_profile(command: Command) -> None:
    """TensorBoard's files contain the numbers of metrics.jsonl, also after --resume; a trace is
    written.
    """
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    command = changed(
        command, method=("ft",), tensorboard=True, profile=True, steps=(20,), eval_every=20
    )
    train.main(command)
    folder = command.out / "ft" / "seed-0"
    (folder / "results.json").unlink()
    (folder / "checkpoint/step-20.safetensors").unlink()
    train.main(changed(command, resume=True, profile=False))
    logged = {
        line["step"]: line
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    }
    for path in sorted((folder / "tensorboard").iterdir()):
        content, shown = path.read_bytes(), {}
        while content:  # records: length, its check sum, the event, its check sum
            size = int.from_bytes(content[:8], "little")
            event, content = (
                event_pb2.Event.FromString(content[12 : 12 + size]),
                content[16 + size :],
            )
            shown |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
        assert {step for step, name in shown if name == "loss"} == {1, 10, 20}
    for (step, name), value in shown.items():
        if name != "selection_accuracy":
            np.testing.assert_allclose(value, logged[step][name], rtol=1e-6)
    assert (20, "selection_accuracy") in shown
    (trace,) = folder.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    assert trace.stat().st_size > 0
    delete_run(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile": True}, "--profile traces up to step 20, --steps is 6"),
        ({"accumulate": 0}, "--accumulate is 0: give at least 1"),
        (
            {"accumulate": 2, "batch_size": (24,)},
            "--batch-size 24 does not divide among 8 devices times --accumulate 2",
        ),
        ({"checkpoint_every": 0}, "--checkpoint-every is 0"),
    ],
)
def test_bad_input(changes: dict[str, object], message: str, command: Command) -> None:
    with pytest.raises(errors.InputError, match=message):
        train.main(changed(command, **changes))
    assert not command.out.exists()


def test_tensorboard_needs_its_extra(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(errors.InputError, match=r"pip install '\.\[tensorboard\]'"):
        train.main(changed(command, tensorboard=True))


# -------------------------------------------------------------------------------- several processes


def test_a_run_of_two_processes_resumes_in_one(command: Command, tmp_path: Path) -> None:
    """One of two processes gets a signal: both end after the same step.

    One process continues to the same numbers.
    """
    said = [
        *(
            "--model",
            command.sources.model,
            "--data",
            "domainnet",
            "--data-root",
            str(command.execution.data_root),
            "--templates",
            command.sources.templates,
            "--reference",
            "real",
        ),
        *(
            "--steps",
            "30",
            "--batch-size",
            "8",
            "--learning-rate",
            "1e-4",
            "--num-texts",
            "4",
            "--text-length",
            "3",
        ),
        *("--eval-every", "30", "--workers", "1", "--fsdp", "--out", str(tmp_path / "two")),
        *("--coordinator", scaling.free_address(), "--processes", "2"),
    ]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    # The model is too small for --fsdp otherwise.
    program = (
        "import runpy; from support import devices; devices.SMALLEST_SPLIT = 1; "
        "runpy.run_path('train.py', run_name='__main__')"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, *said, "--process", str(number)],
            cwd=Path(train.__file__).parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    folder = tmp_path / "two" / "lipsum" / "seed-0"
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert both[1].poll() is None, both[1].stderr.read()
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [143, 143], outputs
    assert "2 process(es), mesh data=4" in outputs[0][0] and "stopped by SIGTERM" in outputs[0][0]
    assert "parameters spread over them" in outputs[0][0]
    assert (
        outputs[1][0].count("\n") == 1 and "process 1 of 2 at 127.0.0.1" in outputs[1][0]
    )  # and nothing of the run
    assert "step/s" not in outputs[1][1]
    (checkpoint,) = (folder / "checkpoint").iterdir()
    assert 1 < read_checkpoint(checkpoint).progress["step"] < 30

    one = changed(command, steps=(30,), eval_every=30, learning_rate=(1e-4,))
    train.main(changed(one, out=tmp_path / "two", resume=True))
    train.main(changed(one, out=tmp_path / "one"))
    found = []
    for name in ("two", "one"):
        lines = (tmp_path / name / "lipsum/seed-0/metrics.jsonl").read_text().splitlines()
        found.append([json.loads(line) for line in lines])
        assert [line["step"] for line in found[-1]] == [1, 10, 20, 30]
    for two, alone in zip(*found, strict=True):
        np.testing.assert_allclose(
            two["loss"], alone["loss"], rtol=1e-5 if two["step"] <= 10 else 1e-3
        )


def test_processes_are_checked(command: Command) -> None:
    """Wrong flags are refused before any process is waited for."""
    for changes, message in (
        ({"processes": 2}, "--processes and --process go together: give all three"),
        ({"coordinator": "a:1", "processes": 2}, "go together: give all three"),
        (
            {"coordinator": "a:1", "processes": 2, "process": 2},
            "--process is 2 of --processes 2: number them from 0 to 1",
        ),
        (
            {"coordinator": "a", "processes": 2, "process": 1},
            "--coordinator is 'a': give HOST:PORT",
        ),
    ):
        with pytest.raises(errors.InputError, match=message):
            train.connect(changed(command, **changes).cluster)
