"""Estimates the memory of a training step, without running it or any weights.

python -m support.bench memory --model ViT-L/14 --fsdp --remat
"""

import sys
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding, PartitionSpec

import clip
import data
import lipsum
from support.errors import exit_code, unknown

GIB = 2**30


def memory_command(
    model: str = "ViT-L/14", method: str = "lipsum", batch_size: int = 128, cpu_devices: int = 8,
    precision: Literal["float32", "bfloat16"] = "bfloat16", fsdp: bool = False, remat: bool = False,
    accumulate: int = 1,
) -> None:  # fmt: skip
    """GiB per device that a step on DomainNet's 345 classes needs, as estimated by XLA's compiler for these devices.

    Args:
        model: A preset, such as ViT-B/16. No weights are needed.
        method: A method of train.py that trains.
        batch_size: Images per step, over all devices.
        cpu_devices: Number of devices that the CPU is split into, if there is no accelerator.
        precision: Type that the towers compute in.
        fsdp: Shard weights and optimizer over the devices.
        remat: Compute each block again in the backward pass.
        accumulate: Parts that a batch is split into.
    """
    if model not in clip.PRESETS:
        raise unknown("model preset", model, clip.PRESETS)
    trained = [name for name, each in lipsum.METHODS.items() if each.trained]
    if method not in trained:
        raise unknown("training method", method, trained)
    # JAX refuses an update, even to the same number, once its devices are in use.
    if jax.config.jax_num_cpu_devices != cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    mesh = data.device_mesh(batch_size, accumulate)
    config = clip.PRESETS[model]
    dim = config.embedding_size

    def start() -> tuple[lipsum.State, lipsum.Frozen]:
        clip_model = clip.CLIP(config, jax.random.key(0))
        zero_shot = lipsum.Classifier(clip_model.vision, jnp.zeros((dim, 345)))
        computation = lipsum.Computation(precision, accumulate, remat)
        frozen = lipsum.Frozen(
            zero_shot, clip_model.text, jnp.zeros((dim, 80)), jnp.float32(100), computation=computation,
            second_moment=jnp.zeros((dim, dim)),
        )  # fmt: skip
        return lipsum.initial_state(frozen, averaged=lipsum.METHODS[method].averaged), frozen

    shapes = jax.eval_shape(start)
    shardings = data.shardings(shapes, mesh, fsdp)
    state, frozen = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), shapes, shardings)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, config.image_size, config.image_size, 3), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows),
    }
    step = lipsum.training_step(lipsum.METHODS[method].loss, shardings[0])
    memory = step.lower(state, frozen, batch, jax.random.key(0)).compile().memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes / GIB, memory.temp_size_in_bytes / GIB
    print(
        f"{model}, {method}, {batch_size} images on {mesh.size} {jax.devices()[0].device_kind} device(s): "
        f"{arguments + temporaries:.1f} GiB per device ({arguments:.2f} of weights, optimizer and images, "
        f"{temporaries:.2f} to compute in)"
    )


if __name__ == "__main__":
    app = tyro.extras.SubcommandApp()
    app.command(name="memory")(memory_command)
    options = {"prog": "python -m support.bench", "config": (tyro.conf.FlagCreatePairsOff,)}
    sys.exit(exit_code(lambda: app.cli(**options)))
