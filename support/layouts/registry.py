"""Readers of data sets on disk: the labelled images that a run trains on, selects on and reports.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --data NAME --data-root DIR` uses it.

Each reader takes the root folder, the reference, the shifts (none: its default) and the selection data: `test` for
the reference's reported images, as in the paper, or `val` for images that are not reported. It raises InputError,
before any image is opened, if the root does not have the layout that it expects.
"""

import functools
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data import Data, Files, ListedFile, Split, hold_out
from support import errors
from support.errors import InputError, few, read_lines, unknown
from support.layouts import minidomain
from support.run.options import Places, Sources

Words = tuple[str, ...]
NUMBER = re.compile("[0-9]{1,9}")


def wrong_root(root: Path, lacking: str, layout: str, option: str = "--data-root") -> InputError:
    """An error for a root with another layout: what the root contains and what it should."""
    found = (
        sorted(path.name for path in root.iterdir())[:8] if root.is_dir() else ["no such folder"]
    )
    return InputError(
        f"{option} {root} has {lacking} (found: {', '.join(found) or 'nothing'}): expected {layout}"
    )


def needed_root(root: Path | None, data_set: str, layout: str) -> Path:
    """Returns the root. Raises InputError, with the expected layout, if none is given."""
    if root is None:
        raise InputError(
            f"--data-root is needed with --data {data_set}: the folder that holds {layout}"
        )
    return root


def choose_shifts(
    splits: Sequence[str], reference: str, shifts: Words, left_out: Collection[str] = ()
) -> Words:
    """Returns `shifts` or, if empty, all splits except the reference and those `left_out`.

    Raises InputError if a split is unknown, or if a shift is given twice or is the reference.
    """
    for split in (reference, *shifts):
        if split not in splits:
            raise unknown("split", split, splits)
        if shifts.count(split) > 1:
            raise InputError(f"--shifts has {split!r} twice: give it once")
    if reference in shifts:
        raise InputError(
            f"split {reference!r} is the reference and a shift at once: leave it out of --shifts"
        )
    return shifts or tuple(split for split in splits if split not in (reference, *left_out))


def with_selection(
    train: Split,
    reports: dict[str, Split],
    select_on: str,
    val: Callable[[], Split] | None = None,
    every: int = 10,
) -> Data:
    """Adds the selection split: the reference's reported images, `val()`, or one in `every` training images."""
    if select_on == "test":
        return Data(train, next(iter(reports.values())), reports)  # the reference comes first
    if val:
        return Data(train, val(), reports)
    return Data(*hold_out(train, every), reports)


def composed(name: str) -> str:
    """A name in Unicode's composed form: file systems and lists may spell the same letters in two ways."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@functools.cache
def names_in(folder: Path) -> dict[str, str]:
    """The names in a folder, by their composed form."""
    return {composed(path.name): path.name for path in folder.iterdir()} if folder.is_dir() else {}


def on_disk(root: Path, path: str) -> str:
    """A path below `root` in the disk's own spelling of its letters, if a list spells them in another way."""
    if path.isascii() or (root / path).exists():
        return path
    spelt = ""
    for part in path.split("/"):
        spelt += "/" * bool(spelt) + names_in(root / spelt).get(composed(part), part)
    return spelt


def refuse_duplicate(
    places: dict[str, str], item: str, place: str, advice: str = "delete one of them"
) -> None:
    """Raises InputError if `places`, which maps an item to its file and line, has the item already, else adds it."""
    earlier = places.setdefault(item, place)
    if earlier != place:
        raise InputError(f"{place}: {earlier} has {item} already: {advice}")


# ---------------------------------------------------------------------------------------------------- DomainNet's lists


