"""Images: what names them, preprocessing, augmentation, batches, and their placement on devices.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py` uses it; `support/layouts.py` finds the images.

Batch number t is a pure function of the split, the seed and t, whatever the number of threads or processes. Images
leave here as uint8; `clip.standardize` turns them into floats on the device.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from tqdm import tqdm

from support.errors import InputError

# -------------------------------------------------------------------------------------------------------------- splits


class ListedFile(NamedTuple):
    """An image file and the line of a list that names it, for messages; no line where its folder alone does."""

    path: Path
    place: str = ""


@dataclass(frozen=True, eq=False)
class Files(Sequence[ListedFile]):
    """Image files under one folder, kept as names: a million `ListedFile`s would take half a gigabyte."""

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(ListedFile(self.root / name) for name in self.names[index])
        return ListedFile(self.root / self.names[index])


@dataclass(frozen=True)
class Split:
    """Images, as files or as pixels, with labels; `classes` are names in label order.

    `compared` tells the classes that a prediction chooses from; all of them where it is None.
    """

    name: str
    classes: tuple[str, ...]
    images: Sequence[ListedFile | UInt8[np.ndarray, "height width 3"]] | UInt8[np.ndarray, "images height width 3"]
    labels: Int[np.ndarray, " images"]
    compared: Bool[np.ndarray, " classes"] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Data:
    """What one run needs: to train on, to select on, and to report on, the reference first."""

    train: Split
    selection: Split
    reports: dict[str, Split]


def take(split: Split, indices: Int[np.ndarray, " taken"], name: str) -> Split:
    """Some of the images, in the order given."""
    images = split.images
    if isinstance(images, np.ndarray):
        images = images[indices]
    elif isinstance(images, Files):
        images = replace(images, names=tuple(images.names[index] for index in indices))
    else:
        images = tuple(images[index] for index in indices)
    return replace(split, name=name, images=images, labels=split.labels[indices])


def hold_out(train: Split, every: int = 10, name: str = "val") -> tuple[Split, Split]:
    """`train` without every tenth image of it, counted class by class, and those: the same whatever the seed."""
    order = np.argsort(train.labels, kind="stable")
    if len(order) < every:
        raise InputError(
            f"{len(order)} training images are too few to hold out one in {every}: give --select-on test or more images"
        )
    held_out = np.zeros(len(order), bool)
    held_out[order[every - 1 :: every]] = True
    return take(train, np.flatnonzero(~held_out), train.name), take(train, np.flatnonzero(held_out), name)


def of_classes(split: Split, kept: Int[np.ndarray, " kept"]) -> Split:
    """The images of the kept classes alone, these numbered anew in the same order."""
    some = take(split, np.flatnonzero(np.isin(split.labels, kept)), split.name)
    return replace(
        some,
        classes=tuple(split.classes[index] for index in kept),
        labels=np.searchsorted(kept, some.labels).astype(np.int32),
        compared=None if split.compared is None else split.compared[kept],
    )


# -------------------------------------------------------------------------------------------------------- image files


def open_image(file: ListedFile | UInt8[np.ndarray, "height width 3"]) -> Image.Image:
    """The image, opened but not yet decoded. Raises InputError naming file and place."""
    if isinstance(file, np.ndarray):
        return Image.fromarray(file)
    try:
        return Image.open(file.path)
    except FileNotFoundError as error:
        raise _wrong(file, "does not exist: restore it") from error
    except Exception as error:  # Pillow's readers raise whatever the damage causes
        raise broken_image(file, error) from error


def _wrong(file: ListedFile, what: str) -> InputError:
    if file.place:
        return InputError(f"{file.place}: {file.path} {what} or delete the line")
    return InputError(f"{file.path} {what} or leave it out")


def broken_image(file: ListedFile, error: Exception) -> InputError:
    return _wrong(file, f"is no readable image ({error}): replace it")


def check_image(file: ListedFile) -> None:
    """Raises InputError for a file that is missing, no image, or cut off.

    A JPEG or PNG whose last bytes hold its end marker is not cut off; that spares decoding it. All else is decoded.
    """
    with open_image(file) as image:
        end_marker = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}.get(image.format or "")
        try:
            with file.path.open("rb") as stream:
                stream.seek(max(0, file.path.stat().st_size - 64))
                if not end_marker or end_marker not in stream.read():
                    image.load()
        except Exception as error:
            raise broken_image(file, error) from error


# All of DomainNet is checked, in a minute or two; ImageNet's 1.28 million would take an hour on a slow disk.
CHECK_ALL_UP_TO = 200_000
CHECK_OF_MORE = 10_000


def check_images(splits: Sequence[Split], workers: int) -> None:
    """Checks the files of the splits before any long work begins; of a huge split, a sample evenly spread.

    Raises InputError for the first broken one. What the sample misses is found where it is decoded.
    """
    files = dict.fromkeys(
        split.images[index]
        for split in splits
        for index in np.unique(np.linspace(0, len(split) - 1, _files_to_check(split)).round().astype(np.int64))
    )
    with ThreadPoolExecutor(max(1, workers)) as pool:
        checks = pool.map(check_image, files)
        for _ in tqdm(
            checks, "checking images", len(files), unit="image", leave=False, delay=2, disable=not writes_files()
        ):
            pass


def _files_to_check(split: Split) -> int:
    if not len(split) or isinstance(split.images[0], np.ndarray):
        return 0
    return len(split) if len(split) <= CHECK_ALL_UP_TO else CHECK_OF_MORE


# ------------------------------------------------------------------------------------------------------ preprocessing


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    image.info.pop("transparency", None)  # changes no pixel here; Pillow warns of a palette's
    return np.asarray(image.convert("RGB"))


def eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits by its high byte, as Pillow does for 16-bit colour; converting it to RGB would clip."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray(np.clip(np.asarray(image).astype(np.int32) >> 8, 0, 255).astype(np.uint8))


def evaluation_image(image: Image.Image, resolution: int) -> UInt8[np.ndarray, "resolution resolution 3"]:
    """OpenAI's preprocessing: shorter side to the resolution with Pillow's bicubic filter, centre crop, RGB."""
    image = eight_bit(image)
    short, long = sorted(image.size)
    size = tuple(resolution if side == short else int(resolution * long / short) for side in image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - resolution) / 2) for side in size)  # ties to even
    return to_rgb(image.crop((left, top, left + resolution, top + resolution)))


def random_crop(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a crop of 8 % to 100 % of the area, with sides in a ratio of 3/4 to 4/3.

    After ten draws that do not fit: the largest centre crop with a ratio in those bounds.
    """
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
    w, h = min(width, height * 4 // 3), min(height, width * 4 // 3)
    return (width - w) // 2, (height - h) // 2, w, h


def training_image(
    image: Image.Image, resolution: int, random: np.random.Generator
) -> UInt8[np.ndarray, "resolution resolution 3"]:
    """A random crop, resized with Pillow's bicubic filter, and mirrored every other time."""
    width, height = image.size
    left, top, w, h = random_crop(width, height, random)
    # A JPEG decodes at 1/2, 1/4 or 1/8 of its size for a fraction of the cost, as long as the crop keeps its pixels.
    drafted = image.draft(image.mode, (math.ceil(width * resolution / w), math.ceil(height * resolution / h)))
    scale = drafted[1][2] / width if drafted else 1  # not the ratio of the sizes, which are rounded up
    box = (left * scale, top * scale, (left + w) * scale, (top + h) * scale)
    image = eight_bit(image).resize((resolution, resolution), Image.Resampling.BICUBIC, box)
    if random.random() < 0.5:  # by Pillow: numpy's mirrored view takes ten times as long to copy into a batch
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return to_rgb(image)


def unaugmented_image(
    image: Image.Image, resolution: int, random: np.random.Generator
) -> UInt8[np.ndarray, "resolution resolution 3"]:
    """What evaluation sees."""
    return evaluation_image(image, resolution)


AUGMENTATIONS = {"crop": training_image, "off": unaugmented_image}

# ------------------------------------------------------------------------------------------------------------- batches

HostBatch = dict[
    str, UInt8[np.ndarray, "batch height width 3"] | Int[np.ndarray, " batch"] | Bool[np.ndarray, " batch"]
]


class Part(NamedTuple):
    """One of `count` even parts of a batch, its rows side by side: what one process reads."""

    index: int
    count: int


WHOLE = Part(0, 1)


def read_image(
    file: ListedFile | UInt8[np.ndarray, "height width 3"], resolution: int, prepare: Any = evaluation_image, *more: Any
) -> UInt8[np.ndarray, "resolution resolution 3"]:
    """An image, decoded and prepared. Raises InputError naming file and place."""
    with open_image(file) as image:
        try:
            return prepare(image, resolution, *more)
        except Exception as error:
            raise broken_image(file, error) from error


def _example(split: Split, index: int, *preparation: Any) -> dict[str, np.ndarray]:
    """An image and its label."""
    return {"image": read_image(split.images[index], *preparation), "label": split.labels[index]}


def _read_options(workers: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1)


ENDLESS = 2**52  # images


def training_batches(
    split: Split,
    resolution: int,
    batch_size: int,
    seed: int,
    workers: int,
    start: int = 0,
    augmentation: str = "crop",
    part: Part = WHOLE,
) -> Iterator[HostBatch]:
    """Batches `start`, `start + 1`, ... without end: augmented, reshuffled every epoch. Of each, the given part."""
    prepare = AUGMENTATIONS[augmentation]
    dataset = (
        grain.MapDataset.range(len(split))
        .seed(seed)
        .shuffle()
        .repeat(ENDLESS // len(split))  # without a number, lengths of batches of one image overflow
        .random_map(lambda index, random: _example(split, index, resolution, prepare, random))
        .batch(batch_size // part.count)
    )
    return iter(dataset[start * part.count + part.index :: part.count].to_iter_dataset(_read_options(workers)))


def evaluation_batches(
    split: Split, resolution: int, batch_size: int, workers: int, part: Part = WHOLE
) -> Iterator[HostBatch]:
    """Every image once, in the list's order. The last batch is filled up with images that are not `valid`.

    Of each batch, the given part.
    """

    def example(index: int) -> dict[str, np.ndarray]:
        if index < len(split):
            return _example(split, index, resolution) | {"valid": np.bool_(True)}
        blank = np.zeros((resolution, resolution, 3), np.uint8)
        return {"image": blank, "label": np.int32(0), "valid": np.bool_(False)}

    filled_up = -(-len(split) // batch_size) * batch_size
    dataset = grain.MapDataset.range(filled_up).map(example).batch(batch_size // part.count)
    return iter(dataset[part.index :: part.count].to_iter_dataset(_read_options(workers)))


# ------------------------------------------------------------------------------------------- devices and processes

EVALUATED_AT_ONCE = 64  # images a device: ViT-L/14 holds some 20 MB of activations for each


def writes_files() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return jax.process_index() == 0


def device_mesh(batch_size: int, accumulate: int = 1) -> Mesh:
    """All devices of all processes along the axis `data`, those of one process side by side.

    Raises InputError where they cannot share a batch, split into `accumulate`, evenly.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    if batch_size % (len(devices) * accumulate):
        parts = f" times --accumulate {accumulate}" if accumulate > 1 else ""
        raise InputError(
            f"--batch-size {batch_size} does not divide among {len(devices)} devices{parts}: give a multiple of "
            f"{len(devices) * accumulate}"
        )
    # Auto: the compiler propagates shardings; Explicit axes would become part of every array's type.
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def evaluation_batch_size(batch_size: int, accumulate: int = 1) -> int:
    """Images to evaluate at once, over all devices: no more a device than it trains on at once, nor than fit."""
    of_device = batch_size // (accumulate * jax.device_count())
    return min(max(of_device, 1), EVALUATED_AT_ONCE) * jax.device_count()


def own_part() -> Part:
    """The part of every batch that this process reads."""
    return Part(jax.process_index(), jax.process_count())


def shard_batch(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch, of which each process gives its own part, on the devices, each holding its share."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def shardings(tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """Where each leaf lies: a copy on every device or, with `fsdp`, cut along its largest axis that divides evenly."""

    def of_leaf(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(np.shape(leaf)) if size and size % mesh.size == 0]
        if not fsdp or not divisible:
            return NamedSharding(mesh, PartitionSpec())
        largest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "data"))

    return jax.tree.map(of_leaf, tree)


def place(tree: Any, mesh: Mesh, fsdp: bool = False) -> Any:
    """The arrays, which every process has in full, on the devices as `shardings` tells."""
    return jax.device_put(tree, shardings(tree, mesh, fsdp))


def fetch(tree: Any) -> Any:
    """The arrays in full, in every process's own memory: copies, which outlive a donated original."""

    def of_leaf(leaf: Any) -> np.ndarray:
        lies_elsewhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        return np.array(process_allgather(leaf, tiled=True) if lies_elsewhere else leaf)

    return jax.tree.map(of_leaf, tree)
