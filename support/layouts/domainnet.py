"""DomainNet (Peng et al. 2019): `python train.py --data domainnet --data-root DIR`."""

import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from data import Data, ListedFile, Split
from support.errors import InputError
from support.layouts.common import add_selection, choose_shifts, composed, read_records, wrong_root
from support.layouts.folders import class_folders, warn_of_left_out

LAYOUT = (
    "DOMAIN/CLASS/FILE, DOMAIN_train.txt and DOMAIN_test.txt, "
    "or --data folder for domains without lists"
)
# Path, class folder and label. A path may contain spaces; any white space may precede the label.
LINE = ("DOMAIN/CLASS/FILE LABEL", r"((?:.*/)?([^/]+)/[^/]*[^/\s])\s+([0-9]{1,9})")


class Assignment(NamedTuple):
    """The label of a class folder, and the place that specifies it."""

    folder: str
    label: int
    place: str


def on_disk(root: Path, path: str) -> Path:
    """Returns the path below `root`, in the disk's spelling of its letters if that is another."""
    if path.isascii():  # a look at each of DomainNet's 400,000 images would take minutes
        return root / path
    spellings = [path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD"))]
    return next((root / each for each in spellings if (root / each).exists()), root / path)


def read_list(
    path: Path, train_classes: tuple[str, ...] = ()
) -> tuple[tuple[ListedFile, ...], Int32[np.ndarray, " images"], tuple[str, ...]]:
    """Returns the files, labels and class folders (in label order) of a list.

    `train_classes` are the training list's: another list may lack some, but contains no others.
    Raises InputError, with file and line, if a line is malformed, an image is listed twice, or a
    label contradicts its folder.
    """
    per_label = {
        label: Assignment(folder, label, "the training list")
        for label, folder in enumerate(train_classes)
    }
    per_folder = {assignment.folder: assignment for assignment in per_label.values()}
    files, labels = [], []
    for listed, (place, (folder, label)) in read_records(path, *LINE, f"list {path}").items():
        line = Assignment(composed(folder), int(label), place)
        if train_classes and line.folder not in per_folder:
            problem = f"folder {folder!r} is no class of the training list"
            raise InputError(f"{place}: {problem}: correct one")
        by_folder = per_folder.setdefault(line.folder, line)
        by_label = per_label.setdefault(line.label, line)
        for known in (by_folder, by_label):
            if known[:2] != line[:2]:
                problem = f"{known.place} gives folder {known.folder!r} label {known.label}"
                raise InputError(
                    f"{place}: folder {folder!r} has label {label}, but {problem}: correct one"
                )
        files.append(ListedFile(on_disk(path.parent, listed), place))
        labels.append(line.label)
    if missing := set(range(len(per_label))) - per_label.keys():
        problem = f"list {path} has no label {min(missing)}"
        raise InputError(f"{problem}: number the classes from 0 without gaps")
    classes = tuple(per_label[label].folder for label in range(len(per_label)))
    return tuple(files), np.array(labels, np.int32), classes


def read_domainnet(root: Path, reference: str, shifts: tuple[str, ...], select_on: str) -> Data:
    """Reads `DOMAIN/CLASS/FILE`, listed in `DOMAIN_train.txt`, `_test.txt` and maybe `_val.txt`.

    Default shifts: all other domains with a test list, except Quickdraw. `select_on` val: the
    validation list or, without one, a tenth of the training images. Raises InputError if lists are
    missing, malformed, or contradict each other. Warns of what is not read.
    """
    listed = {path.name.removesuffix("_test.txt") for path in root.glob("*_test.txt")}
    if not listed:
        raise wrong_root(root, "DOMAIN_test.txt", LAYOUT)
    domains = sorted(listed.union(class_folders(root)))
    if not reference:
        known = ", ".join(sorted(listed))
        raise InputError(f"--reference is needed with --data domainnet: one of {known}")
    # The paper leaves Quickdraw out: its drawings are so plain that no model classifies them well.
    unlisted = [name for name in domains if name not in listed]
    shifts = choose_shifts(domains, reference, shifts, left_out=("quickdraw", *unlisted))
    warn_of_left_out(root, domains, [f"{name} (no {name}_test.txt)" for name in unlisted])
    files, labels, classes = read_list(root / f"{reference}_train.txt")

    def read(name: str, path: Path) -> Split:
        files, labels, _ = read_list(path, classes)
        folder = files[0].path.parent.parent
        if not folder.is_dir():
            advice = "download them, or give the --shifts that are there"
            raise InputError(f"{path} lists images of {folder}, which is not there: {advice}")
        return Split(name, classes, files, labels)

    train = Split("train", classes, files, labels)
    reports = {domain: read(domain, root / f"{domain}_test.txt") for domain in (reference, *shifts)}
    val = root / f"{reference}_val.txt"
    read_val = (lambda: read("val", val)) if val.exists() else None
    return add_selection(train, reports, select_on, read_val)
