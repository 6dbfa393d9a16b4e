"""The readers of layouts.py, on trees of small real image files, against a brute-force reading."""

import ast
import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import EXAMPLES, shared
from helpers import (
    BY_ID,
    IN_A,
    IN_R,
    WNIDS,
    ZOO,
    assert_batches_raise,
    plant,
    raises,
    seeded_model,
    smooth,
)
from mutations import read_unless_refused, with_mutations

import data
import eval as evaluation
import lipsum
from support import devices, layouts
from support.run import setup as opening
from support.run.options import Places, Sources

CLASSES = ("The_Eiffel_Tower", "dog", "ice_cream")
CLASSES_OF_IMAGENET = tuple(layouts.OPENAI_CLASSES.read_text().splitlines())
READABLE_CLASSES = ("The Eiffel Tower", "dog", "ice cream")


def edit(path: Path, old: str, new: str) -> None:
    """Replaces the first `old` in a list."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --------------------------------------------------------------------------------------------------- DomainNet's lists


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """DomainNet's layout: training and test lists of `real`, test lists of `clipart` and `sketch`."""
    for name, images in {
        "real_train": 12,
        "real_test": 2,
        "clipart_test": 2,
        "sketch_test": 1,
    }.items():
        domain, lines = name.split("_")[0], []
        for label, folder in enumerate(CLASSES):
            (tmp_path / domain / folder).mkdir(parents=True, exist_ok=True)
            for index in range(images):
                path = (
                    f"{domain}/{folder}/{name}_{index:06}.{'png' if domain == 'sketch' else 'jpg'}"
                )
                smooth(24, 18, seed=label * 100 + index).save(tmp_path / path)
                lines.append(f"{path} {label}\n")
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    return tmp_path


def test_domainnet_layout(root: Path) -> None:
    images = layouts.read_domainnet(root, "real", (), "test")
    assert list(images.reports) == [
        "real",
        "clipart",
        "sketch",
    ]  # the reference first, then all others
    assert images.selection is images.reports["real"]
    assert [len(split) for split in (images.train, *images.reports.values())] == [36, 6, 6, 3]
    assert images.train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    assert images.reports["sketch"].images[1] == (
        root / "sketch/dog/sketch_test_000000.png",
        f"{root / 'sketch_test.txt'} line 2",
    )
    data.check_images([images.train, *images.reports.values()], workers=2)
    assert list(layouts.read_domainnet(root, "real", ("sketch",), "test").reports) == [
        "real",
        "sketch",
    ]


def test_class_names(root: Path) -> None:
    """Spaces replace underscores in every split, unless --keep-underscores is given."""
    for kept, classes in ((False, READABLE_CLASSES), (True, CLASSES)):
        sources = Sources(data="domainnet", reference="real", keep_underscores=kept)
        images = layouts.read(sources, Places(root))
        for split in (images.train, images.selection, *images.reports.values()):
            assert split.classes == classes


def test_a_validation_list_is_preferred(root: Path) -> None:
    lines = (root / "real_test.txt").read_text()
    (root / "real_val.txt").write_text(lines)
    images = layouts.read_domainnet(root, "real", (), "val")
    assert len(images.train) == 36 and images.selection.name == "val"
    assert [file.path for file in images.selection.images] == [
        file.path for file in images.reports["real"].images
    ]


def test_without_a_validation_list_a_tenth_is_held_out(root: Path) -> None:
    images, whole = (
        layouts.read_domainnet(root, "real", (), select_on) for select_on in ("val", "test")
    )
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
    """As DomainNet's own painting_test.txt does."""
    path = root / "sketch_test.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "/dog/" not in line))
    sketch = layouts.read_domainnet(root, "real", (), "test").reports["sketch"]
    assert sketch.labels.tolist() == [0, 2] and sketch.classes == CLASSES


def test_quickdraw_is_left_out_unless_named(root: Path) -> None:
    for name in ("train", "test"):
        (root / f"quickdraw_{name}.txt").write_text((root / f"real_{name}.txt").read_text())
    assert list(layouts.read_domainnet(root, "real", (), "test").reports) == [
        "real",
        "clipart",
        "sketch",
    ]
    assert list(layouts.read_domainnet(root, "real", ("quickdraw",), "test").reports) == [
        "real",
        "quickdraw",
    ]
    assert list(layouts.read_domainnet(root, "quickdraw", (), "test").reports)[:2] == [
        "quickdraw",
        "clipart",
    ]


