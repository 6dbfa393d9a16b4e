"""The readers of data sets, on trees of small image files, against a brute-force reading."""

import ast
import json
import os
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
from support.layouts.imagenet import OPENAI_CLASSES
from support.run import setup as opening

CLASSES = ("The_Eiffel_Tower", "dog", "ice_cream")
CLASSES_OF_IMAGENET = tuple(OPENAI_CLASSES.read_text().splitlines())
FIXTURES = {"domainnet": "root", "folder": "zoo"}
REFERENCES = {"domainnet": "real", "cub": "cub", "folder": "val", "imagenet": "imagenet"}


def read(data_set: str, root: Path, shifts: tuple[str, ...] = (), **changes: object) -> data.Data:
    """The data of a run on the layout's own reference, unless `changes` has another."""
    arguments = {"reference": REFERENCES[data_set], "select_on": "test"} | changes
    return layouts.read(data_set, root, shifts=shifts, **arguments)


def edit(path: Path, old: str, new: str) -> None:
    """Replaces the first `old` in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def assert_holds(split: data.Split, root: Path, label_per_folder: Mapping[str, int]) -> None:
    """The split has the files on disk: folders by label, and files by name."""
    expected = [
        (root / folder / name, label_per_folder[folder])
        for folder in sorted(label_per_folder, key=label_per_folder.__getitem__)
        if (root / folder).is_dir()
        for name in sorted(os.listdir(root / folder))
    ]
    paths = [file.path for file in split.images]
    assert list(zip(paths, split.labels.tolist(), strict=True)) == expected != []
    data.check_images([split], workers=1)


def shell(root: Path, commands: str) -> None:
    """Changes a tree of files."""
    subprocess.run(commands, shell=True, cwd=root, check=True)


# ------------------------------------------------------------------------------ DomainNet's lists


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """DomainNet's layout: lists of `real`, and test lists of `clipart` and `sketch`."""
    sizes = {"real_train": 12, "real_test": 2, "clipart_test": 2, "sketch_test": 1}
    for name, images in sizes.items():
        domain = name.split("_")[0]
        suffix = "png" if domain == "sketch" else "jpg"
        lines = []
        for label, folder in enumerate(CLASSES):
            (tmp_path / domain / folder).mkdir(parents=True, exist_ok=True)
            for index in range(images):
                path = f"{domain}/{folder}/{name}_{index:06}.{suffix}"
                smooth(24, 18, seed=label * 100 + index).save(tmp_path / path)
                lines.append(f"{path} {label}\n")
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    return tmp_path


def test_domainnet_layout(root: Path) -> None:
    images = read("domainnet", root, keep_underscores=True)
    assert list(images.reports) == ["real", "clipart", "sketch"]
    assert images.selection is not images.train
    splits = [images.train, *images.reports.values()]
    assert [len(split) for split in splits] == [36, 6, 6, 3]
    assert all(split.classes == CLASSES for split in [*splits, images.selection])
    assert images.selection.images == images.reports["real"].images
    assert images.train.labels.tolist() == [0] * 12 + [1] * 12 + [2] * 12
    place = f"list {root / 'sketch_test.txt'} line 2"
    path = root / "sketch/dog/sketch_test_000000.png"
    assert images.reports["sketch"].images[1] == (path, place)
    data.check_images(splits, workers=2)
    assert read("domainnet", root).selection.classes == ("The Eiffel Tower", "dog", "ice cream")


def test_selection_data_of_domainnet(root: Path) -> None:
    """A tenth of the training images; the validation list, if there is one."""
    whole = read("domainnet", root).train
    held_out = read("domainnet", root, select_on="val")
    assert (len(held_out.train), held_out.selection.labels.tolist()) == (33, [0, 1, 2])
    assert sorted(held_out.train.images + held_out.selection.images) == sorted(whole.images)
    shutil.copy(root / "real_test.txt", root / "real_val.txt")
    listed = read("domainnet", root, select_on="val")
    assert (len(listed.train), listed.selection.name, len(listed.selection)) == (36, "val", 6)


