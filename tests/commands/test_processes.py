"""Which processes a run joins, and which it does not wait for."""

import os

import jax
import pytest

from support.run import processes

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
        (SHELL_IN_SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, [{"cluster_detection_method": "slurm"}]),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"},
            [{"cluster_detection_method": "ompi"}],
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