@pytest.mark.parametrize(
    "name", ["a picture of 3 dogs.png", "æøå 犬 🐕.png", "a\u2028b\x85c.png"], ids=ascii
)
def test_odd_file_names(name: str, root: Path) -> None:
    (root / "sketch/dog/sketch_test_000000.png").rename(root / "sketch/dog" / name)
    path = root / "sketch_test.txt"
    path.write_text(
        path.read_text().replace("sketch_test_000000.png 1", f"{name} 1"), encoding="utf-8"
    )
    sketch = layouts.read_domainnet(root, "real", ("sketch",), "test").reports["sketch"]
    assert sketch.images[1].path.name == name
    data.check_images([sketch], 1)


def windows(path: Path) -> None:
    """Rewrites the file as Notepad saves it."""
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


def blank_end(path: Path) -> None:
    path.write_text(path.read_text() + "\n \n")


def no_last_newline(path: Path) -> None:
    path.write_text(path.read_text().rstrip("\n"))


def other_folders(path: Path) -> None:
    """Makes one path absolute and one relative: the class is still the last folder."""
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
    ("name", "found"),
    [("real", "The_Eiffel_Tower, dog, ice_cream"), ("empty", "nothing"), ("no", "no such folder")],
)
def test_a_root_without_lists(name: str, found: str, root: Path) -> None:
    (root / "empty").mkdir()
    with raises(
        rf"--data-root .*{name} has no DOMAIN_test.txt \(found: {found}\): expected DOMAIN/CLASS/FILE"
    ):
        layouts.read_domainnet(root / name, "real", (), "test")


