"""Runs six training steps per method on any number of devices, and returns their losses.

tests/test_scaling.py also runs it as one of several processes, and reads the JSON that it prints:

    # Coordinator, number of processes, this one, methods
    python tests/scaling.py 127.0.0.1:1234 1 0 ft lipsum
"""

import functools
import json
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import clip
import data
import lipsum
from support import devices
from tools import seeded

BATCH = 32
SIZES = clip.Config(
    clip.Preparation(16),
    8,
    clip.Transformer(16, 2, 2, 64),
    clip.Transformer(16, 2, 2, 64),
    8,
    context_length=16,
    vocabulary_size=100,
    start_token=98,
    end_token=99,
)
# Scratch-FT and LP-FT have the same step as FT.
METHODS = [
    name
    for name, method in lipsum.METHODS.items()
    if method.trained and name not in ("scratch-ft", "lp-ft")
]


def mesh_of(devices: int) -> Mesh:
    return Mesh(
        np.array(jax.devices()[:devices]), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )


@functools.cache
def random_model() -> clip.CLIP:
    return jax.jit(clip.CLIP, static_argnums=0)(SIZES, jax.random.key(0))


def inputs(weight: float = 1.0, **computation: Any) -> tuple[lipsum.Frozen, data.HostBatch]:
    """Returns a random model and a batch, the same in every process."""
    model = random_model()
    random = np.random.default_rng(0)
    head, context_head = (
        clip.normalize(jnp.asarray(random.normal(size=(columns, 8)).astype(np.float32))).T
        for columns in (5, 2)
    )
    frozen = lipsum.Frozen(
        lipsum.Classifier(model.vision, head),
        model.text,
        jnp.float32(20),
        jax.tree.map(
            np.float32, lipsum.Settings(steps=20, learning_rate=1e-3, num_texts=9, weight=weight)
        ),
        lipsum.Computation(**computation),
        context_head=context_head,
        second_moment=jnp.eye(8) / 8,
    )
    images = seeded.images(seeded.ARCHITECTURES["nano"], 1, BATCH)
    return frozen, {"image": images, "label": np.arange(BATCH, dtype=np.int32) % 5}


def start(
    method: str, mesh: Mesh, fsdp: bool, **computation: Any
) -> tuple[lipsum.State, lipsum.Frozen, dict[str, jax.Array]]:
    """Returns the arguments of a step, placed on the devices."""
    frozen, batch = inputs(weight=lipsum.METHODS[method].weight, **computation)
    part = devices.own_part()
    rows = slice(part.index * BATCH // part.count, (part.index + 1) * BATCH // part.count)
    placed = devices.place(frozen, mesh, fsdp)
    state = devices.place(lipsum.initial_state(lipsum.METHODS[method], placed), mesh, fsdp)
    return (
        state,
        placed,
        devices.shard_batch({name: array[rows] for name, array in batch.items()}, mesh),
    )


def losses(method: str, mesh: Mesh, fsdp: bool = False, **computation: Any) -> list[float]:
    """Returns the loss of each of six steps."""
    state, frozen, batch = start(method, mesh, fsdp, **computation)
    step = lipsum.training_step(lipsum.METHODS[method], devices.shardings(state, mesh, fsdp))
    found = []
    for _ in range(6):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        found.append(float(metrics["loss"]))
    return found


def free_address() -> str:
    """Returns HOST:PORT with a free port, for a coordinator."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


if __name__ == "__main__":
    coordinator, processes, process, *methods = sys.argv[1:]
    jax.config.update("jax_disable_most_optimizations", True)
    devices.SMALLEST_SPLIT = 1
    jax.distributed.initialize(coordinator, int(processes), int(process))
    mesh = devices.device_mesh(BATCH)
    print(
        json.dumps(
            {
                f"{name} {fsdp}": losses(name, mesh, fsdp)
                for name in methods
                for fsdp in (False, True)
            }
        )
    )
