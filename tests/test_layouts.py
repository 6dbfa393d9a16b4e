"""The layouts of layouts.py, on trees of small real image files: brute force tells what they hold."""

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_data import assert_batches_raise, raises, smooth

import data
import layouts

CLASSES = ("The_Eiffel_Tower", "dog", "ice_cream")


def edit(path: Path, old: str, new: str) -> None:
    """Replaces the first `old` in a list."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --------------------------------------------------------------------------------------------------- DomainNet's lists


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """DomainNet's layout: training and test lists of `real`, test lists of `clipart` and `sketch`."""
    for name, images in {"real_train": 12, "real_test": 2, "clipart_test": 2, "sketch_test": 1}.items():
        domain, lines = name.split("_")[0], []
        for label, folder in enumerate(CLASSES):
            (tmp_path / domain / folder).mkdir(parents=True, exist_ok=True)
            for index in range(images):
                path = f"{domain}/{folder}/{name}_{index:06}.{'png' if domain == 'sketch' else 'jpg'}"
                smooth(24, 18, seed=label * 100 + index).save(tmp_path / path)
                lines.append(f"{path} {label}\n")
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    return tmp_path


def test_domainnet_layout(root: Path) -> None:
    images = layouts.read_domainnet(root, "real", (), "test")
    assert list(images.reports) == ["real", "clipart", "sketch"]  # the reference first, then all others
    assert images.selection is images.reports["real"]
    assert [len(split) for split in (images.train, *images.reports.values())] == [36, 6, 6, 3]
    assert images.train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    for split in (images.train, *images.reports.values()):
        assert split.classes == ("The Eiffel Tower", "dog", "ice cream")
    assert images.reports["sketch"].images[1] == (
        root / "sketch/dog/sketch_test_000000.png",
        f"{root / 'sketch_test.txt'} line 2",
    )
    data.check_images([images.train, *images.reports.values()], workers=2)
    assert list(layouts.read_domainnet(root, "real", ("sketch",), "test").reports) == ["real", "sketch"]


def test_keep_underscores(root: Path) -> None:
    images = layouts.read_domainnet(root, "real", (), "test", keep_underscores=True)
    assert images.train.classes == images.reports["clipart"].classes == CLASSES


def test_a_validation_list_is_preferred(root: Path) -> None:
    lines = (root / "real_test.txt").read_text()
    (root / "real_val.txt").write_text(lines)
    images = layouts.read_domainnet(root, "real", (), "val")
    assert len(images.train) == 36 and images.selection.name == "val"
    assert [file.path for file in images.selection.images] == [file.path for file in images.reports["real"].images]


def test_without_a_validation_list_a_tenth_is_held_out(root: Path) -> None:
    images, whole = (layouts.read_domainnet(root, "real", (), select_on) for select_on in ("val", "test"))
    assert (len(images.train), len(images.selection)) == (33, 3)
    assert images.selection.labels.tolist() == [0, 1, 2]
    assert sorted(images.train.images + images.selection.images) == sorted(whole.train.images)


def test_too_few_images_to_hold_out(root: Path) -> None:
    lines = (root / "real_train.txt").read_text().splitlines(keepends=True)
    (root / "real_train.txt").write_text("".join(lines[::5]))
    with raises("8 training images are too few .* --select-on test"):
        layouts.read_domainnet(root, "real", (), "val")
    assert len(layouts.read_domainnet(root, "real", (), "test").train) == 8


def test_a_test_list_may_lack_a_class(root: Path) -> None:
    """DomainNet's own painting_test.txt does."""
    path = root / "sketch_test.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "/dog/" not in line))
    sketch = layouts.read_domainnet(root, "real", (), "test").reports["sketch"]
    assert sketch.labels.tolist() == [0, 2] and sketch.classes == ("The Eiffel Tower", "dog", "ice cream")