@pytest.mark.parametrize(
    ("reference", "shifts", "message"),
    [
        ("reel", (), "unknown split 'reel': did you mean real.* known: clipart, real, sketch"),
        ("real", ("sketch", "clip-art"), "unknown split 'clip-art': did you mean clipart"),
        (
            "real",
            ("sketch", "real"),
            "'real' is the reference and a shift at once: leave it out of --shifts",
        ),
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
        (
            "real_train",
            f"{DOG} 1",
            DOG,
            f"real_train.txt line 13: '{DOG}' is not 'DOMAIN/CLASS/FILE LABEL': correct",
        ),
        ("real_train", f"{DOG} 1", f"{DOG} one", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", f"{DOG} -1", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", f"{DOG} \u0661", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        (
            "real_train",
            f"{DOG} 1",
            f"{DOG} {'1' * 5_000}",
            "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'",
        ),
        ("real_train", f"{DOG} 1", "1.jpg 1", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", "real/dog/ 1", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", "1", "line 13: .*is not 'DOMAIN/CLASS/FILE LABEL'"),
        ("real_train", f"{DOG} 1", "", "line 13: '' is not 'DOMAIN/CLASS/FILE LABEL'"),
        (
            "real_train",
            "dog/real_train_000003.jpg",
            "dog/real_train_000001.jpg",
            f"line 16: .*real_train.txt line 14 has {DOG.replace('000000', '000001')} already: delete one of them",
        ),
        (
            "real_train",
            "dog/real_train_000003.jpg 1",
            "dog/real_train_000003.jpg 2",
            "line 16: .*000003.jpg has label 2, but line 13 gives folder 'dog' label 1: correct one",
        ),
        (
            "real_train",
            f"{EIFFEL} 0",
            "real/tower/1.jpg 0",
            "line 2: .*has label 0, but line 1 gives folder 'tower' label 0: correct one",
        ),
        (
            "clipart_test",
            "clipart/dog/",
            "clipart/wolf/",
            "clipart_test.txt line 3: folder 'wolf' is no class of the training list: correct one",
        ),
        (
            "clipart_test",
            "clipart/dog/clipart_test_000000.jpg 1",
            "clipart/dog/clipart_test_000000.jpg 2",
            "clipart_test.txt line 3: .* has label 2, but the training list gives folder 'dog' label 1: correct one",
        ),
    ],
)
def test_wrong_lines(list_name: str, old: str, new: str, message: str, root: Path) -> None:
    edit(root / f"{list_name}.txt", old, new)
    with raises(message):
        layouts.read_domainnet(root, "real", (), "test")


def test_a_class_that_is_not_in_the_training_list(root: Path) -> None:
    with (root / "sketch_test.txt").open("a") as file:
        file.write("sketch/wolf/1.png 3\n")
    with raises("sketch_test.txt line 4: folder 'wolf' is no class of the training list"):
        layouts.read_domainnet(root, "real", (), "test")


@pytest.mark.parametrize("space", ["  ", "\t", " \t "])
def test_any_white_space_before_a_label(space: str, root: Path) -> None:
    before = layouts.read_domainnet(root, "real", (), "test")
    for path in root.glob("*.txt"):
        path.write_text(path.read_text().replace(" ", space))
    after = layouts.read_domainnet(root, "real", (), "test")
    assert after.train.images == before.train.images
    np.testing.assert_array_equal(after.train.labels, before.train.labels)


def test_a_domain_whose_images_are_not_there(root: Path) -> None:
    shutil.rmtree(root / "clipart")
    with raises(
        "clipart_test.txt lists images of .*clipart, which is not there: leave it out with --shifts sketch"
    ):
        layouts.read_domainnet(root, "real", (), "test")
    layouts.read_domainnet(root, "real", ("sketch",), "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "real_train.txt is empty: it needs one 'DOMAIN/CLASS/FILE LABEL' per line"),
        (b"\n \r\n", "real_train.txt is empty"),
        (
            b"real/dog/1.jpg 0\nreal/cat/2.jpg 2\n",
            "real_train.txt has no label 1: number the classes from 0",
        ),
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


def test_cub_layout(cub: Path) -> None:
    """Every image, with the label that its folder specifies and the part that the raw lines specify."""
    part_per_image = dict(
        line.split() for line in (cub / "train_test_split.txt").read_text().splitlines()
    )
    images = layouts.read_cub(cub, "cub", (), "test")
    assert list(images.reports) == ["cub"] and images.selection is images.reports["cub"]
    assert images.train.classes == (
        "Black_footed_Albatross",
        "Laysan_Albatross",
        "Chuck_will_Widow",
    )
    for split, part in ((images.train, "1"), (images.reports["cub"], "0")):
        expected = {
            (path, int(path.parent.name[:3]) - 1)
            for path in cub.glob("images/*/*.jpg")
            if part_per_image[str(int(path.stem[-4:]))] == part
        }
        assert len(split) == len(expected) == (12 if part == "1" else 6)
        assert {
            (file.path, label) for file, label in zip(split.images, split.labels, strict=True)
        } == expected
    data.check_images([images.train, images.selection], workers=1)
    held_out = layouts.read(Sources(data="cub", reference="cub", select_on="val"), Places(cub))
    assert (len(held_out.train), len(held_out.selection)) == (11, 1)
    assert held_out.train.classes == (
        "Black footed Albatross",
        "Laysan Albatross",
        "Chuck will Widow",
    )
    assert held_out.reports["cub"].images == images.reports["cub"].images


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images", "1 001.B", "001.B", "images.txt line 1: .* is not 'ID VALUE': correct the line"),
        (
            "images",
            "8 001.B",
            "1 001.B",
            "images.txt line 2: .*images.txt line 1 has id 1 already: delete one",
        ),
        (
            "images",
            "8 001.B",
            "99 001.B",
            "images.txt line 2: id 99 is not in .*image_class_labels.txt: correct one",
        ),
        (
            "image_class_labels",
            "8 1\n",
            "",
            "images.txt line 2: id 8 is not in .*image_class_labels.txt",
        ),
        (
            "train_test_split",
            "8 1\n",
            "8 1\n19 1\n",
            "train_test_split.txt line 3: id 19 is not in .*images.txt",
        ),
        (
            "train_test_split",
            "8 1",
            "8 2",
            "train_test_split.txt line 2: '2' is neither 1 .* nor 0",
        ),
        (
            "image_class_labels",
            "8 1",
            "8 4",
            "image_class_labels.txt line 2: '4' is no class of .*classes.txt",
        ),
        (
            "image_class_labels",
            "8 1",
            "8 one",
            "image_class_labels.txt line 2: 'one' is no class of .*classes.txt",
        ),
        (
            "classes",
            "2 002.L",
            "4 002.L",
            "classes.txt has no id 2: number the classes from 1 without gaps",
        ),
        (
            "images",
            "bird_0008",
            "bird_0001",
            "images.txt line 2: .*images.txt line 1 has 001.*bird_0001.jpg already",
        ),
        ("classes", "2 002.L", "\n2 002.L", "classes.txt line 2: '' is not 'ID VALUE'"),
    ],
)
def test_wrong_lines_of_cub(name: str, old: str, new: str, message: str, cub: Path) -> None:
    edit(cub / f"{name}.txt", old, new)
    with raises(message):
        layouts.read_cub(cub, "cub", (), "test")


