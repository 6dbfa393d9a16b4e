"""Speed of the input pipeline, and the memory of a training step.

`python -m support.bench decode` makes the images that it measures and deletes them afterwards. Its ratios are of rounds
that take turns; compare them, not the times of different machines. `python -m support.bench memory` asks the compiler
what a step of a large model needs, and runs none.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from tqdm import tqdm

import clip
import data
import lipsum
from support.errors import InputError, exit_code, unknown
from support.processes import keep_freed_memory

RESOLUTION = 224
BATCH_SIZE = 32
GIB = 2**30
LISTED = 20_000  # a list as long as real ones: grain shuffles short ones slowly


def photo(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Shapes of all sizes under some noise, which compress as photos do."""
    pixels = np.zeros((height, width, 3), np.float32)
    for size in (2, 8, 32, 128):
        layer = Image.fromarray(random.integers(0, 256, (size, size, 3), np.uint8))
        pixels += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), np.float32) / 4
    return Image.fromarray(np.clip(pixels + random.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8))


def bare_pillow(path: Path, random: np.random.Generator) -> np.ndarray:
    """What a training image needs at the least: open, decode, crop and resize, mirror; no pipeline around it."""
    with Image.open(path) as image:
        width, height = image.size
        left, top, w, h = data.random_crop(width, height, random)
        image.draft("RGB", (-(-width * RESOLUTION // w), -(-height * RESOLUTION // h)))
        scale = image.size[0] / width
        box = (left * scale, top * scale, (left + w) * scale, (top + h) * scale)
        image = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC, box)
        return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image)


def decode_command(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional] = (), count: int = 512, rounds: int = 9
) -> None:
    """Images a second, decoded and augmented: bare Pillow in a loop, and the pipeline on one thread and on two.

    Args:
        images: Files to decode; without any, `count` JPEGs of 500 x 375 are made.
        count: How many to decode in a round, a multiple of 32.
        rounds: How often each takes its turn; medians are printed.
    """
    if count < 1 or count % BATCH_SIZE or rounds < 1:
        raise InputError(f"--count is {count} and --rounds {rounds}: give a multiple of {BATCH_SIZE}, and at least 1")
    keep_freed_memory()  # as train.py does
    with tempfile.TemporaryDirectory() as folder:
        paths = list(images)
        for index in range(0 if paths else count):
            paths.append(Path(folder) / f"{index}.jpg")
            photo(np.random.default_rng(index), 500, 375).save(paths[-1], quality=90)
        files = tuple(data.ListedFile(paths[index % len(paths)]) for index in range(LISTED))
        split = data.Split("images", ("all",), files, np.zeros(LISTED, np.int32))
        kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1000
        print(f"{count} images of {kilobytes:.0f} kB on the mean, to {RESOLUTION} pixels, {os.cpu_count()} cores")

        def pillow() -> float:
            random = np.random.default_rng(0)
            began = time.perf_counter()
            for file in files[:count]:
                bare_pillow(file.path, random)
            return time.perf_counter() - began

        def pipeline(workers: int) -> Callable[[], float]:
            def run() -> float:
                batches = data.training_batches(split, RESOLUTION, BATCH_SIZE, 0, workers)
                for _ in range(2 * workers + 2):  # started up, and nothing read ahead is left
                    next(batches)
                began = time.perf_counter()
                for _ in range(count // BATCH_SIZE):
                    next(batches)
                return time.perf_counter() - began

            return run

        ways = {"bare Pillow": pillow, "1 thread": pipeline(1), "2 threads": pipeline(2)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in tqdm(range(rounds), unit="round", leave=False):
            for name, run in ways.items():
                seconds[name].append(run())
    for name, of_way in seconds.items():
        print(f"{name:12} {count / statistics.median(of_way):7.0f} images/s")
    for name, other in (("1 thread", "bare Pillow"), ("2 threads", "1 thread")):
        ratios = [b / a for a, b in zip(seconds[name], seconds[other], strict=True)]
        print(f"{name} / {other}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def memory_command(
    model: str = "ViT-L/14", method: str = "lipsum", batch_size: int = 128, cpu_devices: int = 8,
    precision: Literal["float32", "bfloat16"] = "bfloat16", fsdp: bool = False, remat: bool = False,
    accumulate: int = 1,
) -> None:  # fmt: skip
    """GiB that each device needs for a step on DomainNet's 345 classes, as XLA's compiler for these devices reckons.

    Args:
        model: A preset, such as ViT-B/16; no weights are needed.
        method: As train.py has it.
        batch_size: Images per step, over all devices.
        cpu_devices: Where there is no accelerator: as how many devices the CPU poses.
        precision: As train.py has it, like the options below.
        fsdp: Spread weights and optimiser over the devices.
        remat: Compute each block again in the backward pass.
        accumulate: Parts of a batch.
    """
    if model not in clip.PRESETS:
        raise unknown("model preset", model, clip.PRESETS)
    if method not in lipsum.METHODS or not lipsum.METHODS[method].trained:
        raise unknown("training method", method, [name for name, each in lipsum.METHODS.items() if each.trained])
    if jax.config.jax_num_cpu_devices != cpu_devices:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    mesh = data.device_mesh(batch_size, accumulate)
    config = clip.PRESETS[model]
    computation = lipsum.Computation(precision, accumulate, remat)

    def start() -> tuple[lipsum.State, lipsum.Frozen]:
        clip_model, dim = clip.CLIP(config, jax.random.key(0)), config.embedding_size
        zero_shot = lipsum.Classifier(clip_model.vision, jnp.zeros((dim, 345)))
        frozen = lipsum.Frozen(
            zero_shot, clip_model.text, jnp.zeros((dim, 80)), jnp.float32(100), computation=computation,
            second_moment=jnp.zeros((dim, dim)),
        )  # fmt: skip
        return lipsum.initial_state(frozen, averaged=lipsum.METHODS[method].averaged), frozen

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
        )

    state, frozen = jax.eval_shape(start)
    of_state, rows = data.shardings(state, mesh, fsdp), NamedSharding(mesh, PartitionSpec("data"))
    batch = {
        "image": jax.ShapeDtypeStruct((batch_size, config.image_size, config.image_size, 3), jnp.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=rows),
    }
    step = lipsum.training_step(lipsum.METHODS[method].loss, of_state)
    arguments = placed(state, of_state), placed(frozen, data.shardings(frozen, mesh, fsdp)), batch, jax.random.key(0)
    needed = step.lower(*arguments).compile().memory_analysis()
    kept, worked_in = needed.argument_size_in_bytes / GIB, needed.temp_size_in_bytes / GIB
    print(
        f"{model}, {method}, {batch_size} images on {mesh.size} {jax.devices()[0].device_kind} device(s): "
        f"{kept + worked_in:.1f} GiB a device ({kept:.2f} of weights, optimiser and images, {worked_in:.2f} to compute "
        "in)"
    )


app = tyro.extras.SubcommandApp()
app.command(name="decode")(decode_command)
app.command(name="memory")(memory_command)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: app.cli(description=__doc__.splitlines()[0], config=(tyro.conf.FlagCreatePairsOff,))))
