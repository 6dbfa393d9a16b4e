"""What several test files share: models, trees of images, and the errors expected."""

import dataclasses
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import clip
import data
import eval as evaluation
from support import weights
from support.errors import InputError
from support.run import options
from support.weights.formats import BYTE_SYMBOLS
from tools import seeded

# -------------------------------------------------------------------------------- images and errors


def config_of(sizes: dict[str, int], activation: str = "quick_gelu") -> clip.Config:
    towers = [
        clip.Transformer(
            sizes[f"{kind}_width"],
            sizes[f"{kind}_layers"],
            sizes[f"{kind}_heads"],
            4 * sizes[f"{kind}_width"],
        )
        for kind in ("vision", "text")
    ]
    vocabulary = sizes["vocabulary_size"]
    return clip.Config(
        clip.Preparation(sizes["image_size"]),
        sizes["patch_size"],
        *towers,
        sizes["embedding_size"],
        sizes["context_length"],
        vocabulary,
        vocabulary - 2,
        vocabulary - 1,
        activation,
    )


def seeded_model(name: str, activation: str = "quick_gelu") -> clip.CLIP:
    sizes = seeded.ARCHITECTURES[name]
    state = seeded.hugging_face_weights(sizes, seeded.SEED)
    return clip.from_state_dict(state, config_of(sizes, activation), "hugging_face", "seeded")


