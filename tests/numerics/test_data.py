"""Preprocessing, augmentation, batches and placement of data.py, on small real image files."""

import dataclasses
import itertools
import json
import math
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE
from helpers import CONFIG, assert_batches_raise, pixels, raises, smooth, take
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

import clip
import data
from support import devices
from support.run import processes
from support.weights import formats
from tools import seeded

EIGHT = clip.Preparation(8)


def saved(image: Image.Image, path: Path, **options) -> data.ListedFile:
    image.save(path, **options)
    return data.ListedFile(path, "list line 1")


def evaluate(file: data.ListedFile, resolution: int) -> np.ndarray:
    with data.open_image(file) as image:
        return data.evaluation_image(image, clip.Preparation(resolution))


def train(file: data.ListedFile, resolution: int, seed: int) -> np.ndarray:
    preparation = clip.Preparation(resolution)
    with data.open_image(file) as image:
        return data.training_image(image, preparation, np.random.default_rng(seed))


def split_of(paths: list[Path]) -> data.Split:
    """A split with one class per image."""
    files = tuple(
        data.ListedFile(path, f"list line {number}") for number, path in enumerate(paths, start=1)
    )
    return data.Split(
        "made", tuple(map(str, range(len(files)))), files, np.arange(len(files), dtype=np.int32)
    )


# ------------------------------------------------------------------------------------ preprocessing


def bicubic_weights(size: int, new_size: int) -> np.ndarray:
    """Pillow's bicubic filter as a matrix of integers in units of 2^-22, one row per new pixel."""
    scale = size / new_size
    stretch = max(scale, 1.0)
    support = 2 * stretch
    weights = np.zeros((new_size, size), np.int64)
    for new in range(new_size):
        centre = (new + 0.5) * scale
        first, end = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
        x = np.abs((np.arange(first, end) - centre + 0.5) / stretch)
        near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
        taps = np.where(x < 1, near, np.where(x < 2, far, 0))
        taps = taps / sum(taps) * 2**22
        weights[new, first:end] = np.trunc(taps + np.copysign(0.5, taps))
    return weights


