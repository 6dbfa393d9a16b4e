"""The processes that share one run: how they meet, what they exchange, the signals that stop them.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M.
`python train.py --coordinator HOST:PORT --processes 2 --process 0` uses it.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import Mesh
from jaxtyping import Array, Int

from support import errors
from support.devices import all_devices, is_main_process, shard_batch
from support.errors import InputError
from support.run.options import Cluster


def connect(cluster: Cluster) -> None:
    """Connects the processes given by the flags, else those that a scheduler or a TPU pod started.

    Must come before anything else uses the devices. Only process 0 prints. Raises InputError for
    wrong flags.
    """
    address, count, number = cluster.coordinator, cluster.processes, cluster.process
    if address is None and count is None and number is None:
        join_cluster()
    else:
        if address is None or count is None or number is None:
            raise InputError("--coordinator, --processes and --process go together: give all three")
        if not 0 <= number < count:
            advice = f"number them from 0 to {max(count, 1) - 1}"
            raise InputError(f"--process is {number} of --processes {count}: {advice}")
        if not re.fullmatch(r".+:\d+", address):
            advice = "give HOST:PORT, such as 10.0.0.1:1234"
            raise InputError(f"--coordinator is {address!r}: {advice}")
        meet(f"process {number} of {count} at {address}", address, count, number)
    all_devices()  # raises, if there are none, what the user can read
    if jax.process_count() > 1:
        threading.Thread(target=watch_the_others, daemon=True).start()
    errors.shows_warnings = is_main_process()
    if not is_main_process():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # silences libraries, too


def meet(name: str, *arguments: Any, **options: Any) -> None:
    """Waits for the other processes. From then on, the loss of one ends all within a minute."""
    print(f"{name}: waits up to five minutes for the others", flush=True)
    jax.distributed.initialize(*arguments, heartbeat_timeout_seconds=50, **options)


# Per scheduler that JAX knows, the variables that it sets for each process that it starts: the
# number of processes, and the number of this one.
SCHEDULERS = {
    "slurm": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "ompi": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}


def join_cluster() -> None:
    """Joins the processes that a scheduler started beside this one, or those of a TPU pod.

    Otherwise it stays alone. A shell in a job, or a Kubernetes pod, has variables of a cluster,
    but nobody to wait for.
    """
    for scheduler, (count, number) in SCHEDULERS.items():
        if os.environ.get(count, "1") != "1":
            name = f"process {os.environ.get(number)} of {os.environ[count]} started by {scheduler}"
            meet(name, cluster_detection_method=scheduler)
            return
    in_job = "SLURM_JOB_ID" in os.environ or "KUBERNETES_SERVICE_HOST" in os.environ
    if not in_job or "TPU_WORKER_HOSTNAMES" in os.environ:
        # ValueError: no TPU pod. RuntimeError: this process, a notebook's, used its devices before.
        with contextlib.suppress(ValueError, RuntimeError):
            jax.distributed.initialize()


def gathered(content: Any) -> list[Any]:
    """Returns, in every process, the content that each process gives, as JSON."""
    own = np.frombuffer(json.dumps(content).encode(), np.uint8)
    lengths = process_allgather(np.int32(len(own)))
    rows = process_allgather(np.resize(own, np.max(lengths)))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def from_main_process(make: Callable[[], Any]) -> Any:
    """Calls `make` in process 0 and returns its value, as JSON, in every process.

    Raises the InputError of process 0 in every process.
    """
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
    """Returns the host arrays of process 0, bit by bit, in every process.

    The others give arrays of the same shapes.
    """

    def send(leaf: np.ndarray) -> np.ndarray:
        # As floats they would lose the sign of zeros.
        content = np.asarray(leaf, order="C").reshape(-1).view(np.uint8)
        return broadcast_one_to_all(content).view(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(send, tree) if jax.process_count() > 1 else tree


# ------------------------------------------------------------------------------- common failure

# In the store that JAX's processes share, the first one that fails writes why, and each writes that
# it ends.
FAILURE, ENDS = "lipsum/failure", "lipsum/ends"
_ending = threading.Lock()  # held by the thread that ends the process


def shared_store() -> Any:
    """Returns the store of names and texts that the processes share. JAX has no public name yet."""
    return distributed.global_state.client


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Ends all processes, each with the reason, if one of them fails in the block.

    The others would wait for it in a collective.
    """
    try:
        yield
    except Stopped:  # all processes get it
        raise
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if not isinstance(error, InputError):
            end_with_the_others(1_000)  # a collective broke, since another process ended
            traceback.print_exc()
        reason = str(error).split("\n")[0] or type(error).__name__
        end_process(2 if isinstance(error, InputError) else 1, reason)


def end_with_the_others(milliseconds: int) -> None:
    """Ends this process with another one's reason, if one fails within the time."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # none failed
        code, reason = json.loads(shared_store().blocking_key_value_get(FAILURE, milliseconds))
        end_process(code, reason)


def watch_the_others() -> None:
    """Ends this process when another one fails; runs in a thread."""
    while jax.distributed.is_initialized():
        end_with_the_others(60_000)
        time.sleep(1)


def end_process(code: int, reason: str) -> None:
    """Prints the reason, tells it to the others unless they know one, and ends this process.

    Process 0, which holds the store, ends after the others.
    """
    with _ending:
        print(f"error: {reason}", file=sys.stderr)
        store, number = shared_store(), jax.process_index()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            store.key_value_set(FAILURE, json.dumps([code, f"process {number}: {reason}"]))
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            store.key_value_set(f"{ENDS}/{number}", "")
            for other in range(jax.process_count()) if number == 0 else ():
                store.blocking_key_value_get(f"{ENDS}/{other}", 10_000)
        if number == 0:
            time.sleep(1)
        flush_and_exit(code)


def flush_and_exit(code: int) -> None:
    """Ends the process at once. The usual way out waits for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -------------------------------------------------------------------------------------- signals

_largest = jax.jit(jnp.max)


class Stopped(Exception):
    """Ends a run after the signal `number`. All that `--resume` needs is on the disk."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """Handles SIGTERM, SIGINT and SIGHUP, which raise `Stopped`.

    In a `deferred` block, only the second signal raises.
    """

    def __init__(self) -> None:
        self._received = 0
        self._deferred = False
        self._largest: Int[Array, ""] | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Handles the signals within the block; in the main thread, the only one that gets them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = [signal.SIGTERM, signal.SIGINT]
        # nohup makes processes ignore SIGHUP.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
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
        """Makes a signal in the block wait for a call of `received`; with False it raises again."""
        before = self._deferred
        self._deferred = deferred
        try:
            if self._received and not deferred:
                raise Stopped(self._received)
            yield
        finally:
            self._deferred = before

    def received(self, mesh: Mesh, waits: bool) -> int:
        """Returns the signal that came to any process, or 0.

        All processes must call it after each step, and get the same answer. With several processes,
        it is a step old unless the call `waits` for the devices. JAX's own
        `reached_preemption_sync_point` knows SIGTERM alone, and asks for it once a second.
        """
        if jax.process_count() == 1:
            return self._received
        before = self._largest
        numbers = np.full(jax.local_device_count(), self._received, np.int32)
        self._largest = _largest(shard_batch({"number": numbers}, mesh)["number"])
        answer = self._largest if waits else before
        return 0 if answer is None else int(answer)


def keep_freed_memory() -> None:
    """Makes glibc keep the memory that XLA frees.

    On CPU, mapping the pages anew takes a quarter of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never
        # Only the main thread's heap has blocks of over 64 MB: XLA is to compute there.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
