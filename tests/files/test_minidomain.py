"""Tests of the embedded benchmark: images, cache and export."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import raises
from PIL import Image

from support.layouts import minidomain
from support.layouts.minidomain import CLASSES, COLOURS, DOMAINS, draw, load_domain
from tools import export_minidomain

MODULE = Path(minidomain.__file__)
SMALL = {"train": 40, "val": 20, "test": 20}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder and a small benchmark."""
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(minidomain, "SIZES", SMALL)
    return tmp_path / "cache" / "minidomain"


def start(*arguments: object) -> subprocess.Popen:
    """Starts Python with the project's modules on its path and warnings as errors."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(MODULE.parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def digest(image: np.ndarray) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


# ---------------------------------------------------------------------------------------- drawing


def test_an_image_depends_only_on_its_arguments() -> None:
    wanted = [("test", domain, index, 3) for domain in DOMAINS for index in (0, 7, 2**33)]
    first = [draw(*arguments) for arguments in wanted]
    again = [draw(*arguments) for arguments in reversed(wanted)][::-1]
    for (one, attributes), (other, other_attributes) in zip(first, again, strict=True):
        assert digest(one) == digest(other) and attributes == other_attributes
    code = "import hashlib\nfrom support.layouts import minidomain\n"
    code += f"for a in {wanted}: print(hashlib.sha256(minidomain.draw(*a)[0]).hexdigest())"
    process = start("-c", code)
    output, errors = process.communicate(timeout=60)
    assert (output.split(), errors) == ([digest(image) for image, _ in first], "")


def test_no_image_is_in_two_splits() -> None:
    images = [
        digest(draw(split, domain, index, seed)[0])
        for split in minidomain.SIZES
        for domain in DOMAINS
        for index in range(40)
        for seed in (0, 1)
    ]
    assert len(set(images)) == len(images)


def test_streams_never_coincide() -> None:
    states = {
        str(minidomain.stream(name, domain, index, seed).bit_generator.state["state"])
        for name in minidomain.STREAMS
        for domain in DOMAINS
        for index in (0, 1, 2**32, 2**32 + 1)
        for seed in (0, 1, 2**32)
    }
    assert len(states) == len(minidomain.STREAMS) * len(DOMAINS) * 4 * 3


def test_classes_are_balanced() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 20
    assert all(size % len(CLASSES) == 0 for size in minidomain.SIZES.values())
    labels = Counter(draw("val", "clipart", index)[1].label for index in range(100))
    assert labels == {label: 5 for label in range(20)}


def test_attributes_match_the_image() -> None:
    spots: dict[str, list] = {}
    areas: dict[str, list] = {}
    for index in range(400):
        image, attributes = draw("test", "clipart", index)
        paper = np.median(image[[0, 0, -1, -1], [0, -1, 0, -1]], axis=0)
        assert (attributes.background == "white") == (paper.min() == 255)
        if CLASSES[attributes.label] != "tree":  # no part of a conifer has the plain colour
            assert np.abs(image - np.array(COLOURS[attributes.colour])).max(axis=2).min() <= 1
        rows, columns = np.nonzero(np.abs(image - paper).max(axis=2) > 30)
        spots.setdefault(attributes.position, []).append((columns.mean(), rows.mean()))
        areas.setdefault(attributes.size, []).append(len(rows))
    centre = np.mean(spots["center"], axis=0)
    for position, (x, y) in minidomain.POSITIONS.items():
        moved = np.mean(spots[position], axis=0) - centre
        assert np.abs(moved[[x == 0, y == 0]]).max(initial=0) < 1.5
        assert moved @ (x, y) > 2 or position == "center"
    assert np.mean(areas["small"]) < np.mean(areas["medium"]) < np.mean(areas["large"])


def test_shapes_fit_in_their_square() -> None:
    rng = np.random.default_rng(0)
    for name, shape in minidomain.SHAPES.items():
        for _ in range(20):
            points = np.concatenate([part.outline for part in shape(rng)])
            assert np.isfinite(points).all() and np.abs(points).max() < 1.2, name
            assert np.ptp(points, axis=0).max() > 1.4, name


def test_templates_contain_the_class() -> None:
    texts = {template.format("star") for template in minidomain.TEMPLATES}
    assert len(texts) == 8 and all("star" in text and "{" not in text for text in texts)


# ------------------------------------------------------------------------------------------ cache


def test_load_returns_the_images_of_draw(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It draws them once, and says so in one line."""
    for told in (1, 0):
        images, labels = load_domain("painting", "val")
        assert (images.shape, images.dtype, labels.dtype) == ((20, 36, 36, 3), np.uint8, np.int32)
        drawn = [draw("val", "painting", index)[0] for index in range(20)]
        assert np.array_equal(images, np.stack(drawn)) and labels.tolist() == list(range(20))
        assert capsys.readouterr().err.count("minidomain: drawing painting-val-20") == told
        monkeypatch.setattr(minidomain, "write_whole", None)  # a cache that is read needs no more
    (file,) = cache.iterdir()
    assert file.name.startswith("painting-val-20-") and minidomain.FINGERPRINT in file.name