def test_default_shifts_of_domainnet(root: Path) -> None:
    """All domains except Quickdraw, which can be named, and can be the reference."""
    for name in ("train", "test"):
        shutil.copy(root / f"real_{name}.txt", root / f"quickdraw_{name}.txt")
    assert list(read("domainnet", root).reports) == ["real", "clipart", "sketch"]
    assert list(read("domainnet", root, ("quickdraw",)).reports) == ["real", "quickdraw"]
    reports = read("domainnet", root, reference="quickdraw").reports
    assert list(reports) == ["quickdraw", "clipart", "real", "sketch"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sketch/The", "\ufeffsketch/The"),  # as Notepad marks a file
        ("0\n", "0\r\n"),
        (" ", " \t "),
        ("2\n", "2"),
        ("2\n", "2\n \n\n"),
        ("sketch/dog", "clipart/../sketch/dog"),  # the class is still the last folder
        ("sketch/dog", "ROOT/sketch/dog"),
    ],
)
def test_forms_of_lines(old: str, new: str, root: Path) -> None:
    edit(root / "sketch_test.txt", old, new.replace("ROOT", str(root)))
    sketch = read("domainnet", root, ("sketch",)).reports["sketch"]
    assert sketch.labels.tolist() == [0, 1, 2]
    data.check_images([sketch], 1)


@pytest.mark.parametrize(
    ("on_disk", "listed"),
    [
        *[(name, name) for name in ("a 3.png", "æøå 犬 🐕.png", "a\u2028b\x85c.png", "\u212b.png")],
        ("\xe9.png", "e\u0301.png"),  # the same letter, composed and decomposed
        ("e\u0301.png", "\xe9.png"),
    ],
)
def test_names_of_files(on_disk: str, listed: str, root: Path) -> None:
    dog = root / "sketch/dog"
    (dog / "sketch_test_000000.png").rename(dog / on_disk)
    edit(root / "sketch_test.txt", "dog/sketch_test_000000.png", f"dog/{listed}")
    sketch = read("domainnet", root, ("sketch",)).reports["sketch"]
    assert sketch.images[1].path.name == on_disk
    data.check_images([sketch], 1)


def test_a_test_list_may_lack_a_class(root: Path) -> None:
    """As DomainNet's own painting_test.txt does."""
    edit(root / "sketch_test.txt", "sketch/dog/sketch_test_000000.png 1\n", "")
    sketch = read("domainnet", root).reports["sketch"]
    assert sketch.labels.tolist() == [0, 2] and len(sketch.classes) == 3


MALFORMED = "13: .* is not 'DOMAIN/CLASS/FILE LABEL': correct the line"
DOG = "real/dog/real_train_000000.jpg 1"
THIRD_DOG = "dog/real_train_000003.jpg 1"
EIFFEL = "real/The_Eiffel_Tower/real_train_000000.jpg"


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        *[("real_train", DOG, f"real/dog/1.jpg{end}", MALFORMED) for end in ("", " one", " -1")],
        *[("real_train", DOG, f"real/dog/1.jpg {end}", MALFORMED) for end in ("\u0661", "1" * 999)],
        *[("real_train", DOG, line, MALFORMED) for line in ("1.jpg 1", "real/dog/ 1", "1", "")],
        ("real_train", THIRD_DOG, f"{DOG[5:]}", "16: .* line 13 has real/dog.* already: delete"),
        ("real_train", THIRD_DOG, "dog/1.jpg 2", "16: .* line 13 gives folder 'dog' label 1: "),
        ("real_train", EIFFEL, "real/tower/1.jpg", "2: .* line 1 gives folder 'tower' label 0: "),
        ("clipart_test", "clipart/dog/", "clipart/wolf/", "3: folder 'wolf' is no class of the"),
        ("sketch_test", "sketch/ice", "sketch/wolf/1 3\nsketch/ice", "3: folder 'wolf' is no cl"),
        ("sketch_test", ".png 1", ".png 2", "2: .* the training list gives folder 'dog' label 1: "),
    ],
)
def test_refused_lines(name: str, old: str, new: str, message: str, root: Path) -> None:
    edit(root / f"{name}.txt", old, new)
    with raises(f"list .*{name}.txt line .*{message}"):
        read("domainnet", root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: '' is not 'DOMAIN/CLASS/FILE LABEL': correct the line"),
        (b"a/dog/1 0\na/cat/2 2\n", "has no label 1: number the classes from 0 without gaps"),
        (b"a/dog/1 1\n", "has no label 0: number the classes from 0 without gaps"),
        (b"a/dog/\xff.jpg 0\n", "cannot be read .*: restore it as UTF-8 text"),
    ],
)
def test_refused_training_lists(content: bytes, message: str, root: Path) -> None:
    (root / "real_train.txt").write_bytes(content)
    with raises(f"list .*real_train.txt {message}"):
        read("domainnet", root)


