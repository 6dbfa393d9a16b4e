"""From image files to batches: splits, checks, preprocessing, augmentation, batches.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py` uses it; `support/layouts/`
finds the images of each data set.

Batch t is a pure function of (split, seed, t), whatever the number of threads or processes. Batches
contain uint8 images; `clip.standardize` turns them into floats on the device.
"""

import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, PngImagePlugin

from clip import Preparation
from support.devices import WHOLE, Part, progress
from support.errors import InputError, few

# -------------------------------------------------------------------------------------- splits


class ListedFile(NamedTuple):
    """An image file and, for error messages, the line of the list that names it, if one does."""

    path: Path
    place: str = ""


ImageSource = ListedFile | UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True, eq=False)
class Files:
    """Image files under one folder, stored as names: a million paths would take half a gigabyte."""

    root: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | np.integer) -> ListedFile:
        return ListedFile(self.root / self.names[index])


@dataclass(frozen=True)
class Split:
    """Labelled images, as files or as pixels. `classes` are the class names in label order.

    `compared` marks the classes that a prediction chooses from. None: all.
    """

    name: str
    classes: tuple[str, ...]
    images: Sequence[ImageSource] | Files | UInt8[np.ndarray, "images height width 3"]
    labels: Int[np.ndarray, " images"]
    compared: Bool[np.ndarray, " classes"] | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Data:
    """The splits of one run: to train on, to select on, and to report, the reference first."""

    train: Split
    selection: Split
    reports: dict[str, Split]


def take(split: Split, indices: Int[np.ndarray, " taken"], name: str) -> Split:
    """Returns the images at `indices`, in that order, as a split with another name."""
    images = split.images
    if isinstance(images, np.ndarray):
        images = images[indices]
    elif isinstance(images, Files):
        images = replace(images, names=tuple(images.names[index] for index in indices))
    else:
        images = tuple(images[index] for index in indices)
    return replace(split, name=name, images=images, labels=split.labels[indices])


def digest(split: Split) -> int:
    """Returns a checksum of the names and labels of a split, or of its pixels and labels."""
    images = split.images
    if isinstance(images, np.ndarray):
        content = np.ascontiguousarray(images).data
    else:
        names = images.names if isinstance(images, Files) else [str(each) for each in images]
        content = "\n".join(names).encode()
    return zlib.crc32(np.ascontiguousarray(split.labels).data, zlib.crc32(content))


def hold_out(train: Split, every: int = 10, name: str = "val") -> tuple[Split, Split]:
    """Splits off one in `every` images, spread evenly over the classes.

    Returns the rest and the held-out images. The choice depends on no seed, and leaves each class
    an image to train on. Raises InputError if that leaves nothing to hold out.
    """
    order = np.argsort(train.labels, kind="stable")
    held_out = np.zeros(len(order), bool)
    held_out[order[every - 1 :: every]] = True
    held_out &= np.bincount(train.labels)[train.labels] > 1
    if not held_out.any():
        problem = f"{len(order)} training images are too few to hold out one in {every}"
        raise InputError(f"{problem}: give --select-on test or more images")
    rest = take(train, np.flatnonzero(~held_out), train.name)
    return rest, take(train, np.flatnonzero(held_out), name)


def keep_classes(split: Split, kept: Int[np.ndarray, " kept"]) -> Split:
    """Returns the images of the kept classes, with labels 0, 1, ... in the order of `kept`.

    `kept` is ascending.
    """
    images = take(split, np.flatnonzero(np.isin(split.labels, kept)), split.name)
    return replace(
        images,
        classes=tuple(split.classes[index] for index in kept),
        labels=np.searchsorted(kept, images.labels).astype(np.int32),
        compared=None if split.compared is None else split.compared[kept],
    )


# --------------------------------------------------------------------------------- image files

# Pillow refuses images of twice the size that it warns of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Bytes. The notes of painting programs exceed Pillow's limit of 2^20.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # pyrefly: ignore[bad-assignment]


