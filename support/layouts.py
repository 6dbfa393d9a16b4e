"""The layouts of data sets on disk: which images a run trains on, selects on and reports, with which labels.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --data NAME --data-root DIR` uses it.

`DATASETS` holds a reader for each name. All readers take the root, the reference, the shifts (none: the default), what
to select on (`val`, or `test`: the reference's reported images, as the paper did) and whether class names keep their
underscores. All raise InputError, before any image is opened, for a root that is not laid out as they expect.
"""

import os
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from data import Data, Files, ListedFile, Split, hold_out, take
from support import download, minidomain
from support.errors import InputError, read_lines, read_text, unknown
from support.options import Sources


def wrong_root(root: Path, lacking: str, layout: str, option: str = "--data-root") -> InputError:
    """An error for a data root of the wrong shape, with what it holds and what it should."""
    found = sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else ["no such folder"]
    return InputError(f"{option} {root} has {lacking} (found: {', '.join(found) or 'nothing'}): expected {layout}")


def needed_root(root: Path | None, data_set: str, layout: str) -> Path:
    """The root. Raises InputError, with the layout expected, where none is given."""
    if root is None:
        raise InputError(f"--data-root is needed with --data {data_set}: the folder that holds {layout}")
    return root


def choose_shifts(
    splits: Sequence[str], reference: str, shifts: tuple[str, ...], left_out: Collection[str] = ()
) -> tuple[str, ...]:
    """`shifts`, or all splits but the reference and those `left_out`.

    Raises InputError for unknown ones, for one that comes twice, and for the reference itself.
    """
    for split in (reference, *shifts):
        if split not in splits:
            raise unknown("split", split, splits)
    if reference in shifts:
        raise InputError(f"split {reference!r} is the reference and a shift at once: leave it out of --shifts")
    for split in shifts:
        if shifts.count(split) > 1:
            raise InputError(f"--shifts has {split!r} twice: give it once")
    return shifts or tuple(split for split in splits if split not in (reference, *left_out))


def readable(folder: str, keep_underscores: bool) -> str:
    """The name of a class from its folder's."""
    return folder if keep_underscores else folder.replace("_", " ")


def is_number(text: str) -> bool:
    """Whether it is a short number in ASCII digits."""
    return text.isascii() and text.isdigit() and len(text) < 10


# ---------------------------------------------------------------------------------------------------- DomainNet's lists


def read_list(
    root: Path, name: str, classes: tuple[str, ...] = ()
) -> tuple[list[ListedFile], Int[np.ndarray, " images"], tuple[str, ...]]:
    """Files, labels and class folders (in label order) of `root/name`, one `DOMAIN/CLASS/FILE LABEL` a line.

    `classes`, where given, are the training list's: the list keeps to them, but need not have images of all. Raises
    InputError, naming list and line, for a malformed line, an image listed twice, or a label that disagrees with its
    folder.
    """
    source = root / name
    text = read_text(source, f"list {source}")
    if not text.strip():
        raise InputError(f"list {source} is empty: it needs one 'DOMAIN/CLASS/FILE LABEL' a line")
    files, labels = [], []
    # What earlier lines, or the training list, told: the label of a folder and the folder of a label.
    first = {folder: (label, "the training list") for label, folder in enumerate(classes)}
    folders = dict(enumerate(classes))
    listed: dict[str, int] = {}
    for number, line in enumerate(text.rstrip().split("\n"), start=1):
        place = f"{source} line {number}"
        path, _, label = line.strip().rpartition(" ")
        *_, folder, file = "", *path.split("/")  # pathlib would take seconds for all of DomainNet
        if not (folder and file and is_number(label)):
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
        if (earlier := listed.setdefault(path, number)) != number:
            raise InputError(f"{place}: line {earlier} has {path} already: delete one of them")
        files.append(ListedFile(root / path, place))
        labels.append(known)
    if missing := set(range(len(folders))) - set(folders):
        raise InputError(f"list {source} has no label {min(missing)}: number the classes from 0 without gaps")
    return files, np.array(labels, np.int32), tuple(folders[label] for label in range(len(folders)))