@pytest.mark.parametrize("name", ["a picture of 3 dogs.png", "æøå 犬 🐕.png", "a\u2028b\x85c.png"], ids=ascii)
def test_odd_file_names(name: str, root: Path) -> None:
    (root / "sketch/dog/sketch_test_000000.png").rename(root / "sketch/dog" / name)
    path = root / "sketch_test.txt"
    path.write_text(path.read_text().replace("sketch_test_000000.png 1", f"{name} 1"), encoding="utf-8")
    sketch = layouts.read_domainnet(root, "real", ("sketch",), "test").reports["sketch"]
    assert sketch.images[1].path.name == name
    data.check_images([sketch], 1)


def windows(path: Path) -> None:
    """As Notepad saves it."""
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def blank_end(path: Path) -> None:
    path.write_text(path.read_text() + "\n \n")


def no_last_newline(path: Path) -> None:
    path.write_text(path.read_text().rstrip("\n"))


def other_folders(path: Path) -> None:
    """Absolute and relative paths elsewhere: the class is still the last folder."""
    lines = path.read_text().splitlines()
    lines[0], lines[1] = f"{path.parent}/{lines[0]}", f"clipart/../{lines[1]}"
    path.write_text("\n".join(lines))


@pytest.mark.parametrize("change", [windows, blank_end, no_last_newline, other_folders])
def test_harmless_lists(change: Callable[[Path], None], root: Path) -> None:
    change(root / "sketch_test.txt")
    images = layouts.read_domainnet(root, "real", ("sketch",), "test")
    assert images.reports["sketch"].labels.tolist() == [0, 1, 2]
    data.check_images([images.reports["sketch"]], 1)


@pytest.mark.parametrize(
    ("name", "found"), [("real", "The_Eiffel_Tower, dog, ice_cream"), ("empty", "nothing"), ("no", "no such folder")]
)
def test_a_folder_without_lists(name: str, found: str, root: Path) -> None:
    (root / "empty").mkdir()
    with raises(rf"--data-root .*{name} has no DOMAIN_test.txt \(found: {found}\): expected DOMAIN/CLASS/FILE"):
        layouts.read_domainnet(root / name, "real", (), "test")


@pytest.mark.parametrize(
    ("reference", "shifts", "message"),
    [
        ("reel", (), "unknown split 'reel': did you mean real.* known: clipart, real, sketch"),
        ("real", ("sketch", "clip-art"), "unknown split 'clip-art': did you mean clipart"),
        ("real", ("sketch", "real"), "'real' is the reference and a shift at once: leave it out of --shifts"),
        ("", (), "--reference is needed .* one of clipart, real, sketch"),
        ("sketch", (), "list .*sketch_train.txt cannot be read .*: restore it"),
    ],
)
def test_wrong_splits(reference: str, shifts: tuple[str, ...], message: str, root: Path) -> None:
    with raises(message):
        layouts.read_domainnet(root, reference, shifts, "test")


EIFFEL, DOG = "real/The_Eiffel_Tower/real_train_000000.jpg", "real/dog/real_train_000000.jpg"


@pytest.mark.parametrize(
    ("list_name", "old", "new", "message"),
    [
        ("real_train", f"{DOG} 1", DOG, f"real_train.txt line 13: '{DOG}' is not 'DOMAIN/CLASS/FILE LABEL': correct"),
        ("real_train", f"{DOG} 1", f"{DOG} one", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", f"{DOG} -1", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", f"{DOG} \u0661", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", f"{DOG} {'1' * 5_000}", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", f"{DOG}\t1", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", "1.jpg 1", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", "real/dog/ 1", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", "1", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", "", "line 13: '' is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", "dog/real_train_000003.jpg 1", "dog/real_train_000003.jpg 2",
         "line 16: .*000003.jpg has label 2, but line 13 gives folder 'dog' label 1: correct one"),
        ("real_train", f"{EIFFEL} 0", "real/tower/1.jpg 0",
         "line 2: .*has label 0, but line 1 gives it to folder 'tower': correct one"),
        ("clipart_test", "clipart/dog/", "clipart/wolf/",
         "clipart_test.txt line 3: folder 'wolf' is no class of the training list: correct one"),
        ("clipart_test", "clipart/dog/clipart_test_000000.jpg 1", "clipart/dog/clipart_test_000000.jpg 2",
         "clipart_test.txt line 3: .* has label 2, but the training list gives folder 'dog' label 1: correct one"),
    ],
)  # fmt: skip
def test_wrong_lines(list_name: str, old: str, new: str, message: str, root: Path) -> None:
    edit(root / f"{list_name}.txt", old, new)
    with raises(message):
        layouts.read_domainnet(root, "real", (), "test")