def open_image(source: ImageSource) -> Image.Image:
    """Returns the image, opened but not yet decoded.

    Raises InputError, which names file and list line, if it is broken.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    try:
        image = Image.open(source.path)
        if image.mode in ("F", "LAB") or (image.mode == "I" and image.format != "PPM"):
            image.close()
            problem = f"its pixels have Pillow's mode {image.mode}, of unknown range"
            raise ValueError(f"{problem}: save it as 8-bit RGB")
        return image
    except Exception as error:  # Pillow's readers raise whatever the damage causes
        raise _broken_image(source, error) from error


def _broken_image(file: ListedFile, error: Exception) -> InputError:
    missing = isinstance(error, FileNotFoundError)
    problem = (
        "does not exist: restore it" if missing else f"is no readable image ({error}): replace it"
    )
    if file.place:
        return InputError(f"{file.place}: {file.path} {problem} or delete the line")
    return InputError(f"{file.path} {problem} or leave it out")


def check_image(file: ListedFile) -> None:
    """Decodes an image. Raises InputError if it is missing, no image, or damaged."""
    with open_image(file) as image:
        try:
            image.draft(image.mode, (1, 1))  # a JPEG at an eighth of its size, in half the time
            image.load()
        except Exception as error:
            raise _broken_image(file, error) from error


# All of DomainNet is checked, in minutes (docs/data.md). All of ImageNet, 1.28 million images,
# would take an hour on a slow disk.
CHECK_ALL_UP_TO = 200_000
CHECKED_SAMPLE = 10_000


def check_images(splits: Sequence[Split], workers: int) -> None:
    """Checks image files before any long work begins. Raises InputError that names broken ones.

    Of a split with over 200,000 files, it checks an evenly spread sample. A broken file outside the
    sample raises when it is decoded.
    """
    files = dict.fromkeys(split.images[index] for split in splits for index in _to_check(split))

    def problem(file: ListedFile) -> str:
        try:
            check_image(file)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(max(1, workers)) as pool:
        checks = progress(pool.map(problem, files), "checking images", len(files), "image")
        problems = list(filter(None, checks))
    if problems:
        raise InputError(few(problems, "; "))


def _to_check(split: Split) -> Int[np.ndarray, " checked"]:
    if not len(split) or isinstance(split.images[0], np.ndarray):
        return np.arange(0)
    count = len(split) if len(split) <= CHECK_ALL_UP_TO else CHECKED_SAMPLE
    return np.unique(np.linspace(0, len(split) - 1, count).round().astype(np.int64))


# ------------------------------------------------------------------------------- preprocessing


Square = UInt8[np.ndarray, "side side 3"]


def _to_rgb(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    # It does not affect the pixels, but Pillow warns if a palette has it.
    image.info.pop("transparency", None)
    return np.asarray(image.convert("RGB"))


def eight_bit(image: Image.Image) -> Image.Image:
    """Reduces 16-bit grey to its high byte, as Pillow does for 16-bit colour.

    Pillow's own conversion to RGB would clip it.
    """
    if image.mode == "PA":  # resized, it would be black
        return image.convert("RGB")
    if not image.mode.startswith("I"):
        return image
    high_byte = np.clip(np.asarray(image).astype(np.int32) >> 8, 0, 255)
    return Image.fromarray(high_byte.astype(np.uint8))


def crop_extreme_aspect(image: Image.Image) -> Image.Image:
    """Cuts an image to its middle, at most 50 times as long as wide.

    Resized whole, a longer one would take gigabytes.
    """
    width, height = image.size
    most = 50 * min(image.size)
    left, top = max(width - most, 0) // 2, max(height - most, 0) // 2
    return image.crop((left, top, width - left, height - top)) if left or top else image


def evaluation_image(image: Image.Image, preparation: Preparation) -> Square:
    """Resizes an image, crops the centre and makes it RGB, as OpenAI and open_clip do."""
    size = preparation.size
    edge = size + preparation.margin
    image = eight_bit(image)
    if preparation.squash:
        width, height = edge, edge
    else:
        image = crop_extreme_aspect(image)
        width, height = (int(edge * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), preparation.resample)
    left, top = (round((side - size) / 2) for side in (width, height))  # ties to even
    return _to_rgb(image.crop((left, top, left + size, top + size)))


def random_crop(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Returns left, top, width and height of a crop.

    It has 8 % to 100 % of the area and an aspect ratio of 3/4 to 4/3. If ten draws do not fit into
    the image, it is the largest centre crop with such a ratio.
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
    image: Image.Image, preparation: Preparation, random: np.random.Generator
) -> Square:
    """A random crop, resized with the model's filter and mirrored with probability 1/2."""
    size = preparation.size
    width, height = image.size
    left, top, w, h = random_crop(width, height, random)
    # A JPEG decodes at 1/2, 1/4 or 1/8 of its size at a fraction of the cost. The crop must keep
    # enough pixels.
    smallest = math.ceil(width * size / w), math.ceil(height * size / h)
    drafted = image.draft(image.mode, smallest)
    scale = drafted[1][2] / width if drafted else 1  # exact, while the image's size is rounded up
    box = (left * scale, top * scale, (left + w) * scale, (top + h) * scale)
    image = eight_bit(image).resize((size, size), preparation.resample, box)
    # By Pillow: a mirrored view of NumPy takes ten times as long to copy into a batch.
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _to_rgb(image)


