"""Data sets on disk, and the embedded one: `read` returns the labelled images of a run.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --data NAME --data-root DIR`
uses it.

Each reader takes the root folder, the reference, the shifts (none: its default) and the selection
data: `test` for the reference's reported images, as in the paper, or `val` for images that are not
reported. It raises InputError, before any image is opened, if the root has another layout.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data import Data, Split
from support.errors import InputError, few, read_lines, unknown
from support.layouts import cub, domainnet, folders, imagenet
from support.layouts.common import composed, read_records, wrong_root
from support.layouts.cub import read_cub
from support.layouts.domainnet import read_domainnet
from support.layouts.folders import read_folder
from support.layouts.imagenet import read_imagenet
from support.layouts.minidomain import read_minidomain

READERS: dict[str, tuple[Callable[..., Data], str]] = {
    "minidomain": (read_minidomain, ""),
    "domainnet": (read_domainnet, domainnet.LAYOUT),
    "imagenet": (read_imagenet, imagenet.LAYOUT),
    "cub": (read_cub, cub.LAYOUT),
    "folder": (read_folder, folders.LAYOUT),
}
# The names of classes, by their folders, where those differ.
NAMES = {
    "imagenet": lambda _: tuple(read_lines(imagenet.OPENAI_CLASSES)),
    "cub": lambda folders: tuple(re.sub(r"^\d+\.", "", folder) for folder in folders),
}


def read(
    data_set: str,
    root: Path | None,
    reference: str,
    shifts: tuple[str, ...],
    select_on: str,
    split_roots: Sequence[str] = (),
    class_names: Path | None = None,
    keep_underscores: bool = False,
) -> Data:
    """Returns the data of a run.

    Raises InputError as the data set's reader does, and for a folder that is missing or not used.
    """
    if data_set not in READERS:
        raise unknown("data set", data_set, READERS)
    reader, layout = READERS[data_set]
    if split_roots and data_set != "imagenet":
        raise InputError(f"--split-roots is for --data imagenet: leave it out with {data_set}")
    if root is None and layout and not split_roots:
        folder = f"the folder that holds {layout}"
        raise InputError(f"--data-root is needed with --data {data_set}: {folder}")
    if data_set == "imagenet":
        reader = partial(read_imagenet, split_roots=split_roots)
    data = reader(root, reference, shifts, select_on)
    names = data.train.classes
    if class_names:
        names = read_class_names(class_names, names)
    elif data_set in NAMES:
        names = NAMES[data_set](names)
    if not keep_underscores:
        names = tuple(name.replace("_", " ") for name in names)

    def name_classes(split: Split) -> Split:
        return replace(split, classes=names)

    reports = {name: name_classes(split) for name, split in data.reports.items()}
    return Data(name_classes(data.train), name_classes(data.selection), reports)


def read_reports(
    data_set: str,
    root: Path | None,
    names: tuple[str, ...],
    classes: Sequence[str],
    split_roots: Sequence[str] = (),
    class_names: Path | None = None,
) -> dict[str, Split]:
    """Returns splits to report on, with labels of a classifier over `classes`.

    A split may lack classes. With `folder`, a split is a folder of class folders, and nothing to
    train on need lie beside it. Raises InputError for a class that is not among `classes`.
    """
    if not names:
        raise InputError(f"--shifts is needed with --data {data_set}: name the splits to report on")
    if data_set == "folder":
        splits = [read_own_classes(root or Path(), name, class_names) for name in names]
    else:
        reference = "imagenet" if data_set == "imagenet" else names[0]
        shifts = tuple(name for name in names if name != reference)
        found = read(data_set, root, reference, shifts, "test", split_roots, class_names)
        splits = [found.reports[name] for name in names]
    label_per_name = {name.replace("_", " "): label for label, name in enumerate(classes)}

    def relabel(split: Split) -> Split:
        own = [name.replace("_", " ") for name in split.classes]
        present = [own[label] for label in np.unique(split.labels)]
        if others := [name for name in present if name not in label_per_name]:
            problem = f"{split.name} has classes that the run does not know"
            raise InputError(f"{problem} ({few(others)}): give --class-names, or leave it out")
        labels = np.array([label_per_name.get(name, -1) for name in own], np.int32)[split.labels]
        compared = None
        if split.compared is not None:
            compared = np.isin(np.arange(len(classes)), labels)
        return Split(split.name, tuple(classes), split.images, labels, compared)

    return {split.name: relabel(split) for split in splits}


def read_own_classes(root: Path, name: str, class_names: Path | None) -> Split:
    """Returns a folder of class folders as a split over the classes that it has."""
    if not (root / name).is_dir():
        raise wrong_root(root, name, f"{name}/CLASS/IMAGE")
    own = folders.class_folders(root / name)
    label_per_folder = {composed(folder): label for label, folder in enumerate(own)}
    split = folders.read_class_folders(name, root / name, own, label_per_folder, str(root / name))
    return replace(split, classes=read_class_names(class_names, own)) if class_names else split


def read_class_names(path: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of classes from a file with one `FOLDER NAME` per line.

    Raises InputError if a line is malformed, a folder is listed twice, or a class has no name.
    """
    # A tab ends the folder or, in a line without one, a space.
    records = read_records(
        path, "FOLDER NAME", r"(.+?)(?:\t| (?!.*\t))\s*(.+)", f"--class-names {path}"
    )
    names = {composed(folder): record.fields[0] for folder, record in records.items()}
    if missing := [name for name in classes if composed(name) not in names]:
        raise InputError(f"--class-names {path} has no line for {few(missing)}: add them")
    return tuple(names[composed(name)] for name in classes)
