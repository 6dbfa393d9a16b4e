"""The processes that share one run: how they connect, what they exchange, and the signals that stop them.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --coordinator HOST:PORT --processes 2 --process 0`
uses it.
"""

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import Mesh
from jaxtyping import Array, Int

from support import errors
from support.devices import all_devices, is_main_process, shard_batch
from support.errors import InputError, flag
from support.run.options import Cluster, Command


def connect(cluster: Cluster) -> None:
    """Connects the processes given by the flags, else those that a scheduler or a TPU pod started together.

    Must come before anything else uses the devices. Only process 0 prints. Raises InputError for wrong flags.
    """
    given = [name for name, value in vars(cluster).items() if value is not None]
    if given:
        for name in vars(cluster):
            if name not in given:
                raise InputError(
                    f"{flag(given[0])} needs {flag(name)}: give --coordinator, --processes and --process"
                )
        assert (
            cluster.coordinator is not None
            and cluster.processes is not None
            and cluster.process is not None
        )
        if cluster.processes < 1 or not 0 <= cluster.process < cluster.processes:
            raise InputError(
                f"--process is {cluster.process} of --processes {cluster.processes}: number them from 0 to "
                f"{max(cluster.processes, 1) - 1}"
            )
        host, _, port = cluster.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(
                f"--coordinator is {cluster.coordinator!r}: give HOST:PORT, such as 10.0.0.1:1234"
            )
        name = f"process {cluster.process} of {cluster.processes}"
        print(
            f"{name}: waits up to five minutes for all to meet at {cluster.coordinator}", flush=True
        )
        jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process)
    else:
        join_cluster()
    all_devices()  # raises, if there are none, what the user can read
    errors.shows_warnings = is_main_process()
    if not is_main_process():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # silences libraries, too


# Per scheduler that JAX knows, the variables that it sets for each process it starts: their number, this one's number.
SCHEDULERS = {
    "slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


def join_cluster() -> None:
    """Joins the processes that a scheduler started beside this one, or those of a TPU pod; else it stays alone.

    A shell inside a job, or a Kubernetes pod, has some variables of a cluster, but nobody to wait for.
    """
    for scheduler, (count, number) in SCHEDULERS.items():
        if os.environ.get(count, "1") != "1":
            name = f"process {os.environ.get(number)} of the {os.environ[count]} that {scheduler} started"
            print(f"{name}: waits up to five minutes for the others", flush=True)
            jax.distributed.initialize(cluster_detection_method=scheduler)
            return
    in_job = "SLURM_JOB_ID" in os.environ or "KUBERNETES_SERVICE_HOST" in os.environ
    if not in_job or "TPU_WORKER_HOSTNAMES" in os.environ:
        with contextlib.suppress(ValueError):  # no TPU pod: one process
            jax.distributed.initialize()


def check_processes(command: Command) -> None:
    """Raises InputError if the processes of one run were given different options."""
    execution = dataclasses.replace(command.execution, workers=0)
    own = repr(dataclasses.replace(command, execution=execution, cluster=Cluster()))
    if any(other != own for other in gathered(own)):
        raise InputError(
            "the processes have different options: give each the same command except for --process"
        )


def gathered(content: Any) -> list[Any]:
    """Returns, in every process, the content that each process gives, as JSON."""
    own = np.frombuffer(json.dumps(content).encode(), np.uint8)
    lengths = process_allgather(np.int32(len(own)))
    rows = process_allgather(np.resize(own, np.max(lengths)))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def from_writer(make: Callable[[], Any]) -> Any:
    """Calls `make` in process 0 and returns its value, as JSON, in every process. Also passes on its InputError."""
    if jax.process_count() == 1:
        return make()
    answer: dict[str, Any] = {}
    if is_main_process():
        try:
            answer = {"value": make()}
        except InputError as error:
            answer = {"error": str(error)}
    answer = gathered(answer)[0]
    if "error" in answer:
        raise InputError(answer["error"])
    return answer["value"]


def broadcast(tree: Any) -> Any:
    """Returns the host arrays of process 0, bit by bit, in every process. The others give arrays of the same shapes."""

    def send(leaf: np.ndarray) -> np.ndarray:
        content = (
            np.asarray(leaf, order="C").reshape(-1).view(np.uint8)
        )  # floats would lose the sign of zeros
        return broadcast_one_to_all(content).view(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(send, tree) if jax.process_count() > 1 else tree


_largest = jax.jit(jnp.max)


def largest_anywhere(number: int, mesh: Mesh) -> Int[Array, ""]:
    """The largest number that any process gives. Does not wait for the devices; reading the value does."""
    numbers = np.full(jax.local_device_count(), number, np.int32)
    return _largest(shard_batch({"number": numbers}, mesh)["number"])


# ------------------------------------------------------------------------------------------------------------- signals


class Stopped(Exception):
    """Ends a run after the signal `number`. All that `--resume` needs is on the disk."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Handles SIGTERM, SIGINT and SIGHUP: they raise `Stopped`, in a `deferred` block only at the second signal."""

    def __init__(self) -> None:
        self._received = 0
        self._deferred = False
        self._largest: Int[Array, ""] | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Handles the signals within the block."""
        handled = [signal.SIGTERM, signal.SIGINT]
        if (
            hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        ):  # as nohup sets it
            handled.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._receive) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self._received or not self._deferred:
            raise Stopped(number)
        self._received = number

    @contextlib.contextmanager
    def deferred(self, deferred: bool = True) -> Iterator[None]:
        """Within the block, a signal waits for `received` to be called; with False it raises again."""
        before = self._deferred
        self._deferred = deferred
        try:
            if self._received and not deferred:
                raise Stopped(self._received)
            yield
        finally:
            self._deferred = before

    def received(self, mesh: Mesh, waits: bool) -> int:
        """The signal that came to any process, or 0. All processes must call it after each step, and get one answer.

        With several processes, the answer is a step old unless it `waits` for the devices.
        """
        if jax.process_count() == 1:
            return self._received
        before = self._largest
        self._largest = largest_anywhere(self._received, mesh)
        answer = self._largest if waits else before
        return 0 if answer is None else int(answer)


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that XLA frees: on CPU, mapping the pages anew takes a quarter of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_arena_max, 1)