AUGMENTATIONS = {
    "crop": training_image,
    "off": lambda image, preparation, random: evaluation_image(image, preparation),
}

# ------------------------------------------------------------------------------------- batches

Labels = Int[np.ndarray, " batch"]
Valid = Bool[np.ndarray, " batch"]
HostBatch = dict[str, UInt8[np.ndarray, "batch side side 3"] | Labels | Valid]


def read_image(
    source: ImageSource,
    preparation: Preparation | int,
    prepare: Callable = evaluation_image,
    *random: np.random.Generator,
) -> Square:
    """Returns the decoded and prepared image; a number of pixels means OpenAI's preparation.

    Raises InputError, which names file and list line, if it is broken.
    """
    if isinstance(preparation, int):
        preparation = Preparation(preparation)
    with open_image(source) as image:
        try:
            return prepare(image, preparation, *random)
        except Exception as error:
            if isinstance(source, np.ndarray):  # no file: a fault of ours
                raise
            raise _broken_image(source, error) from error


def _read_options(workers: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1)


ENDLESS = 2**52  # images


def training_batches(
    split: Split,
    preparation: Preparation,
    batch_size: int,
    seed: int,
    workers: int,
    start: int = 0,
    augmentation: str = "crop",
    part: Part = WHOLE,
) -> Iterator[HostBatch]:
    """Yields `part` of the batches `start`, `start + 1`, ... without end.

    Images are augmented, and reshuffled every epoch.
    """
    prepare = AUGMENTATIONS[augmentation]

    def example(index: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        image = read_image(split.images[index], preparation, prepare, random)
        return {"image": image, "label": split.labels[index]}

    epochs = ENDLESS // len(split)  # with infinitely many, the length of a batch of one overflows
    examples = grain.MapDataset.range(len(split)).seed(seed).shuffle().repeat(epochs)
    parts = examples.random_map(example).batch(batch_size // part.count)
    # Each batch is `part.count` consecutive elements, one per process.
    own = parts[start * part.count + part.index :: part.count]
    return iter(own.to_iter_dataset(_read_options(workers)))


def evaluation_batches(
    split: Split, preparation: Preparation, batch_size: int, workers: int, part: Part = WHOLE
) -> Iterator[HostBatch]:
    """Yields `part` of batches with each image once, in order.

    Blank images that fill up the last batch are not `valid`.
    """

    def example(index: int) -> dict[str, np.ndarray | np.generic]:
        if index < len(split):
            image = read_image(split.images[index], preparation)
            return {"image": image, "label": split.labels[index], "valid": np.bool_(True)}
        blank = np.zeros((preparation.size, preparation.size, 3), np.uint8)
        return {"image": blank, "label": np.int32(0), "valid": np.bool_(False)}

    padded_length = math.ceil(len(split) / batch_size) * batch_size
    parts = grain.MapDataset.range(padded_length).map(example).batch(batch_size // part.count)
    return iter(parts[part.index :: part.count].to_iter_dataset(_read_options(workers)))