def test_a_class_that_training_does_not_know(root: Path) -> None:
    with (root / "sketch_test.txt").open("a") as file:
        file.write("sketch/wolf/1.png 3\n")
    with raises("sketch_test.txt line 4: folder 'wolf' is no class of the training list"):
        layouts.read_domainnet(root, "real", (), "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "real_train.txt is empty: it needs one 'DOMAIN/CLASS/FILE LABEL' a line"),
        (b"\n \r\n", "real_train.txt is empty"),
        (b"real/dog/1.jpg 0\nreal/cat/2.jpg 2\n", "real_train.txt has no label 1: number the classes from 0"),
        (b"real/dog/1.jpg 1\n", "real_train.txt has no label 0: number the classes from 0"),
        (b"real/dog/\xff.jpg 0\n", "real_train.txt cannot be read .*: restore it as UTF-8 text"),
    ],
)
def test_wrong_training_lists(content: bytes, message: str, root: Path) -> None:
    (root / "real_train.txt").write_bytes(content)
    with raises(message):
        layouts.read_domainnet(root, "real", (), "test")


def test_missing_files_are_found_at_once(root: Path) -> None:
    (root / "sketch/dog/sketch_test_000000.png").unlink()
    sketch = layouts.read_domainnet(root, "real", ("sketch",), "test").reports["sketch"]
    message = "sketch_test.txt line 2: .*dog/sketch_test_000000.png does not exist: restore it or delete the line"
    with raises(message):
        data.check_images([sketch], workers=2)
    assert_batches_raise(sketch, message)


# -------------------------------------------------------------------------------------------------------- CUB-200-2011


