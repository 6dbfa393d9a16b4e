"""Tests of the embedded benchmark: images, captions, cache and export."""

import hashlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.errors import InputError
from support.layouts import minidomain
from support.layouts.minidomain import (
    CLASSES,
    COLOURS,
    DOMAINS,
    TEMPLATES,
    captions,
    draw,
    load_domain,
    load_web,
)

pytestmark = pytest.mark.filterwarnings("error")
MODULE = Path(minidomain.__file__)
SMALL = {"train": 40, "val": 20, "test": 20}
FEW = "from support.layouts import minidomain; minidomain.SIZES = {'train': 40, 'val': 20, 'test': 20}; "


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder and a small benchmark."""
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(minidomain, "SIZES", SMALL)
    monkeypatch.setattr(minidomain, "WEB_SIZE", 30)
    return tmp_path / "cache" / "minidomain"


def python(*arguments):
    """Starts Python with the project's modules on its path and warnings as errors."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(MODULE.parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments):
    process = python(*arguments)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def digest(image):
    return hashlib.sha256(image.tobytes()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- drawing


def test_an_image_depends_only_on_its_arguments():
    wanted = [("test", domain, index, 3) for domain in DOMAINS for index in (0, 7, 2**33)] + [
        ("web", None, 5, 0)
    ]
    first = [draw(*arguments) for arguments in wanted]
    again = [draw(*arguments) for arguments in reversed(wanted)][::-1]
    assert all(
        a[0].tobytes() == b[0].tobytes() and a[1] == b[1] for a, b in zip(first, again, strict=True)
    )
    assert all(image.shape == (36, 36, 3) and image.dtype == np.uint8 for image, _ in first)
    code = "import hashlib\nfrom support import minidomain\n"
    code += f"for a in {wanted}: print(hashlib.sha256(minidomain.draw(*a)[0]).hexdigest())"
    status, output, errors = run("-c", code)
    assert (status, errors) == (0, "")
    assert output.split() == [digest(image) for image, _ in first]


def test_no_image_is_in_two_splits():
    images = [
        digest(draw(split, domain, index, seed)[0])
        for split in minidomain.SIZES
        for domain in DOMAINS
        for index in range(40)
        for seed in (0, 1)
    ]
    images += [digest(draw("web", None, index)[0]) for index in range(300)]
    assert len(set(images)) == len(images)


def test_streams_never_coincide():
    states = {
        str(minidomain.stream(name, domain, index, seed).bit_generator.state["state"])
        for name in minidomain.STREAMS
        for domain in DOMAINS
        for index in (0, 1, 2**32, 2**32 + 1)
        for seed in (0, 1, 2**32)
    }
    assert len(states) == len(minidomain.STREAMS) * len(DOMAINS) * 4 * 3


def test_classes_are_balanced():
    assert len(CLASSES) == len(set(CLASSES)) == 20
    assert all(size % len(CLASSES) == 0 for size in minidomain.SIZES.values())
    labels = Counter(draw("val", "clipart", index)[1].label for index in range(100))
    assert labels == {label: 5 for label in range(20)}


def test_web_contains_few_real_images():
    attributes = [draw("web", None, index)[1] for index in range(600)]
    domains = Counter(each.domain for each in attributes)
    assert 0.10 < domains["real"] / 600 < 0.20
    assert all(0.16 < domains[domain] / 600 < 0.27 for domain in DOMAINS[1:])
    assert {each.label for each in attributes} == set(range(20))


def test_attributes_match_the_image():
    spots, areas = {}, {}
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


def test_shapes_fit_in_their_square():
    rng = np.random.default_rng(0)
    for name, shape in minidomain.SHAPES.items():
        for _ in range(20):
            points = np.concatenate([part.outline for part in shape(rng)])
            assert np.isfinite(points).all() and np.abs(points).max() < 1.2, name
            assert np.ptp(points, axis=0).max() > 1.4, name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("tests", "real", 0), "'tests'"),
        (("test", "photo", 0), "'photo'"),
        (("test", None, 0), "None"),
        (("web", "real", 0), "'real'"),
        (("test", "real", -1), "-1"),
        (("test", "real", 0, -2), "-2"),
    ],
)
def test_errors_name_the_bad_argument(arguments, named):
    with pytest.raises(InputError, match=named):
        draw(*arguments)