def read_list(
    source: Path, train_folders: Words = ()
) -> tuple[tuple[ListedFile, ...], Int[np.ndarray, " _"], Words]:
    """Returns the files, labels and class folders (in label order) of a list: one `DOMAIN/CLASS/FILE LABEL` per line.

    `train_folders` are the training list's: another list may lack some, but contains no others. Raises InputError, with
    file and line, if a line is malformed, an image is listed twice, or a label contradicts its folder.
    """
    lines = read_lines(source, f"list {source}")
    if lines == [""]:
        raise InputError(f"list {source} is empty: it needs one 'DOMAIN/CLASS/FILE LABEL' per line")
    files, labels = [], []
    # Each folder has one label and each label one folder: the first that is specified, in the line kept in `pairs`.
    pairs = {(folder, label): "the training list" for label, folder in enumerate(train_folders)}
    pair_per_folder = {pair[0]: pair for pair in pairs}
    pair_per_label = {pair[1]: pair for pair in pairs}
    places: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        place = f"{source} line {number}"
        path, label = ("", "", *line.strip().rsplit(maxsplit=1))[
            -2:
        ]  # any white space before the label
        *_, folder, file = "", *path.split("/")  # pathlib would take seconds for all of DomainNet
        folder = composed(folder)
        if not (folder and file and NUMBER.fullmatch(label)):
            raise InputError(
                f"{place}: {line!r} is not 'DOMAIN/CLASS/FILE LABEL': correct the line"
            )
        if train_folders and folder not in pair_per_folder:
            raise InputError(
                f"{place}: folder {folder!r} is no class of the training list: correct one"
            )
        pair = (folder, int(label))
        pairs.setdefault(pair, f"line {number}")
        for known in (
            pair_per_folder.setdefault(folder, pair),
            pair_per_label.setdefault(int(label), pair),
        ):
            if known != pair:
                contradiction = f"{pairs[known]} gives folder {known[0]!r} label {known[1]}"
                raise InputError(
                    f"{place}: {path} has label {label}, but {contradiction}: correct one"
                )
        refuse_duplicate(places, path, place)
        files.append(ListedFile(source.parent / on_disk(source.parent, path), place))
        labels.append(int(label))
    if missing := set(range(len(pair_per_label))) - set(pair_per_label):
        raise InputError(
            f"list {source} has no label {min(missing)}: number the classes from 0 without gaps"
        )
    folders = tuple(pair_per_label[label][0] for label in range(len(pair_per_label)))
    return tuple(files), np.array(labels, np.int32), folders