def test_wrong_files_of_cub(cub: Path) -> None:
    with raises(
        r"--data-root is needed with --data cub: the folder that holds images/, images.txt"
    ):
        layouts.read_cub(None, "cub", (), "test")
    with raises(
        r"has no CUB-200-2011 \(found: 001.Bl.*\): expected images/, images.txt, .*classes.txt"
    ):
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


# ------------------------------------------------------------------------------------------------------- class folders


def assert_holds(split: data.Split, root: Path, label_per_folder: Mapping[str, int]) -> None:
    """The split has the files on disk: folders in label order, and the files of each in the order of their names."""
    expected = [
        (root / folder / name, label_per_folder[folder])
        for folder in sorted(label_per_folder, key=label_per_folder.__getitem__)
        if (root / folder).is_dir()
        for name in sorted(os.listdir(root / folder))
    ]
    assert len(split) == len(expected) > 0
    assert [
        (file.path, label) for file, label in zip(split.images, split.labels.tolist(), strict=True)
    ] == expected
    data.check_images([split], workers=1)


def test_folder_layout(zoo: Path) -> None:
    images = layouts.read_folder(zoo, "val", (), "test")
    assert list(images.reports) == ["val", "a painting", "sketch"]
    assert images.selection is images.reports["val"]
    for name in ("notes.txt", ".hidden.jpg"):  # they are not images
        (zoo / "train/zebra" / name).unlink()
    for split in (images.train, *images.reports.values()):
        assert split.classes == ("ice_cream", "zebra", "Éléphant d'Asie", "犬")
        assert split.compared is None
        assert_holds(split, zoo / split.name, ZOO)
    assert images.reports["sketch"].labels.tolist() == [0, 0, 1, 1, 3, 3]
    named = layouts.read(Sources(data="folder", reference="val", shifts=("sketch",)), Places(zoo))
    assert list(named.reports) == ["val", "sketch"] and named.train.classes[0] == "ice cream"


def test_selection_data_of_folder(zoo: Path) -> None:
    """A tenth of train; or val, if it exists and is not the reference."""
    paths = {file.path for file in layouts.read_folder(zoo, "val", (), "test").train.images}
    images = layouts.read_folder(zoo, "val", (), "val")
    assert (len(images.train), len(images.selection)) == (44, 4)
    assert {file.path for file in [*images.train.images, *images.selection.images]} == paths
    other = layouts.read_folder(zoo, "sketch", (), "val")
    assert list(other.reports) == ["sketch", "a painting"] and len(other.train) == 48
    assert [file.path.parts[-3] for file in other.selection.images] == ["val"] * 8
    both = layouts.read_folder(zoo, "sketch", ("val",), "val")
    assert both.selection is both.reports["val"]


def test_folder_without_val(zoo: Path) -> None:
    """One tenth of train is reported and another one is selected on; the three are disjoint."""
    whole = layouts.read_folder(zoo, "val", (), "test").train
    (zoo / "val").rename(zoo / ".val")
    images = layouts.read_folder(zoo, "val", ("sketch",), "val")
    parts = [images.train, images.selection, images.reports["val"]]
    assert [len(part) for part in parts] == [40, 4, 4]
    label_per_file = dict(
        zip((file.path for file in whole.images), whole.labels.tolist(), strict=True)
    )
    found = [
        (file.path, label)
        for part in parts
        for file, label in zip(part.images, part.labels.tolist(), strict=True)
    ]
    assert len(found) == len(label_per_file) and dict(found) == label_per_file
    with raises("no val/CLASS"):
        layouts.read_folder(zoo, "sketch", ("val",), "val")