def test_an_image_that_is_not_there(root: Path) -> None:
    shell(root, "rm sketch/dog/sketch_test_000000.png")
    sketch = read("domainnet", root, ("sketch",)).reports["sketch"]
    message = "sketch_test.txt line 2: .*0.png does not exist: restore it or delete the line"
    with raises(message):
        data.check_images([sketch], workers=2)
    assert_batches_raise(sketch, message)


# ----------------------------------------------------------------------------------- CUB-200-2011


def test_cub_layout(cub: Path) -> None:
    """Every image, with the label that its folder specifies and the part that the lines specify."""
    lines = (cub / "train_test_split.txt").read_text().splitlines()
    part_per_image = dict(line.split() for line in lines)
    images = read("cub", cub)
    assert list(images.reports) == ["cub"]
    names = ("Black footed Albatross", "Laysan Albatross", "Chuck will Widow")
    assert images.train.classes == names
    for split, part in ((images.train, "1"), (images.reports["cub"], "0")):
        expected = {
            (path, int(path.parent.name[:3]) - 1)
            for path in cub.glob("images/*/*.jpg")
            if part_per_image[str(int(path.stem[-4:]))] == part
        }
        paths = [file.path for file in split.images]
        assert len(split) == len(expected) == (12 if part == "1" else 6)
        assert set(zip(paths, split.labels.tolist(), strict=True)) == expected
    assert images.selection.images == images.reports["cub"].images
    data.check_images([images.train, images.selection], workers=1)
    held_out = read("cub", cub, select_on="val")
    assert (len(held_out.train), len(held_out.selection)) == (11, 1)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("images", "1 001.B", "001.B", "images.txt line 1: .* is not 'ID FOLDER/FILE': correct"),
        ("images", "8 001.B", "1 001.B", "line 2: .*images.txt line 1 has 1 already: delete one"),
        ("images", "8 001.B", "01 001.B", "line 2: .*images.txt line 1 has 1 already: delete one"),
        ("images", "8 0", "99 0", "only one of .*class_labels.txt has id 8: .* has id 99: correct"),
        ("images", "bird_0008", "bird_0001", "line 2: .*images.txt line 1 has 001.*1.jpg already"),
        ("image_class_labels", "8 1\n", "", "only one of .* and .*class_labels.txt has id 8: corr"),
        ("image_class_labels", "8 1", "8 4", "labels.txt line 2: 4 is no class of .*classes.txt"),
        ("image_class_labels", "8 1", "8 one", "line 2: '8 one' is not 'ID CLASS_ID': correct the"),
        ("train_test_split", "8 1\n", "8 1\n19 1\n", "only one of .* and .*split.txt has id 19: c"),
        ("train_test_split", "8 1", "8 2", "split.txt line 2: '8 2' is not 'ID 1 .* or ID 0 .*'"),
        ("classes", "2 002.L", "4 002.L", "labels.txt line .: 2 is no class of .*classes.txt"),
        ("classes", "2 002.L", "\n2 002.L", "classes.txt line 2: '' is not 'ID NAME': correct"),
    ],
)
def test_refused_lines_of_cub(name: str, old: str, new: str, message: str, cub: Path) -> None:
    edit(cub / f"{name}.txt", old, new)
    with raises(message):
        read("cub", cub)