def make_cub(root: Path) -> None:
    """CUB-200-2011's files: three birds, the ids in no order; of each six images, two are for testing."""
    birds = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross", 3: "003.Chuck_will_Widow"}
    lines = {"images.txt": [], "image_class_labels.txt": [], "train_test_split.txt": []}
    for number, (bird, index) in enumerate(itertools.product(birds, range(6))):
        image = (number * 7) % 18 + 1
        path = f"{birds[bird]}/bird_{image:04}.jpg"
        (root / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        smooth(24, 18, seed=image).save(root / "images" / path)
        for name, value in zip(lines, (path, bird, int(index % 3 > 0)), strict=True):
            lines[name].append(f"{image} {value}\n")
    lines["classes.txt"] = [f"{bird} {name}\n" for bird, name in birds.items()]
    for name, content in lines.items():
        (root / name).write_text("".join(content))


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    make_cub(tmp_path)
    return tmp_path


def test_cub_layout(cub: Path) -> None:
    """Every image, its label and its part, as its folder and the raw lines tell."""
    part_of = dict(line.split() for line in (cub / "train_test_split.txt").read_text().splitlines())
    images = layouts.read_cub(cub, "cub", (), "test")
    assert list(images.reports) == ["cub"] and images.selection is images.reports["cub"]
    assert images.train.classes == ("Black footed Albatross", "Laysan Albatross", "Chuck will Widow")
    for split, part in ((images.train, "1"), (images.reports["cub"], "0")):
        expected = {
            (path, int(path.parent.name[:3]) - 1)
            for path in cub.glob("images/*/*.jpg")
            if part_of[str(int(path.stem[-4:]))] == part
        }
        assert len(split) == len(expected) == (12 if part == "1" else 6)
        assert {(file.path, label) for file, label in zip(split.images, split.labels, strict=True)} == expected
    data.check_images([images.train, images.selection], workers=1)
    held_out = layouts.read_cub(cub, "cub", (), "val", keep_underscores=True)
    assert (len(held_out.train), len(held_out.selection)) == (11, 1)
    assert held_out.train.classes[0] == "Black_footed_Albatross"
    assert held_out.reports["cub"].images == images.reports["cub"].images


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images", "1 001.B", "001.B", "images.txt line 1: .* is not 'ID VALUE': correct the line"),
        ("images", "8 001.B", "1 001.B", "images.txt line 2: .*images.txt line 1 has id 1 already: delete one"),
        ("images", "8 001.B", "99 001.B", "images.txt line 2: id 99 is not in .*image_class_labels.txt: correct one"),
        ("image_class_labels", "8 1\n", "", "images.txt line 2: id 8 is not in .*image_class_labels.txt"),
        ("train_test_split", "8 1\n", "8 1\n19 1\n", "train_test_split.txt line 3: id 19 is not in .*images.txt"),
        ("train_test_split", "8 1", "8 2", "train_test_split.txt line 2: '2' is neither 1 .* nor 0"),
        ("image_class_labels", "8 1", "8 4", "image_class_labels.txt line 2: '4' is no class of .*classes.txt"),
        ("image_class_labels", "8 1", "8 one", "image_class_labels.txt line 2: 'one' is no class of .*classes.txt"),
        ("classes", "2 002.L", "4 002.L", "classes.txt has no id 2: number the classes from 1 without gaps"),
        ("classes", "2 002.L", "\n2 002.L", "classes.txt line 2: '' is not 'ID VALUE'"),
    ],
)  # fmt: skip
def test_wrong_lines_of_cub(name: str, old: str, new: str, message: str, cub: Path) -> None:
    edit(cub / f"{name}.txt", old, new)
    with raises(message):
        layouts.read_cub(cub, "cub", (), "test")


def test_wrong_files_of_cub(cub: Path) -> None:
    with raises(r"--data-root is needed with --data cub: the folder that holds images/, images.txt"):
        layouts.read_cub(None, "cub", (), "test")
    with raises(r"has no CUB-200-2011 \(found: 001.Bl.*\): expected images/, images.txt, .*classes.txt"):
        layouts.read_cub(cub / "images", "cub", (), "test")
    with raises("unknown split 'real': .*known: cub"):
        layouts.read_cub(cub, "cub", ("real",), "test")
    (cub / "images.txt").write_bytes(b"1 \xff.jpg")
    with raises("images.txt cannot be read .*: restore it as UTF-8 text"):
        layouts.read_cub(cub, "cub", (), "test")


def test_cub_without_images_to_train_on(cub: Path) -> None:
    path = cub / "train_test_split.txt"
    path.write_text(path.read_text().replace(" 1\n", " 0\n"))
    with raises("train_test_split.txt has no line 'ID 1': train has no image; restore it"):
        layouts.read_cub(cub, "cub", (), "test")


# -------------------------------------------------------------------------------------------------------- class folders


