"""Devices and processes: the mesh, the shardings of arrays, and which process does what.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --fsdp` uses it.
"""

import math
import resource
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from support.errors import InputError


class Part(NamedTuple):
    """One of `count` equal parts of a batch, in contiguous rows: what one process reads."""

    index: int
    count: int


WHOLE = Part(0, 1)
EVALUATED_AT_ONCE = 64  # images per device: each takes ViT-L/14 some 20 MB of activations
SMALLEST_SPLIT = 2**20  # entries of a leaf: activations would be split and moved as biases are


def is_main_process() -> bool:
    """Whether this process writes files and shows progress; exactly one does."""
    return jax.process_index() == 0


def hides_bars() -> bool | None:
    """What `tqdm` takes as `disable`: one process shows bars, and (None) only on a terminal."""
    return None if is_main_process() else True


def progress(items: Iterable, label: str, total: int, unit: str) -> Iterable:
    """Shows a bar while the items are used, if that takes over two seconds."""
    return tqdm(items, label, total, unit=unit, leave=False, delay=2, disable=hides_bars())


def all_devices() -> list[jax.Device]:
    """Returns the devices of all processes. Raises InputError if JAX finds none."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0] or "none of JAX_PLATFORMS is there"
        problem = f"JAX finds no device ({reason})"
        raise InputError(f"{problem}: correct or unset JAX_PLATFORMS") from error


def device_mesh(batch_size: int, accumulate: int = 1) -> Mesh:
    """Returns a mesh of all devices along the axis `data`, each process's devices adjacent.

    Raises InputError if the devices cannot share each of a batch's `accumulate` parts evenly.
    """
    devices = sorted(all_devices(), key=lambda device: (device.process_index, device.id))
    count = len(devices)
    if batch_size % (count * accumulate):
        parts = f" times --accumulate {accumulate}" if accumulate > 1 else ""
        problem = f"--batch-size {batch_size} does not divide among {count} devices{parts}"
        raise InputError(f"{problem}: give a multiple of {count * accumulate}")
    # Auto: the compiler propagates shardings. Explicit axes would be part of every array's type.
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def evaluation_batch_size(batch_size: int, accumulate: int = 1) -> int:
    """Returns the number of images to evaluate at once, on all devices.

    Per device, it is as many as one is trained on at once, and at most 64.
    """
    per_device = batch_size // (accumulate * jax.device_count())
    return min(max(per_device, 1), EVALUATED_AT_ONCE) * jax.device_count()


def peak_memory() -> int:
    """Returns the most bytes that were in use at once, on a device if it counts them, or here."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    in_process = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return statistics.get("peak_bytes_in_use", in_process)


def own_part() -> Part:
    """Returns the part of every batch that this process reads."""
    return Part(jax.process_index(), jax.process_count())


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the batch, of which each process passes its own part, split over the devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    def shard(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array)

    return {name: shard(array) for name, array in batch.items()}


def shardings(tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """Returns the sharding per leaf: replicated or, with `fsdp`, split.

    A leaf of at least `SMALLEST_SPLIT` entries is split along its largest axis that divides evenly,
    if one does. The last is taken if no other divides: for it, TPU v5e's compiler does not fuse a
    gradient's sum with the choice of a part, and moves all of it to all.
    """

    def per_leaf(leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        divisible = [axis for axis, size in enumerate(shape) if size and size % mesh.size == 0]
        if not fsdp or not divisible or math.prod(shape) < SMALLEST_SPLIT:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(divisible, key=lambda axis: (axis < len(shape) - 1, shape[axis]))
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "data"))

    return jax.tree.map(per_leaf, tree)


def place(tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """Puts arrays, which every process has in full, on the devices as `shardings` specifies."""
    return jax.device_put(tree, shardings(tree, mesh, fsdp))


def fetch(tree: Any) -> Any:
    """Copies whole arrays into the memory of every process.

    The copies survive the donation of the originals.
    """

    def per_leaf(leaf: Any) -> np.ndarray:
        spans_processes = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return np.array(process_allgather(leaf, tiled=True) if spans_processes else leaf)

    return jax.tree.map(per_leaf, tree)