def test_links_to_folders_and_images(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    linked = tmp_path_factory.mktemp("linked")
    (linked / "train").mkdir()
    for name in ZOO:
        (linked / "train" / name).symlink_to(zoo / "val" / name)
    (linked / "sketch").symlink_to(zoo / "sketch")
    (linked / "nowhere").symlink_to(linked / "missing")
    (linked / "loop").symlink_to(linked / "loop")
    (linked / "train/zebra/2.jpg").symlink_to(zoo / "train/zebra/2.jpg")
    (linked / "train/zebra/1.jpg").unlink()
    images = layouts.read_folder(linked, "sketch", (), "test")
    assert_holds(images.train, linked / "train", ZOO)
    assert images.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert_holds(images.reports["sketch"], zoo / "sketch", ZOO)
    (linked / "train/zebra/3.jpg").symlink_to(linked / "missing.jpg")
    with raises("^.*/train/zebra/3.jpg does not exist: restore it or leave it out$"):
        data.check_images([layouts.read_folder(linked, "sketch", (), "test").train], workers=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "sketch/yak").mkdir(),
            r"sketch/yak has no image \(.jpg .*\): add some or delete it",
        ),
        (
            lambda root: plant(root, {"train/yak": [], "val/yak": ["1.jpg"]}),
            "train/yak has no image",
        ),
        (
            lambda root: plant(root, {"sketch/yak": ["1.jpg"]}),
            "sketch/yak is no class of .*train: rename or delete it, or leave sketch out of --shifts",
        ),
        (
            lambda root: (root / "train").rename(root / "training"),
            r"has no train/CLASS \(found: a painting, sketch, training, val\): expected train/CLASS/IMAGE .*SHIFT/CL",
        ),
    ],
)
def test_wrong_folders(change: Callable[[Path], object], message: str, zoo: Path) -> None:
    change(zoo)
    with raises(message):
        layouts.read_folder(zoo, "val", (), "test")


def test_wrong_roots_of_folder(zoo: Path) -> None:
    with raises(
        "--data-root is needed with --data folder: the folder that holds train/CLASS/IMAGE"
    ):
        layouts.read_folder(None, "val", (), "test")
    with raises(r"has no train/CLASS \(found: no such folder\): expected train/CLASS/IMAGE"):
        layouts.read_folder(zoo / "no", "val", (), "test")
    with raises("unknown split 'sketches': did you mean sketch"):
        layouts.read_folder(zoo, "val", ("sketches",), "test")
    with raises("--shifts has 'sketch' twice: give it once"):
        layouts.read_folder(zoo, "val", ("sketch", "sketch"), "test")
    with raises("--split-roots is for --data imagenet: leave it out with --data folder"):
        layouts.read(Sources(data="folder", reference="val"), Places(zoo, ("sketch=here",)))


def test_domains_without_lists(root: Path) -> None:
    """DOMAIN/CLASS/FILE, as DomainBed reads it: a fifth of the reference is reported, nothing is in two splits."""
    for path in root.glob("*.txt"):
        path.unlink()
    images = layouts.read_folder(root, "real", (), "test")
    assert (
        list(images.reports) == ["real", "clipart", "sketch"]
        and images.selection is images.reports["real"]
    )
    paths = [
        {file.path for file in split.images} for split in (images.train, images.reports["real"])
    ]
    assert not paths[0] & paths[1] and paths[0] | paths[1] == set(
        (root / "real").resolve().glob("*/*")
    )
    assert len(paths[1]) == len(paths[0] | paths[1]) // 5
    assert np.bincount(images.reports["real"].labels).min() >= 2
    assert_holds(
        images.reports["clipart"],
        root / "clipart",
        {name: label for label, name in enumerate(CLASSES)},
    )
    selected = layouts.read_folder(root, "real", ("sketch",), "val")
    assert list(selected.reports) == ["real", "sketch"]
    held_out = {file.path for file in selected.selection.images}
    assert (
        held_out
        and held_out < paths[0]
        and not held_out & {file.path for file in selected.train.images}
    )
    with raises("has no painting/CLASS .*or DOMAIN/CLASS/IMAGE and --reference DOMAIN"):
        layouts.read_folder(root, "painting", (), "test")