def read_domainnet(root: Path | None, reference: str, shifts: Words, select_on: str) -> Data:
    """Reads `DOMAIN/CLASS/FILE`, listed in `DOMAIN_train.txt`, `DOMAIN_test.txt` and, optionally, `DOMAIN_val.txt`.

    Default shifts: all other domains with a test list, except Quickdraw. `val`: the validation list or, without one, a
    tenth of the training images. Raises InputError if lists are missing, malformed, or contradict each other.
    """
    root = needed_root(root, "domainnet", "DOMAIN_train.txt")
    domains = sorted(path.name.removesuffix("_test.txt") for path in root.glob("*_test.txt"))
    if not domains:
        layout = "DOMAIN/CLASS/FILE, DOMAIN_train.txt and DOMAIN_test.txt, or --data folder for domains without lists"
        raise wrong_root(root, "no DOMAIN_test.txt", layout)
    if not reference:
        raise InputError(
            f"--reference is needed with --data domainnet: one of {', '.join(domains)}"
        )
    # The paper leaves Quickdraw out: its drawings are so plain that no model classifies them well.
    shifts = choose_shifts(domains, reference, shifts, left_out=("quickdraw",))
    files, labels, classes = read_list(root / f"{reference}_train.txt")

    def read(name: str, list_name: str) -> Split:
        files, labels, _ = read_list(root / list_name, classes)
        if not any(file.path.parents[2].is_dir() for file in files[:: max(1, len(files) // 10)]):
            others = " ".join(shift for shift in shifts if shift != name)
            advice = (
                f"leave it out with --shifts {others}"
                if others and name != reference
                else "download them"
            )
            raise InputError(
                f"{root / list_name} lists images of {files[0].path.parents[2]}, which is not there: {advice}"
            )
        return Split(name, classes, files, labels)

    reports = {domain: read(domain, f"{domain}_test.txt") for domain in (reference, *shifts)}
    val_list = f"{reference}_val.txt"
    val = (lambda: read("val", val_list)) if (root / val_list).exists() else None
    return with_selection(Split("train", classes, files, labels), reports, select_on, val)


# --------------------------------------------------------------------------------------------------------- CUB-200-2011

CUB_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")
CUB_LAYOUT = f"images/, {', '.join(CUB_FILES[:3])} and {CUB_FILES[3]}, as CUB_200_2011 has"


def read_numbered(path: Path) -> dict[int, tuple[str, str]]:
    """Maps each id of a file with one `ID VALUE` per line to the value and its place (file and line).

    Raises InputError, with the place, if a line is malformed or an id is listed twice.
    """
    values: dict[int, tuple[str, str]] = {}
    places: dict[str, str] = {}
    for number, line in enumerate(read_lines(path), start=1):
        place = f"{path} line {number}"
        identity, _, value = line.strip().partition(" ")
        if not (NUMBER.fullmatch(identity) and value):
            raise InputError(f"{place}: {line!r} is not 'ID VALUE': correct the line")
        refuse_duplicate(places, f"id {int(identity)}", place)
        values[int(identity)] = (value, place)
    return values


def read_cub(root: Path | None, reference: str, shifts: Words, select_on: str) -> Data:
    """Reads CUB-200-2011 (Wah et al. 2011) from its own files: one reported split, `cub`, and no shifts.

    Labels follow the ids of classes.txt, whose names lose their numbers. `val`: a tenth of the training images.
    Raises InputError, with file and line, if files are missing, malformed or contradict each other.
    """
    root = needed_root(root, "cub", CUB_LAYOUT)
    choose_shifts(("cub",), reference, shifts)
    if any(not (root / name).is_file() for name in CUB_FILES):
        raise wrong_root(root, "no CUB-200-2011", CUB_LAYOUT)
    paths, class_ids, parts, titles = (read_numbered(root / name) for name in CUB_FILES)
    for name, values in (("image_class_labels.txt", class_ids), ("train_test_split.txt", parts)):
        for some, others, lacking in ((paths, values, name), (values, paths, "images.txt")):
            if alone := some.keys() - others.keys():
                image = min(alone)
                raise InputError(
                    f"{some[image][1]}: id {image} is not in {root / lacking}: correct one of the files"
                )
    if absent := set(range(1, len(titles) + 1)) - titles.keys():
        raise InputError(
            f"{root / 'classes.txt'} has no id {min(absent)}: number the classes from 1 without gaps"
        )
    for class_id, place in class_ids.values():
        if not NUMBER.fullmatch(class_id) or int(class_id) not in titles:
            raise InputError(
                f"{place}: {class_id!r} is no class of {root / 'classes.txt'}: correct the line"
            )
    for part, place in parts.values():
        if part not in ("0", "1"):
            raise InputError(
                f"{place}: {part!r} is neither 1 (to train on) nor 0 (to test on): correct the line"
            )
    places: dict[str, str] = {}
    for path, place in paths.values():
        refuse_duplicate(places, path, place, "delete one of them in all three files")
    classes = tuple(re.sub(r"^\d+\.", "", titles[class_id][0]) for class_id in sorted(titles))

    def read(name: str, part: str) -> Split:
        chosen = [image for image in paths if parts[image][0] == part]
        if not chosen:
            raise InputError(
                f"{root / CUB_FILES[2]} has no line 'ID {part}': {name} has no image; restore it"
            )
        files = tuple(
            ListedFile(root / "images" / paths[image][0], paths[image][1]) for image in chosen
        )
        return Split(
            name,
            classes,
            files,
            np.array([int(class_ids[image][0]) - 1 for image in chosen], np.int32),
        )

    return with_selection(read("train", "1"), {"cub": read("cub", "0")}, select_on)


# -------------------------------------------------------------------------------------------------------- class folders

SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".ppm", ".pgm",
)  # fmt: skip
# Left out without a warning.
NO_IMAGES = (
    ".txt",
    ".csv",
    ".json",
    ".xml",
    ".md",
    ".db",
    ".ini",
    ".html",
    ".pdf",
    ".yaml",
    ".yml",
)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden. Raises InputError if the folder cannot be listed."""
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"folder {folder} cannot be listed ({error}): make it readable or delete it"
        ) from error


def image_names(folder: Path) -> tuple[list[str], list[str]]:
    """The sorted names of a folder's image files, and of what may be images but is not read: other files and folders.

    Hidden files and texts are in neither.
    """
    names = sorted((entry.name for entry in entries(folder)), key=os.fsencode)
    images = [name for name in names if name.lower().endswith(SUFFIXES)]
    return images, [name for name in names if not name.lower().endswith(SUFFIXES + NO_IMAGES)]


def class_folders(root: Path) -> Words:
    """The sorted names of the folders, and links to folders, in `root` that are not hidden."""
    # Only links are followed: a look at each of 50,000 images in one folder would take a network disk a minute.
    folders = (
        e
        for e in entries(root)
        if e.is_dir(follow_symlinks=False) or (e.is_symlink() and os.path.isdir(e))
    )
    return tuple(sorted(entry.name for entry in folders))


def read_class_folders(
    name: str, root: Path, classes: Words, label_per_folder: dict[str, int], source: str
) -> Split:
    """The split of the images `root/CLASS/IMAGE`, in label order.

    Labels are by the composed names of folders. Raises InputError if a folder contains no image or has no label;
    `source` names what specifies the labels.
    """
    root = root.resolve()
    folders = class_folders(root)
    with ThreadPoolExecutor(16) as pool:  # a network disk answers many requests at once
        found = list(pool.map(lambda folder: image_names(root / folder), folders))
    names_per_folder = {folder: names for folder, (names, _) in zip(folders, found, strict=True)}
    if left_out := [
        f"{folder}/{name}"
        for folder, (_, names) in zip(folders, found, strict=True)
        for name in names
    ]:
        what = f"{len(left_out)} files or folders in class folders, which are not read"
        errors.warn(f"{root}: left out {what}: {few(left_out)}")
    for folder, names in names_per_folder.items():
        if not names:
            raise InputError(
                f"{root / folder} has no image ({' '.join(SUFFIXES)}): add some or delete it"
            )
        if composed(folder) not in label_per_folder:
            advice = f"rename or delete it, or leave {name} out of --shifts"
            raise InputError(f"{root / folder} is no class of {source}: {advice}")
    folders = sorted(folders, key=lambda folder: label_per_folder[composed(folder)])
    images = Files(
        root, tuple(f"{folder}/{name}" for folder in folders for name in names_per_folder[folder])
    )
    labels = np.array([label_per_folder[composed(folder)] for folder in folders], np.int32)
    return Split(
        name,
        classes,
        images,
        np.repeat(labels, [len(names_per_folder[folder]) for folder in folders]),
    )


FOLDER_LAYOUT = (
    "train/CLASS/IMAGE to train on, val/CLASS/IMAGE to report, and SHIFT/CLASS/IMAGE for each shift; or "
    "DOMAIN/CLASS/IMAGE and --reference DOMAIN"
)


def read_folder(root: Path | None, reference: str, shifts: Words, select_on: str) -> Data:
    """Reads `train/CLASS/IMAGE` to train on, and `REFERENCE/CLASS/IMAGE` and `SHIFT/CLASS/IMAGE` to report.

    If the reference val has no folder, it is a tenth of the training images. Default shifts: all other folders with
    class folders. A shift may lack classes. `val`: the folder val or, if that is the reference, (another) tenth.

    Without a folder `train`, folders are domains: a fifth of the reference's images is reported, as in DomainBed
    (Gulrajani and Lopez-Paz 2021), and the rest is trained on.
    """
    root = needed_root(root, "folder", FOLDER_LAYOUT)
    splits = (
        [name for name in class_folders(root) if class_folders(root / name)]
        if root.is_dir()
        else []
    )
    trained = "train" if "train" in splits or reference == "val" else reference
    if trained not in splits:
        raise wrong_root(root, f"no {trained}/CLASS", FOLDER_LAYOUT)
    classes = class_folders(root / trained)
    label_per_folder = {composed(folder): label for label, folder in enumerate(classes)}

    def read(name: str) -> Split:
        return read_class_folders(name, root / name, classes, label_per_folder, str(root / trained))

    train = read(trained)
    if trained == reference:
        shifts = choose_shifts(splits, reference, shifts)
        train, reported = hold_out(replace(train, name="train"), 5, reference)
        return with_selection(
            train, {reference: reported} | {name: read(name) for name in shifts}, select_on
        )
    known = [name for name in dict.fromkeys(("val", *splits)) if name != "train"]
    # val is left out: a run whose reference is another split selects on it.
    shifts = choose_shifts(known, reference, shifts, left_out=("val",))
    if "val" in shifts and "val" not in splits:
        raise wrong_root(root, "no val/CLASS", FOLDER_LAYOUT)
    if tests := [name for name in shifts if name in ("test", "valid", "validation", "dev")]:
        advice = f"if it holds images like those of train, give --reference {tests[0]}"
        errors.warn(f"{root / tests[0]} counts as a shift: {advice}")
    if reference in splits:
        reported = read(reference)
    else:
        train, reported = hold_out(train, name=reference)
    reports = {reference: reported, **{name: read(name) for name in shifts}}
    val = (
        (lambda: reports.get("val") or read("val"))
        if "val" in splits and reference != "val"
        else None
    )
    return with_selection(train, reports, select_on, val)


# ------------------------------------------------------------------------------------------------------------- ImageNet

# OpenAI's names of the 1,000 classes, in the order of their WordNet ids, from the notebook that has its prompts.
OPENAI_CLASSES = Path(__file__).parents[2] / "assets" / "openai-classes.txt"
# The folders under --data-root in which each split is looked for: this project's name, then the published archive's.
IMAGENET = {
    "imagenet": ("imagenet", "ILSVRC/Data/CLS-LOC"),
    "imagenet-v2": ("imagenet-v2", "imagenetv2-matched-frequency-format-val"),
    "imagenet-r": ("imagenet-r",),
    "imagenet-a": ("imagenet-a",),
    "imagenet-sketch": ("imagenet-sketch", "sketch"),
}
IMAGENET_LAYOUT = (
    "imagenet/train/WNID/IMAGE, imagenet/val/WNID/IMAGE, and of the shifts those wanted: "
    + ", ".join(" or ".join(folders) for name, folders in IMAGENET.items() if name != "imagenet")
)


def imagenet_places(root: Path | None, split_roots: Words) -> dict[str, Path]:
    """Returns each split's folder: from `split_roots` (`NAME=FOLDER`), else under the root, if it is there."""
    places: dict[str, Path] = {}
    for split_root in split_roots:
        name, _, folder = split_root.partition("=")
        if name not in IMAGENET:
            raise unknown("split of --split-roots", name, IMAGENET)
        if not folder or not Path(folder).is_dir():
            raise InputError(f"--split-roots {name}={folder}: no such folder: give NAME=FOLDER")
        places[name] = Path(folder)
    for name, folders in IMAGENET.items():
        found = [root / folder for folder in folders if (root / folder).is_dir()] if root else []
        if found:
            places.setdefault(name, found[0])
    for name, place in places.items():  # archives may unpack one folder deeper
        inner = class_folders(place)
        if name != "imagenet" and len(inner) == 1 and class_folders(place / inner[0]):
            places[name] = place / inner[0]
    if "imagenet" not in places:
        raise wrong_root(
            needed_root(root, "imagenet", IMAGENET_LAYOUT), "no ImageNet", IMAGENET_LAYOUT
        )
    return places


def read_imagenet(
    root: Path | None, reference: str, shifts: Words, select_on: str, split_roots: Words = ()
) -> Data:
    """Reads ImageNet and its shifts: V2, R, A and Sketch. Default shifts: those that are there.

    Labels follow the order of the WordNet ids; class names are OpenAI's. For R and A, only
    the logits of the classes that they contain are compared. `val`: a hundredth of the training images.
    """
    places = imagenet_places(root, split_roots)
    base = places["imagenet"]
    shifts = choose_shifts(tuple(IMAGENET), reference, shifts, left_out=set(IMAGENET) - set(places))
    if reference != "imagenet":
        raise InputError(f"--reference {reference} has no training images: give imagenet")
    for name in shifts:
        if name not in places:
            lacking = f"no {' or '.join(IMAGENET[name])}"
            raise wrong_root(root or base, lacking, f"one, or --split-roots {name}=DIR")
    if not (base / "train").is_dir() or not (base / "val").is_dir():
        raise wrong_root(
            base, "no train or no val", "train/WNID/IMAGE and val/WNID/IMAGE", "ImageNet's folder"
        )
    folders = class_folders(base / "train")
    classes = tuple(read_lines(OPENAI_CLASSES))
    for folder in folders:
        if not re.fullmatch(r"n\d{8}", folder):
            raise InputError(
                f"{base / 'train' / folder} is no WordNet id such as n01440764: rename or delete it"
            )
    if len(folders) != len(classes):
        counts = f"{len(folders)} class folders, ImageNet {len(classes)} classes"
        raise InputError(
            f"{base / 'train'} has {counts}: restore the others, or give --data folder for your own set"
        )
    label_per_id = {folder: label for label, folder in enumerate(folders)}
    label_per_number = {str(label): label for label in range(len(classes))}

    def read(name: str, folder: Path) -> Split:
        if not class_folders(folder):
            raise wrong_root(folder, "no class folder", "WNID/IMAGE", f"split {name}:")
        labels = label_per_number if name == "imagenet-v2" else label_per_id
        split = read_class_folders(name, folder, classes, labels, "ImageNet")
        if name not in ("imagenet-r", "imagenet-a"):
            return split
        return replace(split, compared=np.isin(np.arange(len(classes)), split.labels))

    train = read("train", base / "train")
    reports = {
        name: read(name, base / "val" if name == "imagenet" else places[name])
        for name in (reference, *shifts)
    }
    # A tenth of 1.28 million images, evaluated fifty times, would cost half as much as training.
    return with_selection(train, reports, select_on, every=100)


# ----------------------------------------------------------------------------------------------------------- minidomain


def read_minidomain(root: Path | None, reference: str, shifts: Words, select_on: str) -> Data:
    """Returns the embedded benchmark. Raises InputError if a domain is unknown, or if a root is given."""
    if root is not None:
        raise InputError(
            f"--data minidomain is drawn, not read from --data-root {root}: give --data domainnet"
        )
    shifts = choose_shifts(minidomain.DOMAINS, reference, shifts)

    def read(name: str, domain: str, split: str) -> Split:
        return Split(name, minidomain.CLASSES, *minidomain.load_domain(domain, split))

    wanted = [
        *((domain, "test") for domain in (reference, *shifts)),
        (reference, "val"),
        (reference, "train"),
    ]
    with minidomain.drawn_on_all_cores(wanted):
        reports = {domain: read(domain, domain, "test") for domain in (reference, *shifts)}
        train = read("train", reference, "train")
        return with_selection(train, reports, select_on, lambda: read("val", reference, "val"))


# ------------------------------------------------------------------------------------------------------- any data set

READERS = {
    "minidomain": read_minidomain,
    "domainnet": read_domainnet,
    "cub": read_cub,
    "folder": read_folder,
}


def read_class_names(path: Path, classes: Words) -> Words:
    """The names of the classes from a file with one `FOLDER NAME` per line, apart by a tab or a space.

    Raises InputError if a line is malformed or a class has no name.
    """
    names: dict[str, str] = {}
    for number, line in enumerate(
        read_lines(path, f"--class-names {path}", "give a line 'FOLDER NAME' per class"), 1
    ):
        folder, _, name = line.strip().partition("\t" if "\t" in line else " ")
        if not name.strip():
            raise InputError(
                f"--class-names {path} line {number}: {line!r} is not 'FOLDER NAME': correct the line"
            )
        names[composed(folder)] = name.strip()
    if missing := [name for name in classes if composed(name) not in names]:
        raise InputError(f"--class-names {path} has no line for {few(missing)}: add them")
    return tuple(names[composed(name)] for name in classes)


def read(sources: Sources, places: Places) -> Data:
    """Returns the data of a run. Raises InputError as the data set's reader does."""
    arguments = (places.data_root, sources.reference, sources.shifts, sources.select_on)
    if sources.data == "imagenet":
        data = read_imagenet(*arguments, places.split_roots)
    elif places.split_roots:
        raise InputError(
            f"--split-roots is for --data imagenet: leave it out with --data {sources.data}"
        )
    else:
        data = READERS[sources.data](*arguments)
    names = (
        read_class_names(sources.class_names, data.train.classes)
        if sources.class_names
        else data.train.classes
    )
    if not sources.keep_underscores:
        names = tuple(name.replace("_", " ") for name in names)

    def readable(split: Split) -> Split:
        return replace(split, classes=names)

    reports = {name: readable(split) for name, split in data.reports.items()}
    return Data(readable(data.train), readable(data.selection), reports)
