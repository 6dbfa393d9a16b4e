"""What several test files share: models, trees of images, archives written by hand, and the errors expected."""

import dataclasses
import functools
import gzip
import io
import itertools
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

import clip
import data
import eval as evaluation
from support import weights
from support.errors import InputError
from support.run import options
from support.run import setup as opening
from tools import seeded

# ------------------------------------------------------------------------------------------------ images and errors


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
        sizes["image_size"],
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
            list(data.evaluation_batches(split, 8, 2, workers))
        with raises(message):
            take(data.training_batches(split, 8, 2, 0, workers), len(split))


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


# ------------------------------------------------------------------------------------------------- archives by hand

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


SYMBOLS = weights.byte_symbols()


def vocabulary_of(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    words = [
        *SYMBOLS,
        *(f"{symbol}</w>" for symbol in SYMBOLS),
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


class Global(NamedTuple):
    name: str  # "module name"


class Call(NamedTuple):
    function: Global
    arguments: tuple


class Build(NamedTuple):
    target: Any
    state: Any


class New(NamedTuple):
    kind: Global


class Stored(NamedTuple):
    """A storage: its place under `data/` and what the archive says of it."""

    key: str
    type: str
    length: int
    device: str = "cpu"


def pickled(value: Any) -> bytes:
    """Protocol 2 opcodes, as PyTorch writes them. A pickler would import what it names."""
    match value:
        case Global(name):
            return pickle.GLOBAL + "{}\n{}\n".format(*name.split()).encode()
        case Call(function, arguments):
            return pickled(function) + pickled(arguments) + pickle.REDUCE
        case Build(target, state):
            return pickled(target) + pickled(state) + pickle.BUILD
        case New(kind):
            return pickled(kind) + pickle.EMPTY_TUPLE + pickle.NEWOBJ
        case Stored(key, kind, length, device):
            return (
                pickled(("storage", Global(f"torch {kind}"), key, device, length))
                + pickle.BINPERSID
            )
        case dict():
            items = b"".join(pickled(key) + pickled(child) for key, child in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
        case tuple():
            return pickle.MARK + b"".join(map(pickled, value)) + pickle.TUPLE
        case str():
            return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
        case _:  # numbers, booleans, None
            return pickle.dumps(value, 2).removeprefix(b"\x80\x02").removesuffix(pickle.STOP)


STORAGE_TYPES = {
    "f2": "HalfStorage",
    "f4": "FloatStorage",
    "f8": "DoubleStorage",
    "i8": "LongStorage",
}


def rebuilt(stored: Any, offset: Any, size: Any, stride: Any) -> Call:
    hooks = Call(Global("collections OrderedDict"), ())
    return Call(
        Global("torch._utils _rebuild_tensor_v2"), (stored, offset, size, stride, False, hooks)
    )


def described(key: str, array: np.ndarray, device: str = "cpu") -> Call:
    """A whole contiguous array as the tensor on storage `key`."""
    stored = Stored(key, STORAGE_TYPES[array.dtype.str[1:]], array.size, device)
    return rebuilt(stored, 0, array.shape, tuple(step // array.itemsize for step in array.strides))


def module(tensors: Mapping[str, Any]) -> Build:
    """A TorchScript module with `tensors` at their dotted names, and what such a module holds besides."""
    children: dict[str, Any] = {"training": True, "_is_full_backward_hook": None, "cast": 1.5}
    nested: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        first, _, rest = name.partition(".")
        if rest:
            nested.setdefault(first, {})[rest] = tensor
        else:
            children[name] = tensor
    children |= {name: module(inner) for name, inner in nested.items()}
    return Build(New(Global("__torch__.multimodal.___torch_mangle_9591 Multimodal")), children)


def state_dict(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return dict(tensors)


def entries(tree: Any, storages: Mapping[str, bytes], prefix: str = "archive/") -> dict[str, bytes]:
    """The files of an archive, with those beside the weights that PyTorch writes."""
    content = pickle.PROTO + b"\x02" + pickled(tree) + pickle.STOP
    return {f"{prefix}data/{key}": storage for key, storage in storages.items()} | {
        f"{prefix}version": b"3\n",
        f"{prefix}byteorder": b"little",
        f"{prefix}data.pkl": content,
        f"{prefix}constants.pkl": b"\x80\x02).",
        f"{prefix}code/__torch__.py": b"class Multimodal(Module): ...",
        f"{prefix}code/__torch__.py.debug_pkl": b"not read",
        f"{prefix}code/data.pkl.debug_pkl": b"not read",
    }


def write(path: Path, files: Mapping[str, bytes], compressed: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(
                name, content, zipfile.ZIP_DEFLATED if name == compressed else zipfile.ZIP_STORED
            )
    return path


def archive(
    state: Mapping[str, np.ndarray],
    tree: Callable = state_dict,
    prefix: str = "archive/",
    device: str = "cpu",
) -> dict[str, bytes]:
    """An archive of `state`, each array on its own storage."""
    tensors = {
        name: described(str(key), array, device) for key, (name, array) in enumerate(state.items())
    }
    storages = {str(key): array.tobytes() for key, array in enumerate(state.values())}
    return entries(tree(tensors), storages, prefix)


def vocabulary_file(folder: Path) -> None:
    """As many merges as OpenAI's file holds, made up."""
    merges = [f"{one} {other}" for one in SYMBOLS for other in SYMBOLS][: 49152 - 256 - 2]
    (folder / weights.VOCABULARY_FILE).write_bytes(
        gzip.compress("\n".join(["header", *merges]).encode(), 1)
    )


# ---------------------------------------------------------------------------------------------------- data sets


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """CUB-200-2011's files: three birds, the ids in no order; of each six images, two are for testing."""
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
    """Class folders with spaces and other letters: train, val and two shifts, of which one lacks a class."""
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
    """A JPEG for each class in train and val; a few classes of V2 (in folders 0 to 999), R, A and Sketch."""
    root = tmp_path_factory.mktemp("imagenet")
    images = {
        f"imagenet/{part}/{wnid}": [f"{wnid}_1.JPEG"] for part in ("train", "val") for wnid in WNIDS
    }
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


# -------------------------------------------------------------------------------------------- a run from start to table

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