def test_names_of_classes_from_a_file(zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text(
        "zebra striped horse\nice_cream gelato\n犬 dog\nÉléphant\u0020 x\nn1 no class of the data\n"
    )
    sources = Sources(data="folder", reference="val", shifts=("sketch",), class_names=path)
    with raises(r"names.txt has no line for Éléphant d'Asie: add them"):
        layouts.read(sources, Places(zoo))
    for folder in (zoo / split for split in ("train", "val")):
        (folder / "Éléphant d'Asie").rename(folder / "n02504458")
    shutil.rmtree(zoo / "sketch/Éléphant d'Asie", ignore_errors=True)
    path.write_text("zebra striped horse\nice_cream  gelato\n犬 dog\nn02504458\telephant\n")
    read = layouts.read(sources, Places(zoo))
    assert (
        read.train.classes
        == read.reports["sketch"].classes
        == ("gelato", "elephant", "striped horse", "dog")
    )
    path.write_text("zebra\n")
    with raises("names.txt line 1: 'zebra' is not 'FOLDER NAME': correct the line"):
        layouts.read(sources, Places(zoo))


def test_what_is_left_out_is_told(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (zoo / "train/zebra/photo.heic").write_bytes(b"")
    (zoo / "train/zebra/more").mkdir()
    layouts.read_folder(zoo, "val", (), "test")
    expected = "left out 2 files or folders in class folders, which are not read: zebra/more, zebra/photo.heic"
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "jp2", "JPG"])
def test_suffixes_of_images(suffix: str, zoo: Path) -> None:
    before = len(layouts.read_folder(zoo, "val", (), "test").train)
    smooth(24, 18).save(zoo / f"train/zebra/another.{suffix}", format="JPEG")
    images = layouts.read_folder(zoo, "val", (), "test").train
    assert len(images) == before + 1
    data.check_images([images], workers=1)


def test_composed_and_decomposed_names_are_one(zoo: Path) -> None:
    name = "Éléphant d'Asie"
    for split in ("val", "sketch", "a painting"):
        if (zoo / split / name).exists():
            (zoo / split / name).rename(zoo / split / unicodedata.normalize("NFD", name))
    images = layouts.read_folder(zoo, "val", (), "test")
    assert images.train.classes == ("ice_cream", "zebra", name, "犬")
    assert set(images.reports["val"].labels.tolist()) == {0, 1, 2, 3}


def test_a_list_may_spell_its_files_in_another_form(root: Path) -> None:
    """Letters composed on the disk and decomposed in the list, and the other way round."""
    for disk, listed in (("NFC", "NFD"), ("NFD", "NFC")):
        file = root / "real/dog" / unicodedata.normalize(disk, f"é {disk}.png")
        smooth(24, 18).save(file)
        with (root / "real_train.txt").open("a") as lines:
            lines.write(f"real/dog/{unicodedata.normalize(listed, file.name)} 1\n")
    images = layouts.read_domainnet(root, "real", (), "test").train
    data.check_images([images], workers=1)
    assert [image.path.stem[-3:] for image in images.images[-2:]] == ["NFC", "NFD"]


