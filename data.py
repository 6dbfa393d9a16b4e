"""Images: the lists that name them, preprocessing, augmentation, batches, and their placement on devices.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py` uses it.

Batch number t is a pure function of the split, the seed and t, whatever the number of threads. Images leave here as
uint8; `clip.standardize` turns them into floats on the device.
"""

import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from tqdm import tqdm

import minidomain
from clip import InputError, unknown


class ListedFile(NamedTuple):
    """An image file and the place that names it, for messages."""

    path: Path
    place: str


@dataclass(frozen=True)
class Split:
    """Images, as files or as pixels, with labels; `classes` are names in label order."""

    name: str
    classes: tuple[str, ...]
    images: tuple[ListedFile, ...] | UInt8[np.ndarray, "images height width 3"]
    labels: Int[np.ndarray, " images"]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Data:
    """What one run needs: to train on, to select on, and to report on, the reference first."""

    train: Split
    selection: Split
    reports: dict[str, Split]


# --------------------------------------------------------------------------------------------------- DomainNet's lists


def read_list(
    root: Path, name: str, classes: tuple[str, ...] = ()
) -> tuple[list[ListedFile], Int[np.ndarray, " images"], tuple[str, ...]]:
    """Files, labels and class folders (in label order) of `root/name`, one `DOMAIN/CLASS/FILE LABEL` a line.

    `classes`, where given, are the training list's: the list keeps to them, but need not have images of all. Raises
    InputError, naming list and line, for a malformed line or a label that disagrees with its folder.
    """
    source = root / name
    try:
        text = source.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list {source} cannot be read ({error}): restore it as UTF-8 text") from error
    if not text.strip():
        raise InputError(f"list {source} is empty: it needs one 'DOMAIN/CLASS/FILE LABEL' a line")
    files, labels = [], []
    # What earlier lines, or the training list, told: the label of a folder and the folder of a label.
    first = {folder: (label, "the training list") for label, folder in enumerate(classes)}
    folders = dict(enumerate(classes))
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        place = f"{source} line {number}"
        path, _, label = line.strip().rpartition(" ")
        *_, folder, file = "", *path.split("/")  # pathlib would take seconds for all of DomainNet
        if not (folder and file and label.isascii() and label.isdigit() and len(label) < 10):
            raise InputError(f"{place}: {line!r} is not 'DOMAIN/CLASS/FILE LABEL': correct the line")
        if classes and folder not in first:
            raise InputError(f"{place}: folder {folder!r} is no class of the training list: correct one")
        known, told = first.setdefault(folder, (int(label), f"line {number}"))
        if int(label) != known:
            raise InputError(
                f"{place}: {path} has label {label}, but {told} gives folder {folder!r} label {known}: correct one"
            )
        other = folders.setdefault(known, folder)
        if other != folder:
            raise InputError(
                f"{place}: {path} has label {label}, but {first[other][1]} gives it to folder {other!r}: correct one"
            )
        files.append(ListedFile(root / path, place))
        labels.append(known)
    if missing := set(range(len(folders))) - set(folders):
        raise InputError(f"list {source} has no label {min(missing)}: number the classes from 0 without gaps")
    return files, np.array(labels, np.int32), tuple(folders[label] for label in range(len(folders)))


def wrong_root(root: Path, lacking: str, layout: str) -> InputError:
    """An error for a data root of the wrong shape, with what it holds and what it should."""
    found = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else ["no such folder"]
    return InputError(f"--data-root {root} has {lacking} (found: {', '.join(found) or 'nothing'}): expected {layout}")


def choose_shifts(domains: Sequence[str], reference: str, shifts: tuple[str, ...]) -> tuple[str, ...]:
    """`shifts`, or all domains but the reference. Raises InputError for unknown ones and for the reference itself."""
    for domain in (reference, *shifts):
        if domain not in domains:
            raise unknown("split", domain, domains)
    if reference in shifts:
        raise InputError(f"split {reference!r} is the reference and a shift at once: leave it out of --shifts")
    return shifts or tuple(domain for domain in domains if domain != reference)


def read_domainnet(
    root: Path | None, reference: str, shifts: tuple[str, ...], select_on: str, keep_underscores: bool = False
) -> Data:
    """DomainNet's layout: `DOMAIN/CLASS/FILE`, listed in `DOMAIN_train.txt`, `DOMAIN_test.txt`, maybe `DOMAIN_val.txt`.

    `shifts` may be empty: then every other domain that has a test list. `select_on` is `val` (the validation list, else
    a tenth of the training list, held out) or `test`, as the paper did. Class names are the folders', with spaces for
    underscores. Raises InputError where lists are missing, wrong, or tell different classes.
    """
    if root is None:
        raise InputError("--data-root is needed with --data domainnet: the folder that holds DOMAIN_train.txt")
    domains = sorted(path.name.removesuffix("_test.txt") for path in root.glob("*_test.txt"))
    if not domains:
        layout = "DOMAIN/CLASS/FILE with the lists DOMAIN_train.txt and DOMAIN_test.txt"
        raise wrong_root(root, "no DOMAIN_test.txt", layout)
    if not reference:
        raise InputError(f"--reference is needed with --data domainnet: one of {', '.join(domains)}")
    shifts = choose_shifts(domains, reference, shifts)
    classes: tuple[str, ...] = ()

    def read(name: str, split: str) -> Split:
        nonlocal classes
        # Test and validation lists may lack a class; an unknown folder or another label is an error.
        files, labels, classes = read_list(root, name, classes)
        names = classes if keep_underscores else tuple(folder.replace("_", " ") for folder in classes)
        return Split(split, names, tuple(files), labels)

    train = read(f"{reference}_train.txt", "train")
    reports = {domain: read(f"{domain}_test.txt", domain) for domain in (reference, *shifts)}
    if select_on == "test":
        return Data(train, reports[reference], reports)
    if (root / f"{reference}_val.txt").exists():
        return Data(train, read(f"{reference}_val.txt", "val"), reports)
    return Data(*hold_out_tenth(train), reports)


