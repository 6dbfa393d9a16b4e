"""ImageNet, V2, R, A and Sketch: `python train.py --data imagenet --data-root DIR`."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data import Data, Split
from support.errors import InputError, few
from support.layouts.common import add_selection, choose_shifts, wrong_root
from support.layouts.folders import class_folders, read_class_folders, warn_of_left_out

# OpenAI's names of the classes, in the order of WordNet ids, from the notebook with its prompts.
OPENAI_CLASSES = Path(__file__).parents[2] / "assets" / "openai-classes.txt"
# Each split's folder under --data-root: by this project's name or by the published archive's.
IMAGENET = {
    "imagenet": ("imagenet", "ILSVRC/Data/CLS-LOC"),
    "imagenet-v2": ("imagenet-v2", "imagenetv2-matched-frequency-format-val"),
    "imagenet-r": ("imagenet-r",),
    "imagenet-a": ("imagenet-a",),
    "imagenet-sketch": ("imagenet-sketch", "sketch"),
}
LAYOUT = (
    "imagenet/train/WNID/IMAGE, imagenet/val/WNID/IMAGE, and of the shifts those wanted: "
    + ", ".join(" or ".join(folders) for name, folders in IMAGENET.items() if name != "imagenet")
)


def find_splits(root: Path | None, split_roots: Sequence[str]) -> dict[str, Path]:
    """Returns each split's folder: from `split_roots` (`NAME=FOLDER`), else under the root."""
    places: dict[str, Path] = {}
    for split_root in split_roots:
        name, _, folder = split_root.partition("=")
        if name not in IMAGENET or not folder:
            names = ", ".join(IMAGENET)
            raise InputError(f"--split-roots {split_root}: give NAME=FOLDER, NAME one of {names}")
        places[name] = Path(folder)
    for name, folders in IMAGENET.items():
        found = [root / folder for folder in folders if (root / folder).is_dir()] if root else []
        if found:
            places.setdefault(name, found[0])
    for name, place in places.items():  # archives may unpack one folder deeper
        inner = class_folders(place)
        if name != "imagenet" and len(inner) == 1 and class_folders(place / inner[0]):
            places[name] = place / inner[0]
    return places


def read_imagenet(
    root: Path | None,
    reference: str,
    shifts: tuple[str, ...],
    select_on: str,
    split_roots: Sequence[str] = (),
) -> Data:
    """Reads ImageNet and its shifts: V2, R, A and Sketch. Default shifts: those that are there.

    Labels follow the order of the WordNet ids, which are the classes. For R and A, only the logits
    of the classes that they contain are compared. `select_on` val: a hundredth of the training
    images. Warns of what is not read.
    """
    places = find_splits(root, split_roots)
    shifts = choose_shifts(tuple(IMAGENET), reference, shifts, left_out=IMAGENET.keys() - places)
    if reference != "imagenet":
        raise InputError(f"--reference {reference} has no training images: give imagenet")
    for name in (reference, *shifts):
        if name not in places:
            layout = f"{LAYOUT}; or --split-roots {name}=FOLDER"
            raise wrong_root(root, " or ".join(IMAGENET[name]), layout)
    if root:
        below = [place for place in places.values() if root in place.parents]
        warn_of_left_out(root, {place.relative_to(root).parts[0] for place in below})
    train = places["imagenet"] / "train"
    ids = class_folders(train)
    others = [folder for folder in ids if not re.fullmatch(r"n\d{8}", folder)]
    if others or len(ids) != 1000:
        named = f" (no WordNet ids: {few(others)})" if others else ""
        advice = "restore them, delete others, or give --data folder for your own set"
        raise InputError(f"{train} has {len(ids)} class folders{named}, ImageNet 1000: {advice}")
    label_per_id = {wordnet_id: label for label, wordnet_id in enumerate(ids)}
    label_per_number = {str(label): label for label in range(len(ids))}

    def read(name: str, folder: Path) -> Split:
        labels = label_per_number if name == "imagenet-v2" else label_per_id
        split = read_class_folders(name, folder, ids, labels, "ImageNet")
        if name not in ("imagenet-r", "imagenet-a"):
            return split
        return replace(split, compared=np.isin(np.arange(len(ids)), split.labels))

    reports = {"imagenet": read("imagenet", places["imagenet"] / "val")}
    reports |= {name: read(name, places[name]) for name in shifts}
    # A tenth of 1.28 million images, evaluated fifty times, would cost half as much as training.
    return add_selection(read("train", train), reports, select_on, every=100)