def test_load_raises_for_unknown_names_and_negative_seeds(cache):
    for arguments in (("real", "web"), ("real", "tests"), ("photo", "test"), ("real", "test", -1)):
        with pytest.raises(InputError):
            load_domain(*arguments)


# ------------------------------------------------------------------------------------------------------------- captions


def test_captions_match_the_attributes():
    rng = np.random.default_rng(0)
    for index in range(600):
        _, attributes = draw("web", None, index)
        for caption in captions(attributes, rng, number=6):
            noun, _, place = re.match(r"(.*?)( (?:in|on|at) (.*?))?\.?$", caption).groups()
            words = noun.split()
            assert {word for word in words if word in CLASSES} <= {CLASSES[attributes.label]}
            assert {word for word in words if word in COLOURS} <= {attributes.colour}
            assert {word for word in words if word in minidomain.EXTENTS} <= {attributes.size}
            places = [
                attributes.position,
                attributes.background,
                f"{attributes.background} background",
            ]
            assert place is None or place.removeprefix("the ").removeprefix("a ") in places, caption
            if " of " in noun:
                style = re.fullmatch(r"(?:an?|the) (.*?) of (?:an?|the) .*", noun)[1]
                assert style in minidomain.STYLE_WORDS[attributes.domain]
            assert not re.search(r"[{}]|  |\ba [aeiou]|\ban [^aeiou]", caption), caption
            assert len(caption.replace(".", " .").split()) + 2 <= 16, (
                "too long for the tiny CLIP's context"
            )


def test_share_of_captions_with_class_style_and_colour():
    for domain, share in (("real", 0.85), ("sketch", 0.95)):
        _, attributes = draw("test", domain, 0)
        texts = captions(attributes, np.random.default_rng(1), number=4000)
        assert len(texts) == 4000
        assert np.mean(
            ["star" in text.replace(".", "").split() for text in texts]
        ) == pytest.approx(share, abs=0.02)
        assert np.mean([" of " in text for text in texts]) == pytest.approx(0.8, abs=0.02)
        coloured = np.mean([any(colour in text.split() for colour in COLOURS) for text in texts])
        assert coloured == (pytest.approx(0.4, abs=0.03) if domain == "real" else 0)
    assert len(captions(attributes, np.random.default_rng(1))) == 4


def test_templates_contain_the_class():
    assert len(set(TEMPLATES)) == 8
    assert all(
        "{" not in template.format("star") and "star" in template.format("star")
        for template in TEMPLATES
    )


# ---------------------------------------------------------------------------------------------------------------- cache


def test_load_returns_the_images_of_draw(cache):
    for _ in ("drawn", "cached"):
        images, labels = load_domain("painting", "val", seed=2)
        assert (images.shape, images.dtype, labels.dtype) == ((20, 36, 36, 3), np.uint8, np.int32)
        assert all(
            np.array_equal(images[index], draw("val", "painting", index, 2)[0])
            for index in range(20)
        )
        assert labels.tolist() == list(range(20))
        images, texts = load_web()
        assert (images.shape, len(texts), {len(each) for each in texts}) == (
            (30, 36, 36, 3),
            30,
            {4},
        )
        assert all(
            np.array_equal(images[index], draw("web", None, index)[0]) for index in range(30)
        )
        assert texts[7] == captions(
            draw("web", None, 7)[1], minidomain.stream("captions", None, 7, 0)
        )


def test_load_draws_one_split_and_only_once(cache, capsys):
    load_domain("sketch", "test")
    (file,) = cache.iterdir()
    assert capsys.readouterr().err.count("\n") == 1
    stamp = file.stat().st_mtime_ns
    load_domain("sketch", "test")
    assert (file.stat().st_mtime_ns, capsys.readouterr().err) == (stamp, "")