def test_a_test_set_that_counts_as_a_shift_is_told(
    zoo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (zoo / "sketch").rename(zoo / "test")
    layouts.read_folder(zoo, "val", (), "test")
    assert (
        "counts as a shift: if it holds images like those of train, give --reference test"
        in capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------------------------------ ImageNet


def test_archives_that_unpack_one_folder_deeper(imagenet: Path, tmp_path: Path) -> None:
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "imagenet").symlink_to(imagenet / "imagenet")
    (nested / "imagenet-sketch").mkdir()
    (nested / "imagenet-sketch/sketch").symlink_to(imagenet / "sketch")
    expected = layouts.read_imagenet(imagenet, "imagenet", ("imagenet-sketch",), "test").reports[
        "imagenet-sketch"
    ]
    found = layouts.read_imagenet(nested, "imagenet", ("imagenet-sketch",), "test").reports[
        "imagenet-sketch"
    ]
    assert found.images.names == expected.images.names


def test_openais_classes_and_prompts() -> None:
    """They are those of OpenAI's notebook."""
    notebook = json.loads(shared("data/openai/Prompt_Engineering_for_ImageNet.ipynb").read_text())
    assigned = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if source.startswith(("imagenet_classes = ", "imagenet_templates = ")):
            statement = ast.parse(source).body[0]
            assigned[statement.targets[0].id] = ast.literal_eval(statement.value)
    assert list(CLASSES_OF_IMAGENET) == assigned["imagenet_classes"]
    assert opening.read_templates("openai") == assigned["imagenet_templates"]
    # Two names stand for two classes each.
    assert (len(CLASSES_OF_IMAGENET), len(set(CLASSES_OF_IMAGENET))) == (1000, 998)


def test_imagenet_layout(imagenet: Path, planted: Path) -> None:
    images = layouts.read_imagenet(imagenet, "imagenet", (), "test")
    assert list(images.reports) == [
        "imagenet",
        "imagenet-v2",
        "imagenet-r",
        "imagenet-a",
        "imagenet-sketch",
    ]
    assert images.selection is images.reports["imagenet"]
    assert_holds(images.train, planted / "imagenet/train", BY_ID)
    assert_holds(images.selection, planted / "imagenet/val", BY_ID)
    v2 = images.reports["imagenet-v2"]
    assert_holds(
        v2,
        planted / "imagenetv2-matched-frequency-format-val",
        {str(label): label for label in range(1000)},
    )
    assert v2.labels.tolist() == [
        0,
        2,
        10,
        100,
        999,
    ]  # sorted as numbers: as strings, 10 and 100 come before 2
    for name, folder in (
        ("imagenet-r", "imagenet-r"),
        ("imagenet-a", "imagenet-a"),
        ("imagenet-sketch", "sketch"),
    ):
        assert_holds(images.reports[name], planted / folder, BY_ID)
    for split in (images.train, *images.reports.values()):
        assert split.classes == CLASSES_OF_IMAGENET
        compared = {"imagenet-r": IN_R, "imagenet-a": IN_A}.get(split.name)
        assert (
            split.compared is None
            if compared is None
            else tuple(np.flatnonzero(split.compared)) == compared
        )


def test_imagenet_selects_on_a_hundredth(imagenet: Path) -> None:
    images = layouts.read_imagenet(imagenet, "imagenet", ("imagenet-a",), "val")
    assert list(images.reports) == ["imagenet", "imagenet-a"]
    assert (len(images.train), len(images.selection), len(images.reports["imagenet"])) == (
        990,
        10,
        1000,
    )
    assert images.selection.labels.tolist() == list(range(99, 1000, 100))
    assert not {file.path for file in images.train.images} & {
        file.path for file in images.selection.images
    }


def test_splits_elsewhere(imagenet: Path, planted: Path, tmp_path: Path) -> None:
    places = (
        f"imagenet={planted}/imagenet",
        f"imagenet-r={planted}/imagenet-r",
        f"imagenet-sketch={planted}/sketch",
    )
    images = layouts.read_imagenet(None, "imagenet", (), "test", split_roots=places)
    assert list(images.reports) == ["imagenet", "imagenet-r", "imagenet-sketch"]
    assert_holds(images.reports["imagenet-r"], planted / "imagenet-r", BY_ID)
    plant(
        tmp_path / "mine", {WNIDS[4]: ["1.jpg"]}
    )  # takes precedence over the folder under the root
    own = layouts.read_imagenet(
        imagenet, "imagenet", ("imagenet-r",), "test", split_roots=(f"imagenet-r={tmp_path}/mine",)
    )
    assert own.reports["imagenet-r"].labels.tolist() == [4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "imagenet").rename(root / "in1k"),
            r"has no ImageNet \(found: imagenet-a, .*\): expected imagenet/train/WNID/IMAGE, imagenet/val/WNID.*sketch",
        ),
        (
            lambda root: (root / "imagenet/val").unlink(),
            r"ImageNet's folder .*/imagenet has no train or no val \(found: train\): expected train/WNID/IMAGE and val",
        ),
        (
            lambda root: ((root / "imagenet/val").unlink(), (root / "imagenet/val").mkdir()),
            r"imagenet/val has no class folder \(found: nothing\): expected WNID/IMAGE",
        ),
        (
            lambda root: ((root / "imagenet-r").unlink(), (root / "imagenet-r").mkdir()),
            r"split imagenet-r: .*/imagenet-r has no class folder \(found: nothing\): expected WNID/IMAGE",
        ),
        (
            lambda root: (
                (root / "imagenet-r").unlink(),
                plant(root, {"imagenet-r/n00000001": ["1.jpg"]}),
            ),
            "imagenet-r/n00000001 is no class of ImageNet: rename or delete it, or leave imagenet-r out of --shifts",
        ),
        (
            lambda root: (
                (root / "imagenet/train").unlink(),
                plant(root, {f"imagenet/train/{WNIDS[1]}": ["1.jpg"]}),
            ),
            "imagenet/train has 1 class folders, ImageNet 1000 classes: restore the others, or give --data folder",
        ),
        (
            lambda root: (
                (root / "imagenet/train").unlink(),
                plant(root, {"imagenet/train/dog": ["1.jpg"]}),
            ),
            "imagenet/train/dog is no WordNet id such as n01440764: rename or delete it",
        ),
    ],
)
def test_wrong_roots_of_imagenet(
    change: Callable[[Path], object], message: str, imagenet: Path
) -> None:
    change(imagenet)
    with raises(message):
        layouts.read_imagenet(imagenet, "imagenet", (), "test")


