"""Devices and processes: the mesh, the shardings of arrays, and which process reads, writes and shows what.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --fsdp` uses it on all devices that there are.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from support.errors import InputError


class Part(NamedTuple):
    """One of `count` equal parts of a batch, in contiguous rows: what one process reads."""

    index: int
    count: int


WHOLE = Part(0, 1)


EVALUATED_AT_ONCE = 64  # images per device: each takes ViT-L/14 some 20 MB of activations


def is_main_process() -> bool:
    """Whether this process writes files and shows progress; exactly one does."""
    return jax.process_index() == 0


def hides_bars() -> bool | None:
    """What `tqdm` takes as `disable`: one process shows bars, and (None) only on a terminal."""
    return None if is_main_process() else True


def all_devices() -> list[jax.Device]:
    """The devices of all processes. Raises InputError if JAX has none, as when JAX_PLATFORMS names one that is not."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0] or "none of JAX_PLATFORMS is there"
        raise InputError(
            f"JAX finds no device ({reason}): correct or unset JAX_PLATFORMS"
        ) from error


def device_mesh(batch_size: int, accumulate: int = 1) -> Mesh:
    """Returns a mesh of all devices along the axis `data`, with each process's devices adjacent.

    Raises InputError if the devices cannot share each of a batch's `accumulate` parts evenly.
    """
    devices = sorted(all_devices(), key=lambda device: (device.process_index, device.id))
    if batch_size % (len(devices) * accumulate):
        parts = f" times --accumulate {accumulate}" if accumulate > 1 else ""
        advice = f"give a multiple of {len(devices) * accumulate}"
        raise InputError(
            f"--batch-size {batch_size} does not divide among {len(devices)} devices{parts}: {advice}"
        )
    # Auto: the compiler propagates shardings; Explicit axes would become part of every array's type.
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def evaluation_batch_size(batch_size: int, accumulate: int = 1) -> int:
    """Images to evaluate at once on all devices: per device, as many as it trains on at once, but at most 64."""
    per_device = batch_size // (accumulate * jax.device_count())
    return min(max(per_device, 1), EVALUATED_AT_ONCE) * jax.device_count()


def own_part() -> Part:
    """The part of every batch that this process reads."""
    return Part(jax.process_index(), jax.process_count())


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the batch, of which each process passes its own part, split over the devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def shardings(tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """The sharding per leaf: replicated or, with `fsdp`, split along the largest axis that divides evenly."""

    def per_leaf(leaf: Any) -> NamedSharding:
        divisible = [
            axis for axis, size in enumerate(np.shape(leaf)) if size and size % mesh.size == 0
        ]
        if not fsdp or not divisible:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "data"))

    return jax.tree.map(per_leaf, tree)


def place(tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """Puts arrays, which every process has in full, on the devices as `shardings` specifies."""
    return jax.device_put(tree, shardings(tree, mesh, fsdp))


def fetch(tree: Any) -> Any:
    """Copies whole arrays into the memory of every process. The copies survive the donation of the originals."""

    def per_leaf(leaf: Any) -> np.ndarray:
        spans_processes = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return np.array(process_allgather(leaf, tiled=True) if spans_processes else leaf)

    return jax.tree.map(per_leaf, tree)
