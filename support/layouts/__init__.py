"""Data sets on disk, and the embedded one: `read` returns the labelled images of a run.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --data NAME --data-root DIR`
uses it.

Each reader takes the root folder, the reference, the shifts (none: its default) and the selection
data: `test` for the reference's reported images, as in the paper, or `val` for images that are not
reported. It raises InputError, before any image is opened, if the root has another layout.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from data import Data, Split
from support.errors import InputError, few
from support.layouts import cub, domainnet, folders, imagenet
from support.layouts.common import composed, read_records
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
    if not keep_underscores:
        names = tuple(name.replace("_", " ") for name in names)

    def name_classes(split: Split) -> Split:
        return replace(split, classes=names)

    reports = {name: name_classes(split) for name, split in data.reports.items()}
    return Data(name_classes(data.train), name_classes(data.selection), reports)


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
