"""Which processes a run joins, and which it does not wait for."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from support.run import processes

LOSS = {"heartbeat_timeout_seconds": 50}  # the loss of a process ends the others
SHELL_IN_SLURM = {
    "SLURM_JOB_ID": "42",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_STEP_NODELIST": "localhost",
}


@pytest.mark.parametrize(
    ("variables", "joined"),
    [
        ({}, [{}]),  # TPU pods are found by JAX; without one, it raises ValueError
        (SHELL_IN_SLURM, []),
        (SHELL_IN_SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, []),
        (
            SHELL_IN_SLURM | {"SLURM_STEP_NUM_TASKS": "2"},
            [{"cluster_detection_method": "slurm"} | LOSS],
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
            [{"cluster_detection_method": "ompi"} | LOSS],
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, [{}]),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, []),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "TPU_WORKER_HOSTNAMES": "a,b"}, [{}]),
    ],
)
def test_only_processes_that_were_started_together_meet(
    variables: dict,
    joined: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "TPU_WORKER")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    calls: list[dict] = []

    def initialize(**arguments: str) -> None:
        calls.append(arguments)
        if not arguments:
            raise ValueError("no cluster")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    processes.join_cluster()
    assert calls == joined
    assert ("waits up to five minutes" in capsys.readouterr().out) == any(joined)


# One of two processes fails: by bad input, by a fault, by other files, for lack of memory.
FAILS = """
import sys
import data, lipsum, train
from support import layouts
from support.errors import InputError

read, step = layouts.read, lipsum.training_step

def fail(kind):
    if kind == "unreadable":
        raise InputError("the list cannot be read: restore it")
    if kind == "fault":
        raise IndexError("of ours")

def other_images(*arguments):
    fail(sys.argv[1])
    found = read(*arguments)
    train = data.take(found.train, data.np.arange(20), "train")
    return data.Data(train, found.selection, found.reports)

def no_memory(*arguments):
    raise MemoryError

if sys.argv[-1] == "1":
    if sys.argv[1] == "memory":
        lipsum.training_step = no_memory
    else:
        layouts.read = other_images
sys.exit(train.command_line(sys.argv[2:]))
"""
FAILURES = {
    "unreadable": (2, "the list cannot be read: restore it"),
    "fault": (1, "of ours"),
    "files": (2, "process 1 finds other images than process 0"),
    "memory": (2, r"out of memory after a peak of \d+\.\d GiB: try --batch-size below 8"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_processes_fail_together(kind: str, model: Path, root: Path, tmp_path: Path) -> None:
    """Both end, within a minute of the failure, with the same code and a line that says why."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = f"--method ft --model {model} --data domainnet --data-root {root} --reference real"
    words += f" --steps 2 --batch-size 8 --workers 1 --out {tmp_path}/runs"
    words += f" --coordinator {address} --processes 2 --process"
    (tmp_path / "fails.py").write_text(FAILS)
    started = [
        subprocess.Popen(
            [sys.executable, tmp_path / "fails.py", kind, *words.split(), str(number)],
            env=os.environ | {"PYTHONPATH": str(Path(processes.__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    code, reason = FAILURES[kind]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in started]
    for errors, returned in ended:
        assert returned == code, errors
        assert re.search(reason, errors.splitlines()[-1]), errors
        assert "Traceback" not in errors or kind == "fault"