def read_domainnet(
    root: Path | None, reference: str, shifts: tuple[str, ...], select_on: str, keep_underscores: bool = False
) -> Data:
    """DomainNet's layout: `DOMAIN/CLASS/FILE`, listed in `DOMAIN_train.txt`, `DOMAIN_test.txt`, maybe `DOMAIN_val.txt`.

    `shifts` may be empty: then every other domain that has a test list, but Quickdraw. `select_on` is `val` (the
    validation list, else a tenth of the training list, held out) or `test`, as the paper did. Class names are the
    folders', with spaces for underscores. Raises InputError where lists are missing, wrong, or tell different classes.
    """
    if root is None:
        raise InputError("--data-root is needed with --data domainnet: the folder that holds DOMAIN_train.txt")
    domains = sorted(path.name.removesuffix("_test.txt") for path in root.glob("*_test.txt"))
    if not domains:
        layout = "DOMAIN/CLASS/FILE with the lists DOMAIN_train.txt and DOMAIN_test.txt"
        raise wrong_root(root, "no DOMAIN_test.txt", layout)
    if not reference:
        raise InputError(f"--reference is needed with --data domainnet: one of {', '.join(domains)}")
    # The paper leaves Quickdraw out: its drawings are too plain to be told apart, by any of the models.
    shifts = choose_shifts(domains, reference, shifts, left_out=("quickdraw",))
    classes: tuple[str, ...] = ()

    def read(name: str, split: str) -> Split:
        nonlocal classes
        # Test and validation lists may lack a class; an unknown folder or another label is an error.
        files, labels, classes = read_list(root, name, classes)
        names = tuple(readable(folder, keep_underscores) for folder in classes)
        return Split(split, names, tuple(files), labels)

    train = read(f"{reference}_train.txt", "train")
    reports = {domain: read(f"{domain}_test.txt", domain) for domain in (reference, *shifts)}
    if select_on == "test":
        return Data(train, reports[reference], reports)
    if (root / f"{reference}_val.txt").exists():
        return Data(train, read(f"{reference}_val.txt", "val"), reports)
    return Data(*hold_out(train), reports)


# --------------------------------------------------------------------------------------------------------- CUB-200-2011

CUB_LAYOUT = "images/, images.txt, image_class_labels.txt, train_test_split.txt and classes.txt, as CUB_200_2011 has"