# ---------------------------------------------------------------------------------- class folders


def test_folder_layout(zoo: Path) -> None:
    for name in ("notes.txt", ".hidden.jpg"):  # they are not images
        assert f"train/zebra/{name}" not in read("folder", zoo).train.images.names
        (zoo / "train/zebra" / name).unlink()
    images = read("folder", zoo, keep_underscores=True)
    assert list(images.reports) == ["val", "a painting", "sketch"]
    for split in (images.train, *images.reports.values()):
        assert split.classes == ("ice_cream", "zebra", "Éléphant d'Asie", "犬")
        assert split.compared is None
        assert_holds(split, zoo / split.name, ZOO)
    assert images.reports["sketch"].labels.tolist() == [0, 0, 1, 1, 3, 3]
    assert images.selection.images is images.reports["val"].images


@pytest.mark.parametrize(
    ("change", "reference", "shifts", "trained", "selected", "reports"),
    [
        ("", "val", (), 44, ("val", 4), {"val": 8, "a painting": 12, "sketch": 6}),
        ("", "val", ("sketch",), 44, ("val", 4), {"val": 8, "sketch": 6}),
        ("", "sketch", (), 48, ("val", 8), {"sketch": 6, "a painting": 12}),
        ("", "sketch", ("val",), 48, ("val", 8), {"sketch": 6, "val": 8}),
        ("rm -r val", "val", ("sketch",), 40, ("val", 4), {"val": 4, "sketch": 6}),
        ("rm -r val", "sketch", (), 44, ("val", 4), {"sketch": 6, "a painting": 12}),
        ("rm -r train", "a painting", (), 10, ("val", 8), {"a painting": 2, "sketch": 6}),
        ("rm -r train val", "a painting", (), 9, ("val", 1), {"a painting": 2, "sketch": 6}),
    ],
)
def test_splits_of_folder(
    change: str,
    reference: str,
    shifts: tuple[str, ...],
    trained: int,
    selected: tuple[str, int],
    reports: dict[str, int],
    zoo: Path,
) -> None:
    """Numbers of images. Training, selection and the reference's report are disjoint.

    Without train/, a fifth of the reference's images is reported. Without val/, a tenth of the
    training images is, and another one is selected on.
    """
    shell(zoo, change)
    images = read("folder", zoo, shifts, reference=reference, select_on="val")
    assert {name: len(split) for name, split in images.reports.items()} == reports
    assert (images.train.name, len(images.train)) == ("train", trained)
    assert (images.selection.name, len(images.selection)) == selected
    parts = [images.train, images.selection, images.reports[reference]]
    paths = [file.path for part in parts for file in part.images]
    assert len(set(paths)) == len(paths)
    for part in (*parts, *images.reports.values()):
        folders = [file.path.parent.name.replace("_", " ") for file in part.images]
        assert folders == [images.train.classes[label] for label in part.labels]


def test_links_to_folders_and_images(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    linked = tmp_path_factory.mktemp("linked")
    shell(linked, f"mkdir train; ln -s {zoo}/val/* train; ln -s {zoo}/sketch .; ln -s no nowhere")
    shell(linked, f"cd train/zebra; ln -s {zoo}/train/zebra/2.jpg .; rm 1.jpg")
    images = read("folder", linked, reference="sketch")
    assert_holds(images.train, linked / "train", ZOO)
    assert images.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert_holds(images.reports["sketch"], linked / "sketch", ZOO)
    shell(linked, "ln -s no.jpg train/zebra/3.jpg")
    with raises("^.*/train/zebra/3.jpg does not exist: restore it or leave it out$"):
        data.check_images([read("folder", linked, reference="sketch").train], workers=1)


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "avif", "jp2", "JPG"])
def test_suffixes_of_images(suffix: str, zoo: Path) -> None:
    smooth(24, 18).save(zoo / f"train/zebra/another.{suffix}", format="JPEG")
    images = read("folder", zoo).train
    assert len(images) == 49
    data.check_images([images], workers=1)