@pytest.mark.parametrize(
    ("reference", "shifts", "split_roots", "message"),
    [
        ("imagenet-r", (), (), "--reference imagenet-r has no training images: give imagenet"),
        ("imagenet", ("imagenet-v3",), (), "unknown split 'imagenet-v3': did you mean imagenet-v2"),
        (
            "imagenet",
            ("imagenet-a",),
            (),
            r"has no imagenet-a \(found: .*\): expected one, or --split-roots imagenet-a=",
        ),
        ("imagenet", (), ("imagenet-q=.",), "unknown split of --split-roots 'imagenet-q'"),
        (
            "imagenet",
            (),
            ("imagenet-a=no/folder",),
            "--split-roots imagenet-a=no/folder: no such folder: give NAME=FOLD",
        ),
        (
            "imagenet",
            (),
            ("imagenet-a",),
            "--split-roots imagenet-a=: no such folder: give NAME=FOLDER",
        ),
    ],
)
def test_wrong_splits_of_imagenet(
    reference: str,
    shifts: tuple[str, ...],
    split_roots: tuple[str, ...],
    message: str,
    imagenet: Path,
) -> None:
    (imagenet / "imagenet-a").unlink()
    with raises(message):
        layouts.read_imagenet(imagenet, reference, shifts, "test", split_roots=split_roots)
    with raises(
        "--data-root is needed with --data imagenet: the folder that holds imagenet/train/WNID/IMAGE"
    ):
        layouts.read_imagenet(None, "imagenet", (), "test")


def test_classes_that_a_shift_lacks_are_not_compared(imagenet: Path) -> None:
    """The softmax is over the logits of R's classes only."""
    split = layouts.read_imagenet(imagenet, "imagenet", ("imagenet-r",), "test").reports[
        "imagenet-r"
    ]
    vision = seeded_model("tiny").vision
    random, tau = np.random.default_rng(0), jnp.float32(30)
    head = random.normal(size=(40, 1000)).astype(np.float32)
    classifier = lipsum.Classifier(vision, jnp.asarray(head))
    found = evaluation.predict([classifier], tau, split, 8, 1, devices.device_mesh(8))
    logits = 30 * (found.features.astype(np.float64) @ head[:, IN_R])
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    columns = np.searchsorted(IN_R, split.labels)
    assert columns.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    label_log_probability = np.log(probabilities[np.arange(9), columns])
    np.testing.assert_allclose(
        found.label_log_probability, label_log_probability, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(found.confidence, probabilities.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found.correct, probabilities.argmax(axis=1) == columns)
    everywhere = (found.features @ head).argmax(axis=1)
    assert not np.isin(everywhere, IN_R).any()  # if all classes are compared, another one wins


# ----------------------------------------------------------------------------------------------------------- any bytes


def check_any_bytes(examples: int, path: Path, root: Path, read: Callable[[], data.Data]) -> None:
    """Any file content gives splits with valid labels or an InputError."""

    def check(content: bytes) -> None:
        path.write_bytes(content)
        images = read_unless_refused(read, root)
        for split in (images.train, images.selection, *images.reports.values()) if images else ():
            assert len(split) == len(split.images) > 0
            assert split.labels.min() >= 0 and split.labels.max() < len(split.classes)

    with_mutations(examples, path.read_bytes(), check)


@EXAMPLES
@pytest.mark.parametrize("name", ["real_train.txt", "sketch_test.txt"])
def test_any_bytes_in_a_list(name: str, examples: int, root: Path) -> None:
    check_any_bytes(
        examples, root / name, root, lambda: layouts.read_domainnet(root, "real", (), "val")
    )


@EXAMPLES
@pytest.mark.parametrize(
    "name", ["images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"]
)
def test_any_bytes_in_the_files_of_cub(name: str, examples: int, cub: Path) -> None:
    check_any_bytes(examples, cub / name, cub, lambda: layouts.read_cub(cub, "cub", (), "test"))
