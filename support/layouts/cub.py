"""CUB-200-2011 (Wah et al. 2011): `python train.py --data cub --data-root DIR`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import Data, ListedFile, Split
from support.errors import InputError, few
from support.layouts.common import Record, add_selection, choose_shifts, read_records, wrong_root

# What a line of each file is, in words and as a pattern with a group per field.
ID = "0*([0-9]{1,9})"
FILES = {
    "images.txt": ("ID FOLDER/FILE", rf"{ID}\s+(.+)"),
    "image_class_labels.txt": ("ID CLASS_ID", rf"{ID}\s+{ID}"),
    "train_test_split.txt": ("ID 1 (to train on) or ID 0 (to test on)", rf"{ID}\s+([01])"),
    "classes.txt": ("ID NAME", rf"{ID}\s+(.+)"),
}
LAYOUT = f"images/, {', '.join(FILES)}, as CUB_200_2011 has"


def find_problems(root: Path, files: dict[str, dict[str, Record]]) -> Iterator[str]:
    """Yields each contradiction in or between the files."""
    images, class_ids, parts, classes = files.values()
    for name, records in (("image_class_labels.txt", class_ids), ("train_test_split.txt", parts)):
        for image in sorted(images.keys() ^ records.keys(), key=int):
            yield f"only one of {root / 'images.txt'} and {root / name} has id {image}: correct one"
    for place, (class_id,) in class_ids.values():
        if class_id not in classes:
            yield f"{place}: {class_id} is no class of {root / 'classes.txt'}: correct the line"
    places: dict[str, str] = {}
    for place, (path,) in images.values():
        if (earlier := places.setdefault(path, place)) != place:
            yield f"{place}: {earlier} has {path} already: delete one, in all three files"
    for part in sorted({"0", "1"} - {part for _, (part,) in parts.values()}):
        yield f"{root / 'train_test_split.txt'} has no line 'ID {part}': restore it"


def read_cub(root: Path, reference: str, shifts: tuple[str, ...], select_on: str) -> Data:
    """Reads CUB-200-2011 from its own files: one reported split, `cub`, and no shifts.

    Labels follow the ids of classes.txt. `select_on` val: a tenth of the training images. Raises
    InputError if files are missing, malformed or contradictory.
    """
    choose_shifts(("cub",), reference, shifts)
    if missing := [name for name in FILES if not (root / name).is_file()]:
        raise wrong_root(root, missing[0], LAYOUT)
    files = {name: read_records(root / name, *line) for name, line in FILES.items()}
    if problems := list(find_problems(root, files)):
        raise InputError(few(problems, "; "))
    images, class_ids, parts, names = files.values()
    label_per_id = {class_id: label for label, class_id in enumerate(sorted(names, key=int))}
    classes = tuple(names[class_id].fields[0] for class_id in label_per_id)

    def read(name: str, part: str) -> Split:
        chosen = [image for image in images if parts[image].fields == (part,)]
        listed = [images[image] for image in chosen]
        paths = tuple(ListedFile(root / "images" / path, place) for place, (path,) in listed)
        labels = [label_per_id[class_ids[image].fields[0]] for image in chosen]
        return Split(name, classes, paths, np.array(labels, np.int32))

    return add_selection(read("train", "1"), {"cub": read("cub", "0")}, select_on)