def test_composed_and_decomposed_names_are_one(zoo: Path) -> None:
    name = "Éléphant d'Asie"
    for split in ("val", "a painting"):
        (zoo / split / name).rename(zoo / split / unicodedata.normalize("NFD", name))
    reports = read("folder", zoo).reports
    assert set(reports["val"].labels.tolist()) == set(reports["a painting"].labels) == {0, 1, 2, 3}


READ = "which are not read"
# By data set: a change of its folder, options, and the warnings, without the root.
WARNED = {
    "folder": [
        ("", {}, []),
        ("touch .DS_Store notes.md train/LICENSE val/Thumbs.db; mkdir .idea", {}, []),
        (
            "cd train/zebra; mkdir more; touch photo.heic more.csv .more.heic",
            *({}, [f"/train: left out 2 files or folders, {READ}: zebra/more, zebra/photo.heic"]),
        ),
        ("touch val/1.jpg", {}, [f"/val: left out 1 files or folders, {READ}: 1.jpg"]),
        (
            "mkdir art docs; touch art/1.jpg sketch.zip",
            *({}, [f": left out 3 files or folders, {READ}: art, docs, sketch.zip"]),
        ),
        ("mkdir a b c d e", {}, [f": left out 5 files or folders, {READ}: a, b, c, and 2 more"]),
        ("", {"reference": "sketch"}, [f": left out 1 files or folders, {READ}: val"]),
        ("", {"reference": "sketch", "select_on": "val"}, []),
        ("", {"reference": "sketch", "shifts": ("a painting",)}, []),
        (
            "mv train old; mkdir train; touch train/1.jpg",
            *({"reference": "old"}, [f": left out 2 files or folders, {READ}: train, val"]),
        ),
        (
            "mv sketch test",
            *({}, ["/test counts as a shift: if it holds images like those of train, give"]),
        ),
    ],
    "domainnet": [
        ("", {}, []),
        ("", {"shifts": ("sketch",)}, []),
        ("touch README.txt .x; cp sketch_test.txt quickdraw_test.txt", {}, []),
        (
            "rm sketch_test.txt; touch clipart.zip",
            {},
            [f": left out 2 files or folders, {READ}: clipart.zip, sketch (no sketch_test.txt)"],
        ),
    ],
    "imagenet": [
        ("", {}, []),
        ("", {"shifts": ("imagenet-a",)}, []),
        (
            "mv imagenet-r imagenet_r; touch LOC_synset_mapping.txt",
            *({}, [f": left out 1 files or folders, {READ}: imagenet_r"]),
        ),
        (
            "ln -s sketch imagenet-sketch",
            *({}, [f": left out 1 files or folders, {READ}: sketch"]),
        ),
        ("", {"split_roots": ("imagenet-r=imagenet-a",)}, [": left out 1 .*: imagenet-r"]),
    ],
    "cub": [("touch attributes.txt", {}, [])],
}


