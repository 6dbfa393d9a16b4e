"""Speed of the input pipeline: decoding against bare Pillow, and listing a tree as large as ImageNet's.

`python bench.py decode` and `python bench.py index` make what they measure and delete it afterwards. Ratios are of
rounds that take turns; compare them, not the times of different machines.
"""

import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

import data
import layouts
from clip import InputError
from eval import exit_code
from train import keep_freed_memory

RESOLUTION = 224
BATCH_SIZE = 32
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


def index_command(images: int = 1_281_167, classes: int = 1_000) -> None:
    """Seconds and memory to list a tree of class folders, and to find it in the cache the next time.

    Args:
        images: Files in all, empty ones.
        classes: Folders that they lie in.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "train"
        for index in tqdm(range(classes), "making folders", unit="folder", leave=False):
            of_class = root / f"n{index:08}"
            of_class.mkdir(parents=True)
            for number in range(index, images, classes):
                os.close(os.open(of_class / f"{of_class.name}_{number}.JPEG", os.O_CREAT | os.O_WRONLY))
        os.environ["LIPSUM_CACHE"] = str(Path(folder) / "cache")
        time.sleep(layouts.SAME_STAMP / 1e9)  # an index of folders that have just changed is not trusted
        for state in ("listed", "from the cache"):
            before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            tree = layouts.read_tree(root)
            label_of = {name: label for label, name in enumerate(tree.folders)}
            split = layouts.split_of_tree("train", tree, tree.folders, label_of, str(root))
            seconds = time.perf_counter() - began
            megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            print(f"{len(split)} images {state}: {seconds:.2f} s, peak memory up by {megabytes:.0f} MiB")


app = tyro.extras.SubcommandApp()
app.command(name="decode")(decode_command)
app.command(name="index")(index_command)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: app.cli(description=__doc__.splitlines()[0], config=(tyro.conf.FlagCreatePairsOff,))))