@pytest.mark.parametrize(
    "damage", ["empty", "cut off", "flipped byte", "flipped checksum", "appended"]
)
def test_a_damaged_cache_is_drawn_again(cache, capsys, damage):
    images, labels = load_domain("clipart", "test")
    (file,) = cache.iterdir()
    content = file.read_bytes()
    capsys.readouterr()
    bad = bytearray(content)
    match damage:
        case "empty":
            bad.clear()
        case "cut off":
            del bad[len(bad) // 2 :]
        case "flipped byte":
            bad[len(bad) // 2] ^= 1
        case "flipped checksum":
            bad[3] ^= 1
        case "appended":
            bad += b"\0"
    file.write_bytes(bad)
    again, labels_again = load_domain("clipart", "test")
    assert np.array_equal(images, again) and np.array_equal(labels, labels_again)
    assert (
        capsys.readouterr().err == f"minidomain: {file} was cut off or altered: drawing it again\n"
    )
    assert [file] == list(cache.iterdir())
    load_domain("clipart", "test")
    assert capsys.readouterr().err == ""


def test_two_processes_load_the_same_images_at_once(cache):
    code = (
        FEW
        + "import hashlib; print(hashlib.sha256(minidomain.load_domain('real', 'train')[0]).hexdigest())"
    )
    processes = [python("-c", code) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [digest(load_domain("real", "train")[0])] * 2
    assert [file.suffix for file in cache.iterdir()] == [".cache"]


def test_all_cores_draw_what_the_cache_lacks(cache, tmp_path, monkeypatch, capfd):
    wanted = [("real", "test"), ("sketch", "test"), ("real", "val"), ("real", "train")]
    expected = [load_domain(*each) for each in wanted]
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    load_domain(*wanted[0])
    capfd.readouterr()
    with minidomain.drawn_on_all_cores(wanted):
        deadline = time.monotonic() + 60
        while (
            len(list((tmp_path / "other" / "minidomain").glob("*.cache"))) < 4
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)  # the caller draws nothing
    assert capfd.readouterr().err.count("minidomain: drawing") == 3
    for each, (images, labels) in zip(wanted, expected, strict=True):
        found, found_labels = load_domain(*each)
        assert np.array_equal(found, images) and np.array_equal(found_labels, labels)
    assert capfd.readouterr().err == ""


def test_ctrl_c_ends_helpers_without_a_traceback(cache, monkeypatch, capfd):
    helpers, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command: helpers.append(popen(command)) or helpers[-1]
    )
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(
        minidomain, "SIZES", SMALL | {"train": 1_000_000}
    )  # it draws until it is interrupted
    with minidomain.drawn_on_all_cores([("real", "val"), ("real", "train")]):
        while "minidomain: drawing real-train" not in capfd.readouterr().err:
            assert helpers[0].poll() is None
            time.sleep(0.05)
        helpers[0].send_signal(signal.SIGINT)
        assert helpers[0].wait() == -signal.SIGINT
    assert capfd.readouterr().err == ""


def test_a_failed_write_leaves_nothing_behind(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        load_domain("clipart", "val")
    assert not cache.exists()


def test_changed_code_draws_new_images(cache, tmp_path, monkeypatch, capsys):
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


def test_an_unusable_cache_folder_is_an_input_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="LIPSUM_CACHE"):
        load_domain("clipart", "val")


# --------------------------------------------------------------------------------------------------------- command line


def test_an_export_contains_the_loaded_images(cache, tmp_path):
    minidomain.main(export=tmp_path / "set")
    root = tmp_path / "set"
    lists = {f"{domain}_{split}.txt" for domain in DOMAINS for split in SMALL}
    assert {path.name for path in root.iterdir()} == {*DOMAINS, *lists}
    for domain in DOMAINS:
        assert {path.name for path in (root / domain).iterdir()} == set(CLASSES)
        for split, size in SMALL.items():
            rows = [
                line.split(" ")
                for line in (root / f"{domain}_{split}.txt").read_text().splitlines()
            ]
            images, labels = load_domain(domain, split)
            assert len(rows) == size
            for (path, label), image, expected in zip(rows, images, labels, strict=True):
                assert int(label) == expected and path.split("/")[:2] == [domain, CLASSES[expected]]
                assert np.array_equal(np.asarray(Image.open(root / path)), image)
    files = [path for domain in DOMAINS for path in (root / domain).rglob("*.png")]
    assert len(files) == len(DOMAINS) * sum(SMALL.values())


def test_export_needs_an_empty_folder(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    status, output, errors = run("-m", "support.layouts.minidomain", "--export", tmp_path)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert str(tmp_path) in errors and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(InputError, match="not an empty folder"):
        minidomain.main(export=tmp_path / "mine.txt")


def test_export_with_a_negative_seed_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^index 0 and seed -1 must not be negative$"):
        minidomain.main(export=Path("out"), seed=-1)
    assert list(tmp_path.iterdir()) == []