def read_numbered(path: Path) -> dict[int, tuple[str, str]]:
    """The values of a file with one `ID VALUE` a line, by id, each with its place for messages.

    Raises InputError, naming file and line, for a malformed line or an id that comes twice.
    """
    values: dict[int, tuple[str, str]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        place = f"{path} line {number}"
        identity, _, value = line.strip().partition(" ")
        if not (is_number(identity) and value):
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
    root = needed_root(root, "cub", CUB_LAYOUT)
    choose_shifts(("cub",), reference, shifts)
    names = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
    if any(not (root / name).is_file() for name in names):
        raise wrong_root(root, "no CUB-200-2011", CUB_LAYOUT)
    paths, class_of, part_of, title_of = (read_numbered(root / name) for name in names)
    for name, values in (("image_class_labels.txt", class_of), ("train_test_split.txt", part_of)):
        for some, others, lacking in ((paths, values, name), (values, paths, "images.txt")):
            if alone := some.keys() - others.keys():
                image = min(alone)
                raise InputError(f"{some[image][1]}: id {image} is not in {root / lacking}: correct one of the files")
    if absent := set(range(1, len(title_of) + 1)) - title_of.keys():
        raise InputError(f"{root / 'classes.txt'} has no id {min(absent)}: number the classes from 1 without gaps")
    for bird, place in class_of.values():
        if not is_number(bird) or int(bird) not in title_of:
            raise InputError(f"{place}: {bird!r} is no class of {root / 'classes.txt'}: correct the line")
    for part, place in part_of.values():
        if part not in ("0", "1"):
            raise InputError(f"{place}: {part!r} is neither 1 (to train on) nor 0 (to test on): correct the line")
    listed: dict[str, str] = {}
    for path, place in paths.values():
        if (earlier := listed.setdefault(path, place)) != place:
            raise InputError(f"{place}: {earlier} has {path} already: delete one of them in all three files")
    titles = [re.sub(r"^\d+\.", "", title_of[bird][0]) for bird in sorted(title_of)]
    classes = tuple(readable(title, keep_underscores) for title in titles)

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
    return Data(*hold_out(train), {"cub": test})


# -------------------------------------------------------------------------------------------------------- class folders


class Tree(NamedTuple):
    """Class folders in the order of their names, the number of images in each, and the images, folder after folder."""

    folders: tuple[str, ...]
    counts: tuple[int, ...]
    images: Files


SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def entries(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, but hidden things. Raises InputError where it cannot be listed."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"folder {folder} cannot be listed ({error}): make it readable or delete it") from error


def image_names(folder: Path) -> list[str]:
    """The image files of a folder, in the order of their names. Hidden files and other kinds are none."""
    return sorted((entry.name for entry in entries(folder) if entry.name.lower().endswith(SUFFIXES)), key=os.fsencode)


def class_folders(root: Path) -> tuple[str, ...]:
    """The folders, or links to folders, in a folder that are not hidden, in the order of their names."""
    # Links alone are looked up: of 50,000 images in one folder, that would take a network's disk a minute.
    folders = (e for e in entries(root) if e.is_dir(follow_symlinks=False) or (e.is_symlink() and os.path.isdir(e)))
    return tuple(sorted(entry.name for entry in folders))


def read_tree(root: Path) -> Tree:
    """`root/CLASS/IMAGE`. Raises InputError for a class folder without images."""
    root = root.resolve()
    folders = class_folders(root)
    with ThreadPoolExecutor(16) as pool:  # a network's disk answers many at once
        listed = list(pool.map(lambda name: image_names(root / name), folders))
    for folder, names in zip(folders, listed, strict=True):
        if not names:
            raise InputError(f"{root / folder} has no image ({' '.join(SUFFIXES)}): add some or delete it")
    names = tuple(f"{folder}/{name}" for folder, names in zip(folders, listed, strict=True) for name in names)
    return Tree(folders, tuple(map(len, listed)), Files(root, names))


def split_of_tree(name: str, tree: Tree, classes: tuple[str, ...], label_of: dict[str, int], told_by: str) -> Split:
    """A split with the labels of its folders, in label order. Raises InputError for a folder without one."""
    for folder in tree.folders:
        if folder not in label_of:
            raise InputError(
                f"{tree.images.root / folder} is no class of {told_by}: rename or delete it, or leave {name} out of "
                "--shifts"
            )
    label_of_folder = np.array([label_of[folder] for folder in tree.folders], np.int32)
    split = Split(name, classes, tree.images, np.repeat(label_of_folder, tree.counts))
    if np.all(np.diff(label_of_folder) > 0):
        return split
    return take(split, np.argsort(split.labels, kind="stable"), name)


FOLDER_LAYOUT = "train/CLASS/IMAGE to train on, val/CLASS/IMAGE to report, and SHIFT/CLASS/IMAGE for each shift"


def read_folder(
    root: Path | None, reference: str, shifts: tuple[str, ...], select_on: str, keep_underscores: bool = False
) -> Data:
    """`train/CLASS/IMAGE` to train on, `REFERENCE/CLASS/IMAGE` and `SHIFT/CLASS/IMAGE` to report. Names are folders'.

    The reference is `val` by default; without that folder, it is a tenth of the training images, held out. `select_on`
    `val` is the folder val where the reference is another, else (another) tenth of the training images. `shifts` may be
    empty: then every other folder that has class folders. A shift may lack classes, but have none of its own.
    """
    root = needed_root(root, "folder", FOLDER_LAYOUT)
    splits = [name for name in class_folders(root) if class_folders(root / name)] if root.is_dir() else []
    if "train" not in splits:
        raise wrong_root(root, "no train/CLASS", FOLDER_LAYOUT)
    tree = read_tree(root / "train")
    label_of = {folder: label for label, folder in enumerate(tree.folders)}
    classes = tuple(readable(folder, keep_underscores) for folder in tree.folders)

    def read(name: str) -> Split:
        return split_of_tree(name, read_tree(root / name), classes, label_of, str(root / "train"))

    train = split_of_tree("train", tree, classes, label_of, str(root / "train"))
    known = [name for name in dict.fromkeys(("val", *splits)) if name != "train"]
    # Where val is not the reference, it is what is selected on.
    shifts = choose_shifts(known, reference, shifts, left_out=("val",))
    if "val" in shifts and "val" not in splits:
        raise wrong_root(root, "no val/CLASS", FOLDER_LAYOUT)
    if reference in splits:
        reported = read(reference)
    else:
        train, reported = hold_out(train, name=reference)
    reports = {reference: reported, **{name: read(name) for name in shifts}}
    if select_on == "test":
        return Data(train, reported, reports)
    if "val" in splits and reference != "val":
        return Data(train, reports["val"] if "val" in shifts else read("val"), reports)
    return Data(*hold_out(train), reports)


# ------------------------------------------------------------------------------------------------------------- ImageNet

# Splits, and the folders that they lie in under --data-root: this project's name, and the published archive's.
IMAGENET = {
    "imagenet": ("imagenet", "ILSVRC/Data/CLS-LOC"),
    "imagenet-v2": ("imagenet-v2", "imagenetv2-matched-frequency-format-val"),
    "imagenet-r": ("imagenet-r",),
    "imagenet-a": ("imagenet-a",),
    "imagenet-sketch": ("imagenet-sketch", "sketch"),
}
IMAGENET_LAYOUT = "imagenet/train/WNID/IMAGE, imagenet/val/WNID/IMAGE, and of the shifts those wanted: " + ", ".join(
    " or ".join(folders) for name, folders in IMAGENET.items() if name != "imagenet"
)


def imagenet_classes() -> tuple[str, ...]:
    """OpenAI's names of the 1,000 classes, in the order of their WordNet ids. Raises InputError without them."""
    return tuple(download.openai_prompts()[0])


def read_imagenet(
    root: Path | None,
    reference: str,
    shifts: tuple[str, ...],
    select_on: str,
    keep_underscores: bool = False,
    split_roots: tuple[str, ...] = (),
) -> Data:
    """ImageNet and its four shifts: V2, R, A and Sketch; `shifts` may be empty: then those that are there.

    Labels follow the order of the WordNet ids, names are OpenAI's, without underscores. Of R and A, only the logits of
    the classes that they have are compared. `split_roots` are `NAME=FOLDER`, for splits that lie elsewhere than under
    `root`. `select_on` `val` is a hundredth of the training images, held out.
    """
    places = dict(split_root.partition("=")[::2] for split_root in split_roots)
    for name, folder in places.items():
        if name not in IMAGENET:
            raise unknown("split of --split-roots", name, IMAGENET)
        if not Path(folder).is_dir() or not folder:
            raise InputError(f"--split-roots {name}={folder}: no such folder: give NAME=FOLDER")
    if "imagenet" not in places:
        root = needed_root(root, "imagenet", IMAGENET_LAYOUT)
    for name, folders in IMAGENET.items() if root else ():
        found = [str(root / folder) for folder in folders if (root / folder).is_dir()]
        if found and name not in places:
            places[name] = found[0]
    if "imagenet" not in places:
        raise wrong_root(root, "no ImageNet", IMAGENET_LAYOUT)
    shifts = choose_shifts(tuple(IMAGENET), reference, shifts, left_out=set(IMAGENET) - set(places))
    if reference != "imagenet":
        raise InputError(f"--reference {reference} has no training images: give imagenet")
    for name in shifts:
        if name not in places:
            raise wrong_root(
                root or Path(places["imagenet"]),
                f"no {' or '.join(IMAGENET[name])}",
                f"one, or --split-roots {name}=DIR",
            )

    base = Path(places["imagenet"])
    if not (base / "train").is_dir() or not (base / "val").is_dir():
        raise wrong_root(base, "no train or no val", "train/WNID/IMAGE and val", "ImageNet's folder")
    tree, classes = read_tree(base / "train"), imagenet_classes()
    for folder in tree.folders:
        if not re.fullmatch(r"n\d{8}", folder):
            raise InputError(f"{base / 'train' / folder} is no WordNet id such as n01440764: rename or delete it")
    if len(tree.folders) != len(classes):
        raise InputError(
            f"{base / 'train'} has {len(tree.folders)} class folders, ImageNet {len(classes)} classes: restore the "
            "others, or give --data folder for a set of your own"
        )
    by_id = {folder: label for label, folder in enumerate(tree.folders)}
    by_number = {str(label): label for label in range(len(classes))}

    def read(name: str) -> Split:
        tree = read_tree(base / "val" if name == "imagenet" else Path(places[name]))
        if not tree.folders:
            raise wrong_root(tree.images.root, "no class folder", "WNID/IMAGE", f"split {name}:")
        label_of = by_number if name == "imagenet-v2" else by_id
        split = split_of_tree(name, tree, classes, label_of, "ImageNet")
        if name not in ("imagenet-r", "imagenet-a"):
            return split
        return replace(split, compared=np.isin(np.arange(len(classes)), split.labels))

    train = split_of_tree("train", tree, classes, by_id, "ImageNet")
    reports = {name: read(name) for name in (reference, *shifts)}
    if select_on == "test":
        return Data(train, reports[reference], reports)
    # A tenth, evaluated fifty times, would cost half of what training does.
    return Data(*hold_out(train, every=100), reports)


# ----------------------------------------------------------------------------------------------------------- minidomain


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


# ---------------------------------------------------------------------------------------------------------------- all

DATASETS = {
    "minidomain": read_minidomain,
    "domainnet": read_domainnet,
    "imagenet": read_imagenet,
    "cub": read_cub,
    "folder": read_folder,
}


def read(sources: Sources) -> Data:
    """The data of a run. Raises InputError as the data set's reader does."""
    chosen = (sources.data_root, sources.reference, sources.shifts, sources.select_on, sources.keep_underscores)
    if sources.data == "imagenet":
        return read_imagenet(*chosen, sources.split_roots)
    if sources.split_roots:
        raise InputError(f"--split-roots is for --data imagenet: leave it out with --data {sources.data}")
    return DATASETS[sources.data](*chosen)