def pixels(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Noise with hard edges: every filter tap and every clipping shows."""
    return (
        np.random.default_rng(seed)
        .choice([0, 7, 90, 128, 200, 255], (height, width, channels))
        .astype(np.uint8)
    )


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture as smooth as a photograph."""
    return Image.fromarray(pixels(9, 7, seed=seed)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@contextmanager
def raises(message: str) -> Iterator[None]:
    """Expects an InputError of one line that matches."""
    with pytest.raises(InputError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


def take(batches: Iterator[data.HostBatch], count: int) -> list[data.HostBatch]:
    return list(islice(batches, count))


def assert_batches_raise(split: data.Split, message: str) -> None:
    """From the thread that decodes to whoever asks for batches, in evaluation and in training."""
    for workers in (1, 4):
        with raises(message):
            list(data.evaluation_batches(split, clip.Preparation(8), 2, workers))
        with raises(message):
            take(data.training_batches(split, clip.Preparation(8), 2, 0, workers), len(split))


def refused(call: Callable[[], Any], *words: object) -> None:
    """An InputError of one line that holds `words` and says what to do."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable()
    assert re.search(
        "download|give|put|copy|save|restore|choose|do not trust|did you mean", message
    ), message
    for word in words:
        assert str(word) in message


# --------------------------------------------------------------------------------- a small model

# Widths are multiples of 64, as OpenAI's format asks; the vocabulary is that of `TOKENIZER`.
SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "vision_width": 64,
    "vision_layers": 2,
    "vision_heads": 1,
    "text_width": 128,
    "text_layers": 1,
    "text_heads": 2,
    "context_length": 8,
    "vocabulary_size": 516,
    "embedding_size": 32,
}


CONFIG = config_of(SIZES)


MERGES = [("d", "o"), ("do", "g</w>")]


def vocabulary_of(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    words = [
        *BYTE_SYMBOLS,
        *(f"{symbol}</w>" for symbol in BYTE_SYMBOLS),
        *map("".join, merges),
        clip.START_TEXT,
        clip.END_TEXT,
    ]
    return {word: index for index, word in enumerate(words)}


VOCABULARY = vocabulary_of(MERGES)


TOKENIZER = clip.bpe_tokenizer(VOCABULARY, MERGES)


@functools.cache
def hugging_face_state() -> Mapping[str, np.ndarray]:
    """Seeded weights, with values in them that arithmetic would change."""
    state = seeded.hugging_face_weights(SIZES, seeded.SEED)
    special = np.array(
        [0x80000000, 0x3F800001, 0xBF7FFFFF, 0x00000001], np.uint32
    )  # -0, beside 1 and -1, the least float
    state["text_model.embeddings.token_embedding.weight"][0, :4] = special.view(np.float32)
    return state


@functools.cache
def small_model() -> clip.CLIP:
    return clip.from_state_dict(hugging_face_state(), CONFIG, "hugging_face", "seeded")


@functools.cache
def openai_state() -> Mapping[str, np.ndarray]:
    """In the dtypes of OpenAI's files: float16 except for LayerNorms and embeddings."""
    state = {
        name: np.asarray(array)
        for name, array in clip.to_state_dict(small_model(), "openai").items()
    }
    kept = re.compile(r"ln_|embedding|logit_scale")
    return {
        name: array if kept.search(name) else array.astype(np.float16)
        for name, array in state.items()
    }


def shard(folder: Path) -> None:
    """Splits `model.safetensors` into two shards and an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: names[index % 2] for index, name in enumerate(state)}
    for file in names:
        save_file({name: state[name] for name in state if places[name] == file}, folder / file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---------------------------------------------------------------------------------------- data sets


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """CUB-200-2011's files: three birds, the ids in no order; of each six images, two are for
    testing.
    """
    birds = {1: "001.Black_footed_Albatross", 2: "002.Laysan_Albatross", 3: "003.Chuck_will_Widow"}
    lines = {"images.txt": [], "image_class_labels.txt": [], "train_test_split.txt": []}
    for number, (bird, index) in enumerate(itertools.product(birds, range(6))):
        image = (number * 7) % 18 + 1
        path = f"{birds[bird]}/bird_{image:04}.jpg"
        (tmp_path / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        smooth(24, 18, seed=image).save(tmp_path / "images" / path)
        for name, value in zip(lines, (path, bird, int(index % 3 > 0)), strict=True):
            lines[name].append(f"{image} {value}\n")
    lines["classes.txt"] = [f"{bird} {name}\n" for bird, name in birds.items()]
    for name, content in lines.items():
        (tmp_path / name).write_text("".join(content))
    return tmp_path


def jpeg(seed: int = 0) -> bytes:
    """A real JPEG of 8 x 8 pixels."""
    stream = io.BytesIO()
    smooth(8, 8, seed).save(stream, "JPEG")
    return stream.getvalue()


def plant(root: Path, images: Mapping[str, Sequence[str]]) -> Path:
    """A tree of real JPEGs: file names by folder."""
    for folder, names in images.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            (root / folder / name).write_bytes(jpeg())
    return root


def numbered(count: int) -> list[str]:
    """Names whose order as numbers is another than as strings."""
    return [f"{index}.jpg" for index in range(count)]


ZOO = {"ice_cream": 0, "zebra": 1, "Éléphant d'Asie": 2, "犬": 3}


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Class folders with spaces and other letters: train, val and two shifts, of which one lacks a
    class.
    """
    images = {f"train/{name}": numbered(12) for name in ZOO} | {
        f"val/{name}": numbered(2) for name in ZOO
    }
    images |= {f"sketch/{name}": ["ä b.JPG", "a b.jpeg"] for name in ("zebra", "犬", "ice_cream")}
    images |= {f"a painting/{name}": numbered(3) for name in ZOO}
    plant(tmp_path, images)
    (tmp_path / "train/zebra/notes.txt").write_text("no image")
    (tmp_path / "train/zebra/.hidden.jpg").write_text("no image")
    (tmp_path / "train/.cache").mkdir()
    (tmp_path / "train/README").write_text("no folder")
    return tmp_path


WNIDS = [f"n{1440764 + 37 * number:08}" for number in range(1000)]


BY_ID = {wnid: label for label, wnid in enumerate(WNIDS)}


IN_R, IN_A = (1, 500, 999), (0, 2, 10)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two JPEGs for each class in train, one in val; a few classes of V2 (in folders 0 to 999), R,
    A and Sketch.
    """
    root = tmp_path_factory.mktemp("imagenet")
    images = {f"imagenet/val/{wnid}": [f"{wnid}_1.JPEG"] for wnid in WNIDS}
    images |= {f"imagenet/train/{wnid}": [f"{wnid}_{n}.JPEG" for n in (1, 2)] for wnid in WNIDS}
    images |= {
        f"imagenetv2-matched-frequency-format-val/{number}": ["a.jpeg"]
        for number in (0, 2, 10, 100, 999)
    }
    images |= {f"imagenet-r/{WNIDS[label]}": numbered(3) for label in IN_R}
    images |= {f"imagenet-a/{WNIDS[label]}": numbered(2) for label in IN_A}
    images |= {f"sketch/{WNIDS[label]}": numbered(11) for label in (3, 7)}
    return plant(root, images)


@pytest.fixture
def imagenet(planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be changed: a root of links to the folders."""
    root = tmp_path / "root"
    (root / "imagenet").mkdir(parents=True)
    for path in (*planted.iterdir(), *(planted / "imagenet").iterdir()):
        if path.name != "imagenet":
            (root / path.relative_to(planted)).symlink_to(path)
    return root


# ------------------------------------------------------------------------ a run from start to table

CLASSES = ("ice_cream", "dog", "guitar")


def save_model(folder: Path, **sizes: int) -> Path:
    """A random CLIP whose tokenizer knows bytes alone."""
    vocabulary = vocabulary_of([])
    tokenizer = clip.bpe_tokenizer(vocabulary, [])
    sizes |= {"context_length": 40, "vocabulary_size": len(vocabulary)}
    state = seeded.hugging_face_weights(sizes, seeded.SEED)
    weights.save(
        folder, clip.from_state_dict(state, config_of(sizes), "hugging_face", "seeded"), tokenizer
    )
    return folder


def draw_images(folder: Path) -> Path:
    """DomainNet's layout: two domains, three classes that differ in colour."""
    random = np.random.default_rng(0)
    for domain in ("real", "sketch"):
        for split, number in (("train", 10), ("test", 4)):
            lines = []
            for label, name in enumerate(CLASSES):
                (folder / domain / name).mkdir(parents=True, exist_ok=True)
                for index in range(number):
                    pixels = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
                    pixels[..., label] += 120
                    path = f"{domain}/{name}/{split}{index}.png"
                    Image.fromarray(pixels).save(folder / path)
                    lines.append(f"{path} {label}\n")
            (folder / f"{domain}_{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("model"), **seeded.ARCHITECTURES["tiny"] | {"image_size": 16}
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_images(tmp_path_factory.mktemp("data"))


def changed(command: options.Command, **changes: Any) -> options.Command:
    """The command with other values of some options, in whichever group each stands.

    A tuple of several values of an option of `options.SWEPT` makes a sweep.
    """
    for name, value in changes.items():
        if name in vars(command):
            command = dataclasses.replace(command, **{name: value})
            continue
        if name in options.SWEPT and isinstance(value, tuple):
            command = dataclasses.replace(command, sweep=command.sweep | {name: value})
            value = value[0]
        groups = ("sources", "settings", "execution", "cluster")
        group = next(group for group in groups if name in vars(getattr(command, group)))
        values = dataclasses.replace(getattr(command, group), **{name: value})
        command = dataclasses.replace(command, **{group: values})
    return command


def given(*folders: Path) -> evaluation.Runs:
    """The runs of a command of eval.py."""
    return evaluation.Runs(folders)


def tiny_command(model: Path, root: Path, out: Path) -> options.Command:
    return changed(
        options.DEFAULTS["domainnet"],
        model=str(model),
        data_root=root,
        templates="a photo of a {}.",
        reference="real",
        steps=6,
        batch_size=8,
        learning_rate=1e-3,
        num_texts=4,
        text_length=3,
        eval_every=2,
        checkpoint_every=100,
        workers=1,
        out=out,
    )


@pytest.fixture
def command(model: Path, root: Path, tmp_path: Path) -> options.Command:
    return tiny_command(model, root, tmp_path / "runs")