def hold_out_tenth(train: Split) -> tuple[Split, Split]:
    """`train` without every tenth image of it, counted class by class, and those: the same whatever the seed."""
    order = np.argsort(train.labels, kind="stable")
    if len(order) < 10:
        raise InputError(f"{len(order)} training images are too few to hold out a tenth: give --select-on test")
    held_out = np.zeros(len(order), bool)
    held_out[order[9::10]] = True

    def take(name: str, indices: Int[np.ndarray, " taken"]) -> Split:
        return replace(
            train, name=name, images=tuple(train.images[index] for index in indices), labels=train.labels[indices]
        )

    return take("train", np.flatnonzero(~held_out)), take("val", np.flatnonzero(held_out))


def of_classes(split: Split, kept: Int[np.ndarray, " kept"]) -> Split:
    """The images of the kept classes alone, these numbered anew in the same order."""
    indices = np.flatnonzero(np.isin(split.labels, kept))
    images = split.images
    images = images[indices] if isinstance(images, np.ndarray) else tuple(images[index] for index in indices)
    labels = np.searchsorted(kept, split.labels[indices]).astype(np.int32)
    return Split(split.name, tuple(split.classes[index] for index in kept), images, labels)


# -------------------------------------------------------------------------------------------------------- CUB-200-2011

CUB_LAYOUT = "images/, images.txt, image_class_labels.txt, train_test_split.txt and classes.txt, as CUB_200_2011 has"


