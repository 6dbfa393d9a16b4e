"""The processes of one run: how they meet, what they tell each other, and the signals that stop them.

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

from data import shard_batch, writes_files
from support.errors import InputError
from support.options import Cluster, Command, flag


def connect(cluster: Cluster) -> None:
    """Joins the processes of one run: those of the flags, else those of a TPU pod or a Slurm job.

    Comes before anything else touches the devices. Only process 0 prints. Raises InputError for wrong flags.
    """
    given = [name for name, value in vars(cluster).items() if value is not None]
    if given:
        for name in vars(cluster):
            if name not in given:
                raise InputError(f"{flag(given[0])} needs {flag(name)}: give --coordinator, --processes and --process")
        if cluster.processes < 1 or not 0 <= cluster.process < cluster.processes:
            raise InputError(
                f"--process is {cluster.process} of --processes {cluster.processes}: number them from 0 to "
                f"{max(cluster.processes, 1) - 1}"
            )
        host, _, port = cluster.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"--coordinator is {cluster.coordinator!r}: give HOST:PORT, such as 10.0.0.1:1234")
        print(
            f"process {cluster.process} of {cluster.processes}: waits up to five minutes for all to meet at "
            f"{cluster.coordinator}",
            flush=True,
        )
        jax.distributed.initialize(cluster.coordinator, cluster.processes, cluster.process)
    elif os.environ.get("SLURM_NTASKS") != "1":  # of a single task, JAX would take the first GPU alone
        with contextlib.suppress(ValueError):  # no cluster that JAX knows: one process
            jax.distributed.initialize()
    if not writes_files():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what libraries print, too


def check_processes(command: Command) -> None:
    """Raises InputError if the processes of one run were given different options."""
    execution = dataclasses.replace(command.execution, workers=0)
    own = repr(dataclasses.replace(command, execution=execution, cluster=Cluster()))
    if any(other != own for other in gathered(own)):
        raise InputError("the processes have different options: give each the same command but for --process")


def gathered(content: Any) -> list[Any]:
    """What each process gives, as JSON has it, in every process."""
    own = np.frombuffer(json.dumps(content, default=str).encode(), np.uint8)
    lengths = process_allgather(np.int32(len(own)))
    rows = process_allgather(np.resize(own, np.max(lengths)))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def from_writer(make: Callable[[], Any]) -> Any:
    """What `make` returns, as JSON has it, in the process that writes files: in every process.

    So is the InputError that it raises.
    """
    if jax.process_count() == 1:
        return make()
    answer: dict[str, Any] = {}
    if writes_files():
        try:
            answer = {"value": make()}
        except InputError as error:
            answer = {"error": str(error)}
    content = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(broadcast_one_to_all(np.int32(len(content))))
    told = json.loads(broadcast_one_to_all(np.resize(content, length)).tobytes())
    if "error" in told:
        raise InputError(told["error"])
    return told["value"]


def broadcast(tree: Any) -> Any:
    """The host arrays of the process that writes files, to the bit. The others give arrays of the same shapes."""

    def of_leaf(leaf: np.ndarray) -> np.ndarray:
        content = np.asarray(leaf, order="C").reshape(-1).view(np.uint8)  # floats would lose the sign of zeros
        return broadcast_one_to_all(content).view(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(of_leaf, tree) if jax.process_count() > 1 else tree


@jax.jit
def _largest(numbers: Int[Array, " devices"]) -> Int[Array, ""]:
    return jnp.max(numbers)


def largest_anywhere(number: int, mesh: Mesh) -> Int[Array, ""]:
    """The largest number that any process gives. It comes when the devices get to it: reading it at once waits."""
    numbers = np.full(jax.local_device_count(), number, np.int32)
    return _largest(shard_batch({"number": numbers}, mesh)["number"])


# ------------------------------------------------------------------------------------------------------------- signals


class Stopped(Exception):
    """The run ends because of the signal `number`; what `--resume` needs is on the disk."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """SIGTERM and SIGINT. They raise `Stopped` at once but where they are deferred, and there the second one does."""

    def __init__(self) -> None:
        self._received = 0
        self._deferred = False
        self._of_all: Int[Array, ""] | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block, they come here."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
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
        """Within the block, signals wait to be asked for, or with False do not."""
        before, self._deferred = self._deferred, deferred
        try:
            if self._received and not deferred:
                raise Stopped(self._received)
            yield
        finally:
            self._deferred = before

    def received(self, mesh: Mesh, waits: bool) -> int:
        """The signal that came to any process, or 0. Asked by all after each step, it answers all the same.

        Of several processes the answer is a step old unless it `waits` for the devices.
        """
        if jax.process_count() == 1:
            return self._received
        before, self._of_all = self._of_all, largest_anywhere(self._received, mesh)
        answer = self._of_all if waits else before
        return 0 if answer is None else int(answer)


def keep_freed_memory() -> None:
    """Has glibc, where there is one, keep what XLA frees: on CPU, mapping the pages anew takes a quarter of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_arena_max, 1)