def write_images(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        smooth(24, 18, seed=len(str(folder / name))).save(folder / name)


def make_folder(root: Path) -> None:
    """train, val and the shift `drawn`, which lacks a class; names with spaces and non-ASCII letters."""
    for split, count in {"train": 12, "val": 2, "drawn": 1}.items():
        for name in ("dog", "ice cream", "måne"):
            if (split, name) != ("drawn", "dog"):
                write_images(root / split / name, [f"{split} {index}.jpg" for index in range(count)])


def labelled(split: data.Split) -> list[tuple[str, int]]:
    """The class folder and the label of each image, in order."""
    return [(file.path.parent.name, label) for file, label in zip(split.images, split.labels.tolist(), strict=True)]


def test_folder_layout(tmp_path: Path) -> None:
    make_folder(tmp_path)
    (tmp_path / "train/dog/notes.txt").write_text("no image")
    (tmp_path / "train/dog/.hidden.jpg").write_bytes(b"")
    images = layouts.read_folder(tmp_path, "val", (), "test")
    names = ("dog", "ice cream", "måne")
    assert images.train.classes == names and list(images.reports) == ["val", "drawn"]
    assert labelled(images.train) == [(name, label) for label, name in enumerate(names) for _ in range(12)]
    assert labelled(images.reports["val"]) == [(name, label) for label, name in enumerate(names) for _ in range(2)]
    assert labelled(images.reports["drawn"]) == [("ice cream", 1), ("måne", 2)]
    assert images.train.images[0].path == tmp_path.resolve() / "train/dog/train 0.jpg"
    data.check_images([images.train, *images.reports.values()], 1)
    other = layouts.read_folder(tmp_path, "drawn", (), "val")
    assert list(other.reports) == ["drawn"] and len(other.selection) == 6  # val is selected on


def test_folder_without_val_holds_out_a_tenth(tmp_path: Path) -> None:
    make_folder(tmp_path)
    for path in sorted((tmp_path / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "val").rmdir()
    images = layouts.read_folder(tmp_path, "val", (), "val")
    parts = [{file.path for file in split.images} for split in (images.train, images.selection, images.reports["val"])]
    assert [len(part) for part in parts] == [30, 3, 3] and len(set.union(*parts)) == 36


def test_folder_follows_links(tmp_path: Path) -> None:
    make_folder(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for split in ("train", "val"):
        os.symlink(tmp_path / "real" / split, tmp_path / "linked" / split)
    images, linked = (layouts.read_folder(tmp_path / name, "val", (), "test") for name in ("real", "linked"))
    assert linked.train.images[:] == images.train.images[:]


def test_wrong_folders(tmp_path: Path) -> None:
    with raises(r"has no train/CLASS \(found: nothing\): expected train/CLASS/IMAGE to train on"):
        layouts.read_folder(tmp_path, "val", (), "test")
    make_folder(tmp_path)
    with raises("unknown split 'sketch': .*known: drawn, val"):
        layouts.read_folder(tmp_path, "val", ("sketch",), "test")
    write_images(tmp_path / "drawn/cat", ["a.jpg"])
    with raises("drawn/cat is no class of .*train: rename or delete it, or leave drawn out of --shifts"):
        layouts.read_folder(tmp_path, "val", (), "test")
    (tmp_path / "train/zebra").mkdir()
    with raises("train/zebra has no image .*: add some or delete the folder"):
        layouts.read_folder(tmp_path, "val", (), "test")


def test_cached_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives what listing gives; a file that was added is seen; a damaged one is made anew."""
    make_folder(tmp_path / "set")
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(layouts, "CACHED_FROM", 1)
    monkeypatch.setattr(layouts, "SAME_STAMP", 0)
    root, listed = tmp_path / "set/train", []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(path), scandir(path))[1])
    first = layouts.read_tree(root)
    (cached,) = (tmp_path / "cache/index").iterdir()
    listed.clear()
    again = layouts.read_tree(root)
    assert not listed and again.images[:] == first.images[:] and again.folders == first.folders
    smooth(24, 18, seed=1).save(root / "dog/zz.jpg")
    assert len(layouts.read_tree(root).images) == len(first.images) + 1
    cached.write_bytes(cached.read_bytes()[:100])
    assert len(layouts.read_tree(root).images) == len(first.images) + 1


# ------------------------------------------------------------------------------------------------------------- ImageNet


def make_imagenet(root: Path) -> None:
    """A training image of each of 1,000 classes, flat validation images with Kaggle's list, V2, R and A."""
    ids = [f"n{index * 7:08}" for index in range(1000)]
    smooth(24, 18, seed=0).save(root / "one.jpg")
    image = (root / "one.jpg").read_bytes()

    def write(folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)

    for wordnet_id in ids:
        write(root / "imagenet/train" / wordnet_id, f"{wordnet_id}_1.JPEG")
    lines = ["ImageId,PredictionString\n"]
    for number, label in ((1, 999), (2, 5), (3, 5)):
        write(root / "imagenet/val", f"ILSVRC2012_val_{number:08}.JPEG")
        lines.append(f"ILSVRC2012_val_{number:08},{ids[label]} 1 2 3 4\n")
    (root / "imagenet/LOC_val_solution.csv").write_text("".join(lines))
    for label in (0, 10, 2):
        write(root / "imagenet-v2" / str(label), "a.jpeg")
    for label in (3, 500, 7):
        write(root / "imagenet-r" / ids[label], "a.jpg")
    write(root / "imagenet-a" / ids[8], "a.jpg")
    write(root / "sketch" / ids[9], "sketch_1.JPEG")


def imagenet_classes() -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(1000))


def test_imagenet_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "imagenet_classes", imagenet_classes)
    make_imagenet(tmp_path)
    images = layouts.read_imagenet(tmp_path, "imagenet", (), "test")
    assert images.train.labels.tolist() == list(range(1000)) and images.train.classes == imagenet_classes()
    assert {name: split.labels.tolist() for name, split in images.reports.items()} == {
        "imagenet": [999, 5, 5],
        "imagenet-v2": [0, 2, 10],  # by number, not by string
        "imagenet-r": [3, 7, 500],
        "imagenet-a": [8],
        "imagenet-sketch": [9],
    }
    for name, split in images.reports.items():
        compared = {"imagenet-r": [3, 7, 500], "imagenet-a": [8]}.get(name)
        assert (split.compared is None) == (compared is None), name
        assert compared is None or np.flatnonzero(split.compared).tolist() == compared
    assert [file.path.name for file in images.reports["imagenet-v2"].images] == ["a.jpeg"] * 3
    selected = layouts.read_imagenet(tmp_path, "imagenet", ("imagenet-a",), "val")
    assert (len(selected.train), len(selected.selection), list(selected.reports)) == (
        990,
        10,
        ["imagenet", "imagenet-a"],
    )


def test_imagenet_development_kit_class_folders_and_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "imagenet_classes", imagenet_classes)
    make_imagenet(tmp_path)
    base = tmp_path / "imagenet"
    (base / "LOC_val_solution.csv").unlink()
    with raises("has no class folders: for their labels, put Kaggle's LOC_val_solution.csv in"):
        layouts.read_imagenet(tmp_path, "imagenet", (), "test")
    # The kit numbers the classes in an order of its own: here, backwards.
    (base / "map_clsloc.txt").write_text("".join(f"n{7 * (1000 - k):08} {k} name\n" for k in range(1, 1001)))
    (base / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n995\n1000\n")
    images = layouts.read_imagenet(tmp_path, "imagenet", (), "test")
    assert images.reports["imagenet"].labels.tolist() == [999, 5, 0]

    (base / "val").rename(tmp_path / "flat")
    write_images(base / "val" / f"n{7 * 4:08}", ["a.JPEG", "b.JPEG"])
    (tmp_path / "imagenet-v2").rename(tmp_path / "elsewhere")
    images = layouts.read_imagenet(
        tmp_path, "imagenet", ("imagenet-v2",), "test", split_roots=(f"imagenet-v2={tmp_path / 'elsewhere'}",)
    )
    assert {name: split.labels.tolist() for name, split in images.reports.items()} == {
        "imagenet": [4, 4], "imagenet-v2": [0, 2, 10],
    }  # fmt: skip
    with raises("has no imagenet-v2 or imagenetv2-matched-frequency-format-val .*--split-roots imagenet-v2=DIR"):
        layouts.read_imagenet(tmp_path, "imagenet", ("imagenet-v2",), "test")
    with raises("--reference imagenet-r has no training images: give imagenet"):
        layouts.read_imagenet(tmp_path, "imagenet-r", ("imagenet",), "test")
    with raises("--split-roots imagenet-a=nowhere: no such folder"):
        layouts.read_imagenet(tmp_path, "imagenet", (), "test", split_roots=("imagenet-a=nowhere",))


# --------------------------------------------------------------------------------------------------------------- arrays


def make_npy(root: Path) -> None:
    """Arrays of `photo`, to train and test on, and of `art`, under the authors' folder names."""
    (root / "classes.txt").write_text("dog\nice_cream\n")
    random = np.random.default_rng(0)
    for name, part, count in (("photo", "train", 20), ("photo", "test", 4), ("art", "test", 2)):
        (root / f"{name}_x224").mkdir(exist_ok=True)
        np.save(root / f"{name}_x224/{part}_images.npy", random.integers(0, 256, (count, 24, 18, 3), np.uint8))
        np.save(root / f"{name}_x224/{part}_labels.npy", np.arange(count) % 2)


def test_npy_layout(tmp_path: Path) -> None:
    make_npy(tmp_path)
    images = layouts.read_npy(tmp_path, "photo", (), "test")
    assert images.train.classes == ("dog", "ice cream") and list(images.reports) == ["photo", "art"]
    for split, file in ((images.train, "photo_x224/train"), (images.reports["art"], "art_x224/test")):
        assert isinstance(split.images, np.memmap)
        np.testing.assert_array_equal(split.images, np.load(tmp_path / f"{file}_images.npy"))
        np.testing.assert_array_equal(split.labels, np.load(tmp_path / f"{file}_labels.npy"))
    held_out = layouts.read_npy(tmp_path, "photo", (), "val")
    assert (len(held_out.train), len(held_out.selection)) == (18, 2)
    np.testing.assert_array_equal(held_out.selection.images[0], images.train.images[18])


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        (
            "test_images",
            np.zeros((4, 24, 18, 3), np.float32),
            r"test_images.npy is float32 \[4, 24, 18, 3\]: it must be",
        ),
        ("test_images", np.zeros((4, 24, 18), np.uint8), r"it must be uint8 \[N, H, W, 3\]"),
        ("test_labels", np.zeros(3, np.int64), r"test_labels.npy is int64 \[3\]: it must be integers \[4\]"),
        ("test_labels", np.array([0, 1, 2, 0]), "test_labels.npy has label 2 at index 2: there are 2 classes, from 0"),
        ("test_labels", np.array([None] * 4), "test_labels.npy cannot be read as an array"),
    ],
)
def test_wrong_arrays(file: str, array: np.ndarray, message: str, tmp_path: Path) -> None:
    make_npy(tmp_path)
    np.save(tmp_path / f"photo_x224/{file}.npy", array)
    with raises(message):
        layouts.read_npy(tmp_path, "photo", (), "test")


# ---------------------------------------------------------------------------------------------- DomainNet's six domains


def test_quickdraw_is_left_out_but_for_its_name(root: Path) -> None:
    for line in (text := (root / "sketch_test.txt").read_text()).splitlines():
        (root / line.split()[0].replace("sketch/", "quickdraw/")).parent.mkdir(parents=True, exist_ok=True)
    (root / "quickdraw_test.txt").write_text(text.replace("sketch/", "quickdraw/"))
    assert list(layouts.read_domainnet(root, "real", (), "test").reports) == ["real", "clipart", "sketch"]
    assert list(layouts.read_domainnet(root, "real", ("quickdraw",), "test").reports) == ["real", "quickdraw"]
