"""Images in class folders: `python train.py --data folder --data-root DIR`."""

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import Data, Files, Split, hold_out
from support import errors
from support.errors import InputError, few
from support.layouts.common import add_selection, choose_shifts, composed, wrong_root

LAYOUT = (
    "train/CLASS/IMAGE to train on, val/CLASS/IMAGE to report, and SHIFT/CLASS/IMAGE for each "
    "shift; or DOMAIN/CLASS/IMAGE and --reference DOMAIN"
)
IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
IMAGES += (".avif", ".jp2", ".ppm", ".pgm")
# Left out without a warning.
TEXTS = (".txt", ".csv", ".json", ".xml", ".md", ".db", ".ini", ".html", ".pdf", ".yaml", ".yml")
TEXTS += ("readme", "license")


def names_in(folder: Path, folders_only: bool = False) -> list[str]:
    """Returns the sorted names in a folder that are not hidden.

    Raises InputError if the folder cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            # `is_dir` looks at links only, which matters for 50,000 images on a network disk.
            return sorted(entry.name for entry in visible if not folders_only or entry.is_dir())
    except OSError as error:
        problem = f"folder {folder} cannot be listed ({error})"
        raise InputError(f"{problem}: restore it, or make it readable") from error


def class_folders(root: Path) -> tuple[str, ...]:
    """Returns the sorted names of the folders, and links to folders, that are not hidden."""
    return tuple(names_in(root, folders_only=True))


def warn_of_left_out(root: Path, read: Collection[str], deeper: Sequence[str] = ()) -> None:
    """Warns of all in `root` that is not read, and of what is `deeper`, except for texts."""
    names = [*(name for name in names_in(root) if name not in read), *deeper]
    if left_out := [name for name in names if not name.lower().endswith(TEXTS)]:
        what = f"{len(left_out)} files or folders, which are not read"
        errors.warn(f"{root}: left out {what}: {few(left_out)}")


def read_class_folders(
    name: str,
    root: Path,
    classes: tuple[str, ...],
    label_per_folder: Mapping[str, int],
    source: str,
) -> Split:
    """Reads a split `root/CLASS/IMAGE`, in label order. Warns of files that may be images, too.

    Labels are by the composed names of folders, and `source` is what specifies them. Raises
    InputError if there are no folders, or if one contains no image or has no label.
    """
    folders = class_folders(root)
    with ThreadPoolExecutor(16) as pool:  # a network disk answers many requests at once
        listings = list(pool.map(lambda folder: names_in(root / folder), folders))
    images: dict[str, list[str]] = {}
    left_out: list[str] = []
    problems = [] if folders else [f"{root} has no class folder: {name} needs CLASS/IMAGE there"]
    for folder, names in zip(folders, listings, strict=True):
        images[folder] = [file for file in names if file.lower().endswith(IMAGES)]
        left_out += [f"{folder}/{file}" for file in names if not file.lower().endswith(IMAGES)]
        if not images[folder]:
            kinds = " ".join(IMAGES)
            problems.append(f"{root / folder} has no image ({kinds}): add some or delete it")
        elif composed(folder) not in label_per_folder:
            advice = f"rename or delete it, or leave {name} out of --shifts"
            problems.append(f"{root / folder} is no class of {source}: {advice}")
    warn_of_left_out(root, folders, left_out)
    if problems:
        raise InputError(few(problems, "; "))
    label = {folder: label_per_folder[composed(folder)] for folder in folders}
    folders = sorted(folders, key=label.__getitem__)
    files = tuple(f"{folder}/{file}" for folder in folders for file in images[folder])
    sizes = [len(images[folder]) for folder in folders]
    labels = np.array([label[folder] for folder in folders], np.int32)
    return Split(name, classes, Files(root, files), np.repeat(labels, sizes))


def read_folder(root: Path, reference: str, shifts: tuple[str, ...], select_on: str) -> Data:
    """Reads `train/CLASS/IMAGE` to train on, and `REFERENCE/CLASS/IMAGE` and shifts to report.

    If the reference val has no folder, it is a tenth of the training images. Without a folder
    `train`, folders are domains: a fifth of the reference's images is reported, as in DomainBed
    (Gulrajani and Lopez-Paz 2021), and the rest is trained on. Default shifts: all other folders
    with class folders, except val. A shift may lack classes. `select_on` val: the folder val or, if
    there is none or it is the reference, (another) tenth of the training images. Warns of what is
    not read.
    """
    folders = class_folders(root)
    splits = [name for name in folders if class_folders(root / name)]
    trained = "train" if "train" in splits or reference == "val" else reference
    if trained not in splits:
        raise wrong_root(root, f"{trained}/CLASS", LAYOUT)
    known = [name for name in dict.fromkeys(("val", *folders)) if name != "train"]
    used = {trained, reference, "val" if select_on == "val" else "", *(splits if shifts else ())}
    shifts = choose_shifts(known, reference, shifts, {"val", *set(folders).difference(splits)})
    warn_of_left_out(root, {*used, *shifts})
    for name in shifts:
        if name in ("test", "valid", "validation", "dev"):
            advice = f"if it holds images like those of train, give --reference {name}"
            errors.warn(f"{root / name} counts as a shift: {advice}")
    classes = class_folders(root / trained)
    label_per_folder = {composed(folder): label for label, folder in enumerate(classes)}

    def read(name: str) -> Split:
        return read_class_folders(name, root / name, classes, label_per_folder, str(root / trained))

    train = replace(read(trained), name="train")
    if trained == reference:
        train, reported = hold_out(train, 5, reference)
    elif reference not in folders:
        train, reported = hold_out(train, name=reference)
    else:
        reported = read(reference)
    reports = {reference: reported, **{name: read(name) for name in shifts}}
    if "val" in folders and reference != "val":
        return add_selection(train, reports, select_on, lambda: reports.get("val") or read("val"))
    return add_selection(train, reports, select_on)