@pytest.mark.parametrize(
    ("data_set", "change", "options", "warnings"),
    [(data_set, *row) for data_set, rows in WARNED.items() for row in rows],
)
def test_warned(
    data_set: str,
    change: str,
    options: dict[str, Any],
    warnings: list[str],
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a folder contains is used, or named: once, whatever reads it again."""
    root = request.getfixturevalue(FIXTURES.get(data_set, data_set))
    shell(root, change)
    if roots := options.get("split_roots"):
        options = options | {"split_roots": tuple(r.replace("=", f"={root}/") for r in roots)}
    for _ in range(2):
        read(data_set, root, **options)
    found = capsys.readouterr().err.splitlines()
    assert len(found) == len(warnings), found
    for line, warning in zip(found, warnings, strict=True):
        expected = warning if ".*" in warning else re.escape(warning)
        assert re.match(re.escape(f"warning: {root}") + expected, line), line


# --------------------------------------------------------------------------------------- ImageNet


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


def test_imagenet_layout(imagenet: Path) -> None:
    images = read("imagenet", imagenet, keep_underscores=True)
    assert_holds(images.train, imagenet / "imagenet/train", BY_ID)
    by_number = {str(label): label for label in range(1000)}
    expected = {
        "imagenet": ("imagenet/val", BY_ID, None),
        "imagenet-v2": ("imagenetv2-matched-frequency-format-val", by_number, None),
        "imagenet-r": ("imagenet-r", BY_ID, IN_R),
        "imagenet-a": ("imagenet-a", BY_ID, IN_A),
        "imagenet-sketch": ("sketch", BY_ID, None),
    }
    assert list(images.reports) == list(expected)
    for split, (folder, labels, compared) in zip(
        images.reports.values(), expected.values(), strict=True
    ):
        assert_holds(split, imagenet / folder, labels)
        assert split.classes == CLASSES_OF_IMAGENET
        assert (split.compared is None) == (compared is None)
        assert compared is None or tuple(np.flatnonzero(split.compared)) == compared
    # Folders are sorted as numbers: as strings, 10 and 100 come before 2.
    assert images.reports["imagenet-v2"].labels.tolist() == [0, 2, 10, 100, 999]
    selected = read("imagenet", imagenet, ("imagenet-a",), select_on="val")
    assert list(selected.reports) == ["imagenet", "imagenet-a"]
    assert selected.selection.labels.tolist() == list(range(49, 1000, 50))
    paths = {file.path for file in [*selected.train.images, *selected.selection.images]}
    assert len(paths) == len(selected.train) + 20 == 2 * len(selected.reports["imagenet"]) == 2000


def test_archives_that_unpack_one_folder_deeper(imagenet: Path) -> None:
    expected = read("imagenet", imagenet).reports["imagenet-sketch"].images.names
    (imagenet / "imagenet-sketch").mkdir()
    (imagenet / "sketch").rename(imagenet / "imagenet-sketch/sketch")
    assert read("imagenet", imagenet).reports["imagenet-sketch"].images.names == expected


def test_splits_elsewhere(imagenet: Path, tmp_path: Path) -> None:
    """Without a root; and before the folder under the root."""
    folders = {"imagenet": "imagenet", "imagenet-r": "imagenet-r", "imagenet-sketch": "sketch"}
    split_roots = tuple(f"{name}={imagenet / folder}" for name, folder in folders.items())
    images = read("imagenet", None, split_roots=split_roots)
    assert list(images.reports) == ["imagenet", "imagenet-r", "imagenet-sketch"]
    assert_holds(images.reports["imagenet-r"], imagenet / "imagenet-r", BY_ID)
    plant(tmp_path / "mine", {WNIDS[4]: ["1.jpg"]})
    own = read("imagenet", imagenet, split_roots=(f"imagenet-r={tmp_path}/mine",))
    assert own.reports["imagenet-r"].labels.tolist() == [4]


def test_classes_that_a_shift_lacks_are_not_compared(imagenet: Path) -> None:
    """The softmax is over the logits of R's classes only."""
    split = read("imagenet", imagenet, ("imagenet-r",)).reports["imagenet-r"]
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


# ------------------------------------------------------------------------------- names of classes


def test_names_of_classes_from_a_file(zoo: Path, tmp_path: Path) -> None:
    """A tab or a space ends the folder; the letters of a folder may be composed in another way."""
    path = tmp_path / "names.txt"
    decomposed = unicodedata.normalize("NFD", "Éléphant d'Asie")
    path.write_text(
        f"zebra striped_horse\nice_cream  gelato\n犬 dog\n{decomposed}\telephant\nn1 x\n"
    )
    images = read("folder", zoo, class_names=path)
    expected = ("gelato", "striped horse", "elephant", "dog")
    for split in (images.train, images.selection, *images.reports.values()):
        assert split.classes == expected


@pytest.mark.parametrize("data_set", ["folder", "domainnet", "imagenet", "cub"])
def test_names_are_by_folder(data_set: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Of every data set, whatever its classes are called without a file."""
    root = request.getfixturevalue(FIXTURES.get(data_set, data_set))
    folders = {"folder": tuple(ZOO), "domainnet": CLASSES, "imagenet": tuple(WNIDS)}
    birds = ("001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Chuck_will_Widow")
    folders = folders.get(data_set, birds)
    path = tmp_path / "names"
    lines = [f"{folder}\tname of {folder[-3:]}\n" for folder in reversed(folders)]
    path.write_text("".join(lines))
    images = read(data_set, root, class_names=path, keep_underscores=True)
    expected = tuple(f"name of {folder[-3:]}" for folder in folders)
    for split in (images.train, images.selection, *images.reports.values()):
        assert split.classes == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zebra", "names.txt line 1: 'zebra' is not 'FOLDER NAME': correct the line"),
        ("zebra a\nzebra b", "names.txt line 2: .*names.txt line 1 has zebra already: delete one"),
        ("zebra a\n犬 b", "names.txt has no line for ice_cream, Éléphant d'Asie: add them"),
    ],
)
def test_refused_names_of_classes(text: str, message: str, zoo: Path, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text(text)
    with raises(f"--class-names .*{message}"):
        read("folder", zoo, class_names=path)


# --------------------------------------------------------------------- wrong roots, splits, folders

EMPTY_TRAIN = "rm imagenet/train; mkdir -p imagenet/train"

# By data set: a change of its folder, options, and the message.
REFUSED = {
    "domainnet": [
        ("", {"root": None}, "--data-root is needed .* the folder that holds DOMAIN/CLASS/FILE"),
        ("", {"root": "real"}, r"real has no DOMAIN_test.txt \(found: The_.*, dog, ice_cream\): "),
        ("mkdir a", {"root": "a"}, r"a has no DOMAIN_test.txt \(found: nothing\): expected DOMAIN"),
        ("", {"root": "no"}, r"no DOMAIN_test.txt \(found: no such folder\): expected DOMAIN"),
        ("", {"reference": ""}, "--reference is needed .* one of clipart, real, sketch"),
        ("", {"reference": "reel"}, "unknown split 'reel': did you mean real.* known: clipart"),
        ("", {"reference": "sketch"}, "list .*sketch_train.txt cannot be read .*: restore it"),
        ("", {"shifts": ("clip-art",)}, "unknown split 'clip-art': did you mean clipart"),
        (
            "",
            {"shifts": ("real",)},
            "'real' is the reference and a shift at once, or a shift twice",
        ),
        (
            "awk 'NR % 5 == 1' real_train.txt > few; mv few real_train.txt",
            *({"select_on": "val"}, "8 training images are too few .*: give --select-on test"),
        ),
        ("rm -r clipart", {}, "clipart_test.txt lists images of .*clipart, .* give the --shifts"),
        (
            "rm sketch_test.txt",
            {"shifts": ("sketch",)},
            "list .*sketch_test.txt cannot be read .*No",
        ),
        ("rm real_test.txt", {}, "list .*real_test.txt cannot be read .*No such file.*: restore"),
    ],
    "cub": [
        ("", {"root": None}, "--data-root is needed with --data cub: .* holds images/, images.txt"),
        ("", {"root": "images"}, r"has no images.txt \(found: 001.Bl.*\): expected images/, "),
        ("", {"shifts": ("real",)}, "unknown split 'real': .*known: cub"),
        ("sed -i.old 's/ 1$/ 0/' train_test_split.txt", {}, "has no line 'ID 1': restore it"),
    ],
    "folder": [
        ("", {"root": None}, "--data-root is needed .* the folder that holds train/CLASS/IMAGE"),
        ("", {"root": "no"}, "folder .*/no cannot be listed .*No such file.*: restore it"),
        ("", {"shifts": ("sketches",)}, "unknown split 'sketches': did you mean sketch"),
        ("", {"shifts": ("sketch",) * 2}, "'sketch' is .* or a shift twice: give each shift once"),
        ("", {"split_roots": ("a=b",)}, "--split-roots is for --data imagenet: leave it out"),
        ("rm -r val", {"reference": "sketch", "shifts": ("val",)}, "/val cannot be listed"),
        ("mv train tra", {}, r"no train/CLASS \(found: a painting, sketch, tra, val\): exp"),
        ("rm -r train", {"reference": "art"}, "no art/CLASS .* and --reference DOMAIN"),
        (
            "rm -r val; mkdir val; touch val/1.jpg",
            {},
            "val has no class folder: val needs",
        ),
        ("mkdir art; touch art/1.jpg", {"shifts": ("art",)}, "art has no class folder: art needs"),
        ("mkdir val/yak", {}, r"val/yak has no image \(.jpg .*\): add some or delete it"),
        ("mkdir train/yak; cp -r val/zebra val/yak", {}, "train/yak has no image"),
        ("mv val/zebra val/yak", {}, "yak is no class of .*train: .* leave val out of --shifts"),
        ("mkdir val/a; mv val/zebra val/b", {}, "val/a has no image .*; .*b is no class of"),
    ],
    "imagenet": [
        ("", {"root": None}, "--data-root is needed .* that holds imagenet/train/WNID/IMAGE"),
        ("mv imagenet in1k", {}, r"no imagenet or ILSVRC.* \(found: .*in1k.*: expected imagenet"),
        ("rm imagenet-a", {"shifts": ("imagenet-a",)}, "or --split-roots imagenet-a=FOLDER"),
        ("rm imagenet/val", {}, "folder .*imagenet/val cannot be listed .*No such file"),
        ("cd imagenet; rm val; mkdir val", {}, "val has no class folder: imagenet needs CLASS/"),
        ("rm imagenet/train", {}, "folder .*imagenet/train cannot be listed .*No such file"),
        (f"{EMPTY_TRAIN}/n01440764", {}, "train has 1 class folders, ImageNet 1000: restore them"),
        (f"{EMPTY_TRAIN}/dog", {}, r"1 class folders \(no WordNet ids: dog\), ImageNet 1000"),
        ("rm sketch; mkdir -p sketch/n0; touch sketch/n0/1.jpg", {}, "n0 is no class of ImageNet"),
        ("", {"reference": "imagenet-r"}, "imagenet-r has no training images: give imagenet"),
        ("", {"shifts": ("imagenet-v3",)}, "unknown split 'imagenet-v3': did you mean"),
        ("", {"split_roots": ("imagenet-q=.",)}, "imagenet-q=.: give NAME=FOLDER, NAME one of"),
        ("", {"split_roots": ("imagenet-a",)}, "--split-roots imagenet-a: give NAME=FOLDER"),
        ("", {"split_roots": ("imagenet-a=no",)}, "folder no cannot be listed .*No such file"),
    ],
}


@pytest.mark.parametrize(
    ("data_set", "change", "options", "message"),
    [(data_set, *row) for data_set, rows in REFUSED.items() for row in rows],
)
def test_refused(
    data_set: str,
    change: str,
    options: dict[str, object],
    message: str,
    request: pytest.FixtureRequest,
) -> None:
    root = request.getfixturevalue(FIXTURES.get(data_set, data_set))
    shell(root, change)
    options = {"root": "."} | options
    if options["root"]:
        options["root"] = root / options["root"]
    with raises(message):
        read(data_set, **options)


# -------------------------------------------------------------------------------------- any bytes


@EXAMPLES
@pytest.mark.parametrize(
    ("data_set", "name"),
    [
        *(("domainnet", name) for name in ("real_train.txt", "sketch_test.txt")),
        *(("cub", name) for name in ("images.txt", "image_class_labels.txt")),
        *(("cub", name) for name in ("train_test_split.txt", "classes.txt")),
    ],
)
def test_any_bytes(data_set: str, name: str, examples: int, request: pytest.FixtureRequest) -> None:
    """Any file content gives splits with valid labels or an InputError."""
    root = request.getfixturevalue("root" if data_set == "domainnet" else data_set)
    select_on = "val" if data_set == "domainnet" else "test"

    def check(content: bytes) -> None:
        (root / name).write_bytes(content)
        images = read_unless_refused(lambda: read(data_set, root, select_on=select_on), root)
        for split in (images.train, images.selection, *images.reports.values()) if images else ():
            assert len(split) == len(split.images) > 0
            assert split.labels.min() >= 0 and split.labels.max() < len(split.classes)

    with_mutations(examples, (root / name).read_bytes(), check)