def halve(content: bytearray) -> None:
    del content[len(content) // 2 :]


def flip(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def shorten(content: bytearray) -> None:
    """The header then says that there are fewer images, whose CRC is never computed."""
    place = content.index(b"(20, 36, 36, 3)")
    content[place : place + 3] = b"(10"


@pytest.mark.parametrize("damage", [bytearray.clear, halve, flip, shorten])
def test_a_damaged_cache_is_drawn_again(
    damage: object, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = load_domain("clipart", "test")
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    damage(content)
    file.write_bytes(content)
    capsys.readouterr()
    again, labels_again = load_domain("clipart", "test")
    assert np.array_equal(images, again) and np.array_equal(labels, labels_again)
    told = capsys.readouterr().err
    assert told.startswith(f"minidomain: {file} cannot be read (") and told.count("\n") == 1
    assert [file] == list(cache.iterdir())
    load_domain("clipart", "test")
    assert capsys.readouterr().err == ""


def test_processes_draw_the_same_split_at_once(cache: Path) -> None:
    """None fails, and all find the same images."""
    code = "import hashlib; from support.layouts import minidomain; "
    code += f"minidomain.SIZES = {SMALL}; images, _ = minidomain.load_domain('real', 'train'); "
    code += "print(hashlib.sha256(images).hexdigest())"
    processes = [start("-c", code) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [digest(load_domain("real", "train")[0])] * 3
    assert [file.suffix for file in cache.iterdir()] == [".npz"]


def test_a_failed_write_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with raises("clipart-val.* cannot be used .*No space left.*: set LIPSUM_CACHE to a writable"):
        load_domain("clipart", "val")
    assert list(cache.iterdir()) == []


def test_an_unusable_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "file"))
    with raises("Not a directory.*: set LIPSUM_CACHE to a writable folder"):
        load_domain("clipart", "val")


def test_changed_code_draws_new_images(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, _ = load_domain("clipart", "val")
    source = MODULE.read_text()
    assert '"red": (205, 45, 45)' in source
    changed = tmp_path / "changed.py"
    changed.write_text(source.replace('"red": (205, 45, 45)', '"red": (250, 0, 0)'))
    spec = importlib.util.spec_from_file_location("changed", changed)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SIZES", SMALL)
    capsys.readouterr()
    after, _ = module.load_domain("clipart", "val")
    assert "drawing" in capsys.readouterr().err
    assert not np.array_equal(before, after)
    assert len(list(cache.iterdir())) == 2


# ----------------------------------------------------------------------------------------- export


def test_an_export_contains_the_loaded_images(cache: Path, tmp_path: Path) -> None:
    root = tmp_path / "set"
    export_minidomain.main(root)
    lists = {f"{domain}_{split}.txt" for domain in DOMAINS for split in SMALL}
    assert {path.name for path in root.iterdir()} == {*DOMAINS, *lists}
    for domain in DOMAINS:
        assert {path.name for path in (root / domain).iterdir()} == set(CLASSES)
        assert len(list((root / domain).rglob("*.png"))) == sum(SMALL.values())
        for split, size in SMALL.items():
            lines = (root / f"{domain}_{split}.txt").read_text().splitlines()
            images, labels = load_domain(domain, split)
            assert len(lines) == size
            for line, image, label in zip(lines, images, labels, strict=True):
                path, stated = line.split(" ")
                assert path.split("/")[:2] == [domain, CLASSES[label]] and int(stated) == label
                assert np.array_equal(np.asarray(Image.open(root / path)), image)


def test_export_needs_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    process = start("-m", "tools.export_minidomain", tmp_path)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, "")
    assert errors == f"error: {tmp_path} exists: give a new folder\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