def read_numbered(path: Path) -> dict[int, tuple[str, str]]:
    """The values of a file with one `ID VALUE` a line, by id, each with its place for messages.

    Raises InputError, naming file and line, for a malformed line or an id that comes twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): restore it as UTF-8 text") from error
    values: dict[int, tuple[str, str]] = {}
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        identity, _, value = line.strip().partition(" ")
        if not (identity.isascii() and identity.isdigit() and len(identity) < 10 and value):
            raise InputError(f"{place}: {line!r} is not 'ID VALUE': correct the line")
        if int(identity) in values:
            raise InputError(f"{place}: {values[int(identity)][1]} has id {identity} already: delete one of them")
        values[int(identity)] = (value, place)
    return values


def read_cub(
    root: Path | None, reference: str, shifts: tuple[str, ...], select_on: str, keep_underscores: bool = False
) -> Data:
    """CUB-200-2011 (Wah et al. 2011) from its own files: one reported split, `cub`, and no shifts.

    Labels follow the ids of classes.txt, whose names lose their numbers; `val` is a tenth of the training images, held
    out. Raises InputError, naming file and line, where the files are missing, malformed or do not fit together.
    """
    if root is None:
        raise InputError(f"--data-root is needed with --data cub: the folder that holds {CUB_LAYOUT}")
    choose_shifts(("cub",), reference, shifts)
    names = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    if any(not (root / name).is_file() for name in names):
        raise wrong_root(root, "no CUB-200-2011", CUB_LAYOUT)
    paths, class_of, part_of, title_of = (read_numbered(root / name) for name in names)
    for name, values in (("image_class_labels.txt", class_of), ("train_test_split.txt", part_of)):
        for some, others, lacking in ((paths, values, name), (values, paths, "images.txt")):
            for image in some.keys() - others.keys():
                raise InputError(f"{some[image][1]}: id {image} is not in {root / lacking}: correct one of the files")
    if absent := set(range(1, len(title_of) + 1)) - title_of.keys():
        raise InputError(f"{root / 'classes.txt'} has no id {min(absent)}: number the classes from 1 without gaps")
    for bird, place in class_of.values():
        if not (bird.isascii() and bird.isdigit() and int(bird) in title_of):
            raise InputError(f"{place}: {bird!r} is no class of {root / 'classes.txt'}: correct the line")
    for part, place in part_of.values():
        if part not in ("0", "1"):
            raise InputError(f"{place}: {part!r} is neither 1 (to train on) nor 0 (to test on): correct the line")
    titles = [re.sub(r"^\d+\.", "", title_of[bird][0]) for bird in sorted(title_of)]
    classes = tuple(titles if keep_underscores else [title.replace("_", " ") for title in titles])

    def read(split: str, part: str) -> Split:
        chosen = [image for image in paths if part_of[image][0] == part]
        if not chosen:
            raise InputError(
                f"{root / 'train_test_split.txt'} has no line 'ID {part}': {split} has no image; restore it"
            )
        files = tuple(ListedFile(root / "images" / paths[image][0], paths[image][1]) for image in chosen)
        return Split(split, classes, files, np.array([int(class_of[image][0]) - 1 for image in chosen], np.int32))

    train, test = read("train", "1"), read("cub", "0")
    if select_on == "test":
        return Data(train, test, {"cub": test})
    return Data(*hold_out_tenth(train), {"cub": test})


# ---------------------------------------------------------------------------------------------------------- minidomain


def read_minidomain(
    root: Path | None, reference: str, shifts: tuple[str, ...], select_on: str, keep_underscores: bool = False
) -> Data:
    """The embedded benchmark, drawn where the cache does not hold it. No class of it has an underscore to keep.

    Raises InputError for an unknown domain, or where `root` is given: there is nothing to read.
    """
    if root is not None:
        raise InputError(f"--data minidomain is drawn, not read from --data-root {root}: give --data domainnet")
    shifts = choose_shifts(minidomain.DOMAINS, reference, shifts)

    def read(name: str, domain: str, split: str) -> Split:
        return Split(name, minidomain.CLASSES, *minidomain.load(domain, split))

    reports = {domain: read(domain, domain, "test") for domain in (reference, *shifts)}
    selection = reports[reference] if select_on == "test" else read("val", reference, "val")
    return Data(read("train", reference, "train"), selection, reports)


DATASETS = {"minidomain": read_minidomain, "domainnet": read_domainnet, "cub": read_cub}

# -------------------------------------------------------------------------------------------------------- image files


def open_image(file: ListedFile | UInt8[np.ndarray, "height width 3"]) -> Image.Image:
    """The image, opened but not yet decoded. Raises InputError naming file and place."""
    if isinstance(file, np.ndarray):
        return Image.fromarray(file)
    try:
        return Image.open(file.path)
    except FileNotFoundError as error:
        raise InputError(f"{file.place}: {file.path} does not exist: restore it or delete the line") from error
    except Exception as error:  # Pillow's readers raise whatever the damage causes
        raise broken_image(file, error) from error


def broken_image(file: ListedFile, error: Exception) -> InputError:
    return InputError(f"{file.place}: {file.path} is no readable image ({error}): replace it or delete the line")


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


def check_images(splits: list[Split], workers: int) -> None:
    """Checks every file of the splits before any long work begins. Raises InputError for the first that is broken."""
    listed = [split for split in splits if not isinstance(split.images, np.ndarray)]
    files = list(dict.fromkeys(file for split in listed for file in split.images))
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for _ in tqdm(pool.map(check_image, files), "checking images", len(files), unit="image", leave=False, delay=2):
            pass


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
    pixels = to_rgb(image)
    return pixels[:, ::-1] if random.random() < 0.5 else pixels


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
    return {"image": read_image(split.images[index], *preparation), "label": split.labels[index]}


def _read_options(workers: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers + 1)


def training_batches(
    split: Split,
    resolution: int,
    batch_size: int,
    seed: int,
    workers: int,
    start: int = 0,
    augmentation: str = "crop",
) -> Iterator[HostBatch]:
    """Batches `start`, `start + 1`, ... without end: augmented, reshuffled every epoch."""
    prepare = AUGMENTATIONS[augmentation]
    dataset = (
        grain.MapDataset.range(len(split))
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(lambda index, random: _example(split, index, resolution, prepare, random))
        .batch(batch_size)
    )
    return iter(dataset[start:].to_iter_dataset(_read_options(workers)))


def evaluation_batches(split: Split, resolution: int, batch_size: int, workers: int) -> Iterator[HostBatch]:
    """Every image once, in the list's order. The last batch is filled up with images that are not `valid`."""

    def collect(examples: list[dict[str, np.ndarray]]) -> HostBatch:
        batch = {key: np.stack([example[key] for example in examples]) for key in ("image", "label")}
        missing = batch_size - len(examples)
        padded = {key: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for key, array in batch.items()}
        return padded | {"valid": np.arange(batch_size) < len(examples)}

    dataset = (
        grain.MapDataset.range(len(split))
        .map(lambda index: _example(split, index, resolution))
        .batch(batch_size, batch_fn=collect)
    )
    return iter(dataset.to_iter_dataset(_read_options(workers)))


# ------------------------------------------------------------------------------------------------------------- devices


def device_mesh(batch_size: int) -> Mesh:
    """All devices along the axis `data`. Raises InputError where they cannot share a batch evenly."""
    devices = jax.device_count()
    if batch_size % devices:
        raise InputError(f"--batch-size {batch_size} does not divide among {devices} devices: give a multiple of them")
    # Auto: the compiler propagates shardings; Explicit axes would become part of every array's type.
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def shard_batch(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch on the devices, each holding its part."""
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A copy of every array on each device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