def resize_bicubic(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Rows, then columns, each rounded to bytes; a direction that keeps its size is left alone."""

    def resize_columns(image: np.ndarray, size: int) -> np.ndarray:
        if image.shape[0] == size:
            return image
        weighted = np.tensordot(
            bicubic_weights(image.shape[0], size).astype(float), image.astype(float), 1
        )  # exact
        return np.clip((weighted.astype(np.int64) + 2**21) >> 22, 0, 255).astype(np.uint8)

    return resize_columns(resize_columns(image.swapaxes(0, 1), width).swapaxes(0, 1), height)


def centre_crop(image: np.ndarray, resolution: int) -> np.ndarray:
    """Cuts off half the surplus, rounded to even, on the left and at the top."""
    halves = [divmod(side - resolution, 2) for side in image.shape[:2]]
    top, left = (half + (odd and half % 2) for half, odd in halves)
    return image[top : top + resolution, left : left + resolution]


SIZES = [
    (640, 480),
    (480, 640),
    (300, 300),
    (1, 200),
    (200, 1),
    (32, 32),
    (32, 35),
    (65, 32),
    (31, 33),
    (1000, 37),
    (7, 5),
    (1, 1),
    (129, 97),
]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_evaluation_image_bit_for_bit(size: tuple[int, int], mode: str, tmp_path: Path) -> None:
    """Equal to the filter written out in numpy."""
    resolution, original = 32, pixels(*size, channels=len(mode))
    file = saved(
        Image.fromarray(original.squeeze(2) if mode == "L" else original), tmp_path / "image.png"
    )
    width, height = (resolution * side // min(size) for side in size)
    expected = centre_crop(resize_bicubic(original, width, height), resolution)
    actual = evaluate(file, resolution)
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, np.broadcast_to(expected, (resolution, resolution, 3)))


def test_evaluation_image_at_the_resolution_of_clip(tmp_path: Path) -> None:
    original = pixels(500, 333)
    expected = centre_crop(resize_bicubic(original, int(224 * 500 / 333), 224), 224)
    file = saved(Image.fromarray(original), tmp_path / "image.png")
    np.testing.assert_array_equal(evaluate(file, 224), expected)


@pytest.mark.parametrize(
    ("surplus", "cut"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4), (9, 4)]
)
def test_centre_crop_rounds_ties_to_even(surplus: int, cut: int) -> None:
    ramp = np.broadcast_to(np.arange(8 + surplus, dtype=np.uint8), (8, 8 + surplus))
    assert data.evaluation_image(Image.fromarray(ramp.copy()), EIGHT)[0, 0, 0] == cut
    assert data.evaluation_image(Image.fromarray(ramp.T.copy()), EIGHT)[0, 0, 0] == cut


PREPARED = np.load(REFERENCE / "preparation.npz")
PREPARATIONS = {
    name.removesuffix("/section"): formats.read_preparation(
        Path(str(PREPARED[name.replace("section", "file")])), json.loads(str(PREPARED[name])), 16
    )
    for name in PREPARED.files
    if name.endswith("/section")
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_preparations_of_transformers_and_open_clip(name: str) -> None:
    """Of all pixels: what the library makes of the same files and images."""
    preparation = PREPARATIONS[name]
    expected = PREPARED[f"{name}/pixels"]
    images = seeded.pictures(seeded.SEED)[: len(expected)]
    assert len(images) >= 5
    bytes_ = [data.evaluation_image(Image.fromarray(image), preparation) for image in images]
    config = dataclasses.replace(CONFIG, preparation=preparation)
    tower = clip.VisionTower(config, jax.random.key(0))
    actual = clip.standardize(jnp.asarray(np.stack(bytes_)), tower)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)


def test_preparations_differ() -> None:
    """All but the two that say the same in other words."""
    distinct = {(name.startswith("open_clip"), each) for name, each in PREPARATIONS.items()}
    assert len(PREPARATIONS) == 12 and len(distinct) == 10


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_training_crops_have_the_filter_of_the_model(resample: Image.Resampling) -> None:
    original = Image.fromarray(pixels(50, 40))
    preparation = clip.Preparation(16, 4, squash=True, resample=resample)
    random = np.random.default_rng(0)
    left, top, w, h = data.random_crop(50, 40, random)
    crop = original.resize((16, 16), resample, (left, top, left + w, top + h))
    expected = np.asarray(crop)[:, ::-1] if random.random() < 0.5 else np.asarray(crop)
    actual = data.training_image(original, preparation, np.random.default_rng(0))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("transparency", [None, 2, b"\x00\x80\xff\x10\x00"], ids=repr)
def test_palette_images(transparency: bytes | int | None, tmp_path: Path) -> None:
    """In OpenAI's order: resized by the nearest pixel, then converted to RGB.

    Transparency is ignored.
    """
    indices, palette = pixels(49, 30, 1, seed=1)[:, :, 0] % 5, pixels(5, 1, 3, seed=2)[0]
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    file = saved(
        image,
        tmp_path / "image.png",
        **({} if transparency is None else {"transparency": transparency}),
    )
    with data.open_image(file) as image:
        assert image.mode == "P" and image.info.get("transparency") == transparency
    rows, columns = (
        (2 * np.arange(new) + 1) * old // (2 * new) for old, new in ((30, 32), (49, 52))
    )
    np.testing.assert_array_equal(
        evaluate(file, 32), centre_crop(palette[indices[rows][:, columns]], 32)
    )
    assert train(file, 32, seed=0).shape == (32, 32, 3)


def picture(mode: str) -> Image.Image:
    """A smooth picture in the given mode."""
    colour = smooth(50, 40)
    if mode in ("P", "PA"):
        return colour.quantize(256).convert(mode)
    if mode.startswith("I;16"):
        wide = np.asarray(colour.convert("L")).astype(np.uint16) * 256 + np.arange(
            50, dtype=np.uint16
        )
        return (
            Image.frombytes("I;16B", (50, 40), wide.astype(">u2").tobytes())
            if mode[4:]
            else Image.fromarray(wide)
        )
    return colour.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "tolerance"),
    [
        ("L", "png", 0),
        ("LA", "png", 0),
        ("I;16", "png", 0),
        ("I;16B", "tiff", 0),
        ("CMYK", "tiff", 0),
        ("L", "jpg", 2),
        ("RGB", "jpg", 2),
        ("CMYK", "jpg", 2),
        ("RGB", "webp", 10),
        ("P", "png", 15),
        ("P", "gif", 15),
        ("PA", "tiff", 15),
    ],
)
def test_every_kind_of_image(mode: str, suffix: str, tolerance: int, tmp_path: Path) -> None:
    """On average near the result for the picture in RGB or grey.

    Of 16-bit images, the high byte counts.
    """
    options = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    file = saved(picture(mode), tmp_path / f"image.{suffix}", **options)
    same = saved(
        smooth(50, 40).convert("RGB" if mode in ("RGB", "CMYK", "P", "PA") else "L"),
        tmp_path / "same.png",
    )
    for prepare in (evaluate, lambda file, resolution: train(file, resolution, seed=0)):
        actual, expected = prepare(file, 32), prepare(same, 32)
        assert actual.shape == (32, 32, 3) and actual.dtype == np.uint8
        assert np.mean(np.abs(actual.astype(int) - expected)) <= tolerance


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_of_unknown_range_are_refused(mode: str, tmp_path: Path) -> None:
    grey = smooth(50, 40).convert("L")
    image = (
        Image.fromarray(np.asarray(grey).astype({"F": np.float32, "I": np.int32}[mode]))
        if mode != "LAB"
        else grey
    )
    file = saved(image if mode != "LAB" else Image.new("LAB", (50, 40)), tmp_path / "image.tiff")
    for read in (data.check_image, lambda file: data.read_image(file, clip.Preparation(32))):
        with raises(f"list line 1: .*Pillow's mode {mode}, of unknown range: save it as 8-bit RGB"):
            read(file)


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 9_000)])
def test_memory_of_extreme_shapes(size: tuple[int, int]) -> None:
    """The middle of a gradient along the long side, in memory of a few megabytes: resized whole, it
    would take 4 GB.
    """
    long = max(size)
    ramp = (np.arange(long) * 255 // long).astype(np.uint8)
    pixels = np.broadcast_to(ramp if size[0] == long else ramp[:, None], size[::-1])
    tracemalloc.start()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image = data.evaluation_image(image, clip.Preparation(224))
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()
    assert image.shape == (224, 224, 3) and np.all(np.abs(image.astype(int) - 127) <= 1)


def test_long_text_in_a_png(tmp_path: Path) -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("history", "x" * 2**21, zip=True)
    data.check_image(saved(smooth(50, 40), tmp_path / "image.png", pnginfo=notes))


def test_cmyk_jpeg_keeps_its_colour(tmp_path: Path) -> None:
    """JPEG stores CMYK inverted: without the inversion, orange becomes blue."""
    file = saved(Image.new("RGB", (40, 30), (230, 120, 20)).convert("CMYK"), tmp_path / "image.jpg")
    assert np.max(np.abs(evaluate(file, 16).astype(int) - (230, 120, 20))) <= 6


@pytest.mark.parametrize("mode", ["RGBA", "1"])
def test_conversion_comes_last(mode: str, tmp_path: Path) -> None:
    """OpenAI resizes, crops, and then converts to RGB."""
    alpha = smooth(50, 40, seed=1).convert("L").point(lambda value: max(value, 1))
    image = Image.merge("RGBA", (*smooth(50, 40).split(), alpha)).convert(mode)
    expected = image.resize((40, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32)).convert("RGB")
    np.testing.assert_array_equal(evaluate(saved(image, tmp_path / "image.png"), 32), expected)


def test_alpha_is_dropped(tmp_path: Path) -> None:
    """The colour is not blended with any background."""
    file = saved(Image.new("RGBA", (20, 20), (200, 100, 50, 128)), tmp_path / "image.png")
    for actual in (evaluate(file, 8), train(file, 8, seed=0)):
        assert np.max(np.abs(actual.astype(int) - (200, 100, 50))) <= 1


# ------------------------------------------------------------------------------------- augmentation


def test_random_crop_distribution() -> None:
    """Uniform areas and log-uniform ratios, given that the crop fits."""
    random, side = np.random.default_rng(0), 2_000
    crops = np.array([data.random_crop(side, side, random) for _ in range(20_000)])
    left, top, w, h = crops.T
    area, ratio = w * h / side**2, w / h
    assert 0.08 - 1e-3 <= area.min() < 0.085 and 0.98 < area.max() <= 1
    assert 0.75 - 2e-3 <= ratio.min() < 0.752 and 1.33 < ratio.max() <= 4 / 3 + 2e-3
    grid_area = np.linspace(0.08, 1, 1_001)[:, None]
    log_ratio = np.log(4 / 3) * np.linspace(-1, 1, 1_001)
    fits = grid_area <= np.exp(-np.abs(log_ratio))
    np.testing.assert_allclose(
        area.mean(), np.mean(np.broadcast_to(grid_area, fits.shape)[fits]), atol=0.01
    )
    np.testing.assert_allclose(
        np.log(ratio).std(), np.broadcast_to(log_ratio, fits.shape)[fits].std(), atol=0.005
    )
    np.testing.assert_allclose(np.log(ratio).mean(), 0, atol=0.006)
    for start, room in ((left, side - w), (top, side - h)):
        np.testing.assert_allclose(np.mean(start[room > 200] / room[room > 200]), 0.5, atol=0.01)


class NeverFits(np.random.Generator):
    """Draws crops that are larger than any image."""

    def uniform(self, *bounds: float) -> float:
        return 100.0


def test_fallback_crop_is_the_largest() -> None:
    """The largest of all crops with a ratio in bounds, found by brute force, and centred."""
    for width, height in itertools.product(range(1, 14), repeat=2):
        left, top, w, h = data.random_crop(width, height, NeverFits(np.random.PCG64(0)))
        candidates = itertools.product(range(1, width + 1), range(1, height + 1))
        assert w * h == max(a * b for a, b in candidates if 3 * b <= 4 * a and 3 * a <= 4 * b)
        assert 3 * h <= 4 * w and 3 * w <= 4 * h
        assert abs(2 * left - (width - w)) <= 1 and abs(2 * top - (height - h)) <= 1


@pytest.mark.parametrize(("width", "height"), [(1, 1_000), (1_000, 1), (10, 3_000), (3_000, 10)])
def test_extreme_shapes_fall_back(width: int, height: int) -> None:
    short = min(width, height)
    long = short * 4 // 3
    for seed in range(20):
        left, top, w, h = data.random_crop(width, height, np.random.default_rng(seed))
        if short == 10:  # small crops may fit here
            assert 7 <= w <= 13 and 7 <= h <= 13
        else:
            assert (w, h) == ((1, long) if width == 1 else (long, 1))
            assert max(left, top) == (1_000 - long) // 2


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(1, 3_000), st.integers(1, 3_000), st.integers(0, 2**32 - 1))
def test_random_crop_is_inside(width: int, height: int, seed: int) -> None:
    left, top, w, h = data.random_crop(width, height, np.random.default_rng(seed))
    assert w >= 1 and h >= 1
    assert 0 <= left <= width - w and 0 <= top <= height - h


def test_random_crop_reaches_every_edge() -> None:
    crops = np.array([data.random_crop(6, 5, np.random.default_rng(seed)) for seed in range(500)])
    for start, size, side in ((crops[:, 0], crops[:, 2], 6), (crops[:, 1], crops[:, 3], 5)):
        smaller = size < side
        assert set((start == 0)[smaller]) == set((start + size == side)[smaller]) == {False, True}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A large JPEG with sides that no power of two divides, and its decoded pixels as PNG."""
    folder = tmp_path_factory.mktemp("large")
    detail = Image.fromarray(pixels(160, 120)).resize((1_601, 1_203), Image.Resampling.BICUBIC)
    Image.blend(smooth(1_601, 1_203), detail, 0.05).save(folder / "image.jpg", quality=90)
    with Image.open(folder / "image.jpg") as image:
        image.save(folder / "image.png", compress_level=1)
    return folder / "image.jpg", folder / "image.png"


@pytest.mark.parametrize(("resolution", "expected_scales"), [(64, {4, 8}), (224, {1, 2, 4})])
def test_training_decodes_large_jpegs_small(
    resolution: int, expected_scales: set[int], large: tuple[Path, Path]
) -> None:
    """Never smaller than the crop needs, and with nearly the same result (measured: at most 0.59 of
    255 apart).
    """
    preparation = clip.Preparation(resolution)
    scales = set()
    with Image.open(large[1]) as whole:
        for seed in range(12):
            _, _, w, h = data.random_crop(*whole.size, np.random.default_rng(seed))
            with Image.open(large[0]) as image:
                actual = data.training_image(image, preparation, np.random.default_rng(seed))
            scale = round(whole.width / image.width)
            assert image.size == tuple(-(-side // scale) for side in whole.size)
            assert min(w, h) / scale >= resolution
            scales.add(scale)
            expected = data.training_image(whole, preparation, np.random.default_rng(seed))
            assert np.mean(np.abs(actual.astype(int) - expected)) < 0.8
    assert scales == expected_scales


def test_draft_does_not_shift_the_crop(tmp_path: Path) -> None:
    """Decoded sizes are rounded up: 1601 pixels become 201, but fill only 200.125 of them."""
    ramp = np.linspace(0, 255, 1_601)
    image = Image.fromarray(
        np.broadcast_to(np.round(ramp)[None, :, None], (1_601, 1_601, 3)).astype(np.uint8)
    )
    image.save(tmp_path / "image.jpg", quality=100)
    for seed in range(8):
        left, _, w, _ = data.random_crop(1_601, 1_601, np.random.default_rng(seed))
        with Image.open(tmp_path / "image.jpg") as image:
            found = data.training_image(image, clip.Preparation(32), np.random.default_rng(seed))
        row = found.mean(axis=(0, 2))
        centres = left + (np.arange(32) + 0.5) * w / 32 - 0.5
        expected = np.interp(centres, np.arange(1_601), ramp)
        assert image.size == (201, 201)
        # Measured: 0.03 to 0.13, and at least 0.52 if the scale is the ratio of the two sizes.
        assert abs(np.mean((np.sort(row) - expected)[2:-2])) < 0.25


def test_evaluation_decodes_whole_jpegs(large: tuple[Path, Path]) -> None:
    with Image.open(large[0]) as jpeg, Image.open(large[1]) as png:
        prepared = [data.evaluation_image(image, clip.Preparation(64)) for image in (jpeg, png)]
        np.testing.assert_array_equal(*prepared)


# ------------------------------------------------------------------------------------------ batches


@pytest.fixture(scope="module")
def ramps(tmp_path_factory: pytest.TempPathFactory) -> data.Split:
    """Ten images that get brighter from left to right, each with its own label."""
    folder = tmp_path_factory.mktemp("ramps")
    paths = []
    for index in range(10):
        ramp = np.linspace(0, 200 + 5 * index, 24).astype(np.uint8)
        paths.append(folder / f"{index}.png")
        Image.fromarray(np.broadcast_to(ramp, (20, 24)).copy()).save(paths[-1])
    return split_of(paths)


def assert_equal(actual: list[data.HostBatch], expected: list[data.HostBatch]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_training_batches_are_a_function_of_seed_and_number(ramps: data.Split) -> None:
    """They depend neither on the number of threads nor on the first batch."""
    expected = take(data.training_batches(ramps, EIGHT, 4, seed=5, workers=1), 9)
    assert_equal(take(data.training_batches(ramps, EIGHT, 4, seed=5, workers=4), 9), expected)
    assert_equal(
        take(data.training_batches(ramps, EIGHT, 4, seed=5, workers=2, start=3), 6), expected[3:]
    )
    for batch in expected:
        assert batch.keys() == {"image", "label"}
        assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].shape == (4,) and batch["label"].dtype == np.int32


def test_training_batches_shuffle_and_augment_anew(ramps: data.Split) -> None:
    """Each epoch has each image once; order and crops differ between epochs and between seeds."""
    orders, crops = [], set()
    for seed in range(3):
        batches = take(data.training_batches(ramps, EIGHT, 5, seed, workers=2), 8)
        labels = np.concatenate([batch["label"] for batch in batches]).reshape(4, 10)
        assert (np.sort(labels) == np.arange(10)).all()
        orders += [tuple(epoch) for epoch in labels]
        images = np.concatenate([batch["image"] for batch in batches])
        crops |= {
            image.tobytes()
            for image, label in zip(images, labels.ravel(), strict=True)
            if label == 3
        }
    assert len(set(orders)) == 12
    assert len(crops) == 12


def test_half_of_the_training_images_are_mirrored(ramps: data.Split) -> None:
    batches = take(data.training_batches(ramps, EIGHT, 20, seed=0, workers=1), 20)
    images = np.concatenate([batch["image"] for batch in batches]).astype(int)
    mirrored = images[:, 4, 0, 0] > images[:, 4, -1, 0]
    assert abs(np.mean(mirrored) - 0.5) < 4 * 0.5 / math.sqrt(400)


@pytest.mark.parametrize(("batch_size", "batches"), [(4, 3), (5, 2), (10, 1), (16, 1), (1, 10)])
@pytest.mark.parametrize("workers", [1, 4])
def test_evaluation_batches(ramps: data.Split, batch_size: int, batches: int, workers: int) -> None:
    """Each image once, in order; images that fill up the last batch are not valid."""
    taken = list(data.evaluation_batches(ramps, EIGHT, batch_size, workers))
    assert len(taken) == batches
    image, label, valid = (
        np.concatenate([batch[key] for batch in taken]) for key in ("image", "label", "valid")
    )
    assert image.shape == (batches * batch_size, 8, 8, 3) and image.dtype == np.uint8
    assert label.dtype == np.int32 and valid.dtype == np.bool_
    np.testing.assert_array_equal(valid, np.arange(batches * batch_size) < 10)
    np.testing.assert_array_equal(label[valid], np.arange(10))
    for file, found in zip(ramps.images, image[valid], strict=True):
        with Image.open(file.path) as original:
            np.testing.assert_array_equal(found, data.evaluation_image(original, EIGHT))


@pytest.mark.parametrize("count", [2, 4])
def test_processes_read_parts_of_the_same_batches(
    ramps: data.Split, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Concatenated, they are the whole batches, whatever the first batch; no two processes read the
    same image.
    """
    parts = [devices.Part(index, count) for index in range(count)]

    def concatenated(per_part: list[list[data.HostBatch]]) -> list[data.HostBatch]:
        return [
            {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
            for batches in zip(*per_part, strict=True)
        ]

    whole = take(data.training_batches(ramps, EIGHT, 4, seed=5, workers=1), 7)
    per_part = [
        take(data.training_batches(ramps, EIGHT, 4, 5, workers=2, start=2, part=part), 5)
        for part in parts
    ]
    assert all(len(batch["label"]) == 4 // count for batches in per_part for batch in batches)
    assert_equal(concatenated(per_part), whole[2:])

    whole = list(data.evaluation_batches(ramps, EIGHT, 8, workers=1))
    copies = tuple(data.ListedFile(Path(shutil.copy(file.path, tmp_path))) for file in ramps.images)
    read, open_image = [], data.open_image
    monkeypatch.setattr(data, "open_image", lambda file: read.append(file) or open_image(file))
    copied = dataclasses.replace(ramps, images=copies)
    assert_equal(
        concatenated([list(data.evaluation_batches(copied, EIGHT, 8, 1, part)) for part in parts]),
        whole,
    )
    assert sorted(file for file in read if file in copies) == sorted(copies)


# ------------------------------------------------------------------------------------------- splits


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=10, max_size=200))
@example([0] * 9 + [1])
@example([0] * 9 + [1] + [2] * 10)
def test_hold_out_tenth(labels: list[int]) -> None:
    """The two are disjoint, complete, in the order of the list, and spread evenly over classes.

    No class loses its only image.
    """
    whole = split_of([Path(str(index)) for index in range(len(labels))])
    whole = data.Split(whole.name, whole.classes, whole.images, np.array(labels, np.int32))
    if all(labels.count(label) == 1 for label in sorted(labels)[9::10]):
        with raises(f"{len(labels)} training images are too few to hold out one in 10: give"):
            data.hold_out(whole)
        return
    train, held_out = data.hold_out(whole)
    tenths = sorted(range(len(labels)), key=labels.__getitem__)[9::10]
    expected = [index for index in sorted(tenths) if labels.count(labels[index]) > 1]
    assert [whole.images.index(file) for file in held_out.images] == expected
    assert set(train.labels) == set(labels)
    assert sorted(train.images + held_out.images, key=whole.images.index) == list(whole.images)
    for split in (train, held_out):
        indices = [whole.images.index(file) for file in split.images]
        assert indices == sorted(indices) and split.labels.tolist() == [
            labels[index] for index in indices
        ]
    for label in range(6):
        assert abs(np.sum(held_out.labels == label) - labels.count(label) / 10) < 1


def test_kept_classes_are_numbered_anew() -> None:
    whole = split_of([Path(str(index)) for index in range(5)])
    whole = dataclasses.replace(whole, compared=np.array([True, True, True, False, True]))
    kept = data.keep_classes(data.take(whole, np.array([4, 0, 3, 1]), "some"), np.array([1, 3, 4]))
    assert kept.classes == ("1", "3", "4") and [file.path.name for file in kept.images] == [
        "4",
        "3",
        "1",
    ]
    assert kept.labels.tolist() == [2, 1, 0] and kept.labels.dtype == np.int32
    assert kept.compared.tolist() == [True, False, True]


# ------------------------------------------------------------------------------------- broken files


def encoded(suffix: str, tmp_path: Path) -> bytes:
    """A JPEG or PNG of a few kilobytes."""
    path = tmp_path / f"whole.{suffix}"
    Image.fromarray(pixels(60, 40)).save(path)
    return path.read_bytes()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def bad_pixels(content: bytes) -> bytes:
    """Puts an invalid zlib stream under a correct checksum."""
    start = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[start - 4 : start])
    body = b"IDAT" + content[start + 4 : start + 40] + b"\xff" * (length - 36)
    return (
        content[:start] + body + struct.pack(">I", zlib.crc32(body)) + content[start + 8 + length :]
    )


def hole(content: bytes) -> bytes:
    """Zeros in the middle, as of a sparse copy."""
    middle = len(content) // 2
    return content[:middle] + bytes(500) + content[middle + 500 :]


def bad_marker(content: bytes) -> bytes:
    """Puts a Huffman table of zeros among the pixels."""
    middle = len(content) // 2
    return content[:middle] + b"\xff\xc4" + b"\0" * 50 + content[middle + 52 :]


BROKEN = {
    "zero bytes.jpg": lambda _: b"",
    "text.jpg": lambda _: b"<html>404 Not Found</html>\n" * 20,
    "half.jpg": half,
    "half.png": half,
    "half.bmp": half,  # of a format without an end marker
    "first bytes.jpg": lambda content: content[:30],
    "first bytes.png": lambda content: content[:30],
    "no end marker.jpg": lambda content: content[:-2],
    "bad marker.jpg": bad_marker,
    "hole.png": hole,
    "bad pixels.png": bad_pixels,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_found_at_once(name: str, tmp_path: Path) -> None:
    """The error names file and list line, before training and again when the file is decoded."""
    whole = tmp_path / "whole.png"
    content = encoded(name[-3:], tmp_path)
    smooth(20, 20).save(whole)
    broken = tmp_path / name
    broken.write_bytes(BROKEN[name](content))
    split = split_of([*[whole] * 3, broken, *[whole] * 3])
    message = rf"list line 4: .*{name} is no readable image \(.*\): replace it or delete the line"
    with raises(message):
        data.check_images([split_of([whole]), split], workers=3)
    assert_batches_raise(split, message)


def test_broken_files_are_counted(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(6)]
    for path in paths:
        path.write_bytes(b"no image")
    smooth(8, 8).save(paths[2])
    message = "list line 1: .*; list line 2: .*; list line 4: .*; and 2 more"
    with raises(message):
        data.check_images([split_of(paths)], workers=2)


def test_the_sample_of_a_large_split_is_spread_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CHECK_ALL_UP_TO", 8)
    monkeypatch.setattr(data, "CHECKED_SAMPLE", 5)
    assert data._to_check(split_of([tmp_path] * 8)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert data._to_check(split_of([tmp_path] * 9)).tolist() == [0, 2, 4, 6, 8]


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
    with raises("list line 1: .* is no readable image"):
        data.check_images([split_of([tmp_path])], workers=1)


def bytes_after_the_end(content: bytes) -> bytes:
    return content + b"\0" * 100


def no_end_chunk(content: bytes) -> bytes:
    return content[:-12]


@pytest.mark.parametrize(
    ("suffix", "change"),
    [("jpg", bytes_after_the_end), ("png", bytes_after_the_end), ("png", no_end_chunk)],
)
def test_files_with_all_their_pixels_pass(
    suffix: str, change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / f"image.{suffix}"
    path.write_bytes(change(encoded(suffix, tmp_path)))
    split = split_of([path])
    data.check_images([split], workers=1)
    assert next(data.evaluation_batches(split, EIGHT, 1, 1))["valid"].all()


# ------------------------------------------------------------------------------------------ devices


def test_batches_are_placed_evenly() -> None:
    mesh = devices.device_mesh(16)
    batch = {
        "image": pixels(16, 2 * 2).reshape(16, 2, 2, 3),
        "label": np.arange(16, dtype=np.int32),
        "valid": np.arange(16) < 13,
    }
    placed = devices.shard_batch(batch, mesh)
    for key, array in batch.items():
        np.testing.assert_array_equal(placed[key], array)
        assert placed[key].dtype == array.dtype
        shards = sorted(placed[key].addressable_shards, key=lambda shard: shard.index[0].start or 0)
        assert [shard.device for shard in shards] == jax.devices()
        for number, shard in enumerate(shards):
            np.testing.assert_array_equal(shard.data, array[2 * number : 2 * number + 2])
    copies = devices.place(batch["label"], mesh).addressable_shards
    assert len(copies) == 8 and all(shard.data.shape == (16,) for shard in copies)


@pytest.mark.parametrize("batch_size", [12, 4, 1])
def test_batches_that_do_not_divide(batch_size: int) -> None:
    with raises(f"--batch-size {batch_size} does not divide among 8 devices: give a multiple"):
        devices.device_mesh(batch_size)


def test_parts_that_do_not_divide() -> None:
    with raises("divide among 8 devices times --accumulate 4: give a multiple of 32"):
        devices.device_mesh(16, accumulate=4)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "expected"),
    [(256, 1, 256), (1024, 1, 512), (256, 4, 64), (8, 1, 8), (8, 4, 8)],
)
def test_evaluation_batches_fit(batch_size: int, accumulate: int, expected: int) -> None:
    """Each of eight devices evaluates as many images as it trains on at once, but at most 64."""
    assert devices.evaluation_batch_size(batch_size, accumulate) == expected


def test_one_process_gathers_its_own_values() -> None:
    """test_resume.py tests several processes."""
    assert processes.gathered({"a": [1, "ü"]}) == [{"a": [1, "ü"]}]
    assert (
        processes.from_main_process(lambda: {"step": 3}) == {"step": 3}
        and devices.is_main_process()
    )


@pytest.mark.usefixtures("small_leaves_are_split")
def test_fetched_arrays_are_copies() -> None:
    """On CPU, a view of a donated array would change."""
    mesh = devices.device_mesh(8)
    given = devices.place(
        {"spread": np.arange(16.0, dtype=np.float32), "copied": np.float32(3)}, mesh, fsdp=True
    )
    assert not given["spread"].sharding.is_fully_replicated
    fetched = devices.fetch(given)
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(given)
    np.testing.assert_array_equal(fetched["spread"], np.arange(16))
    assert fetched["copied"] == 3 and fetched["spread"].flags.owndata


@pytest.mark.parametrize("model", ["ViT-B/32", "ViT-B/16", "ViT-L/14"])
def test_fsdp_splits_the_weights_of_real_models(model: str) -> None:
    """All but small leaves, never along the last axis: each device keeps under a sixth."""
    shapes = jax.eval_shape(lambda: clip.CLIP(clip.PRESETS[model], jax.random.key(0)))
    shardings = devices.shardings(shapes, devices.device_mesh(8), fsdp=True)
    held = 0
    for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True):
        part = sharding.shard_shape(leaf.shape)
        held += math.prod(part)
        assert part[-1:] == leaf.shape[-1:]
        assert (part == leaf.shape) == (leaf.size < 2**20)
    assert held < sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 6
