"""Writes PyTorch archives, well-formed and not, and OpenAI's vocabulary file, without torch."""

import gzip
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from support.weights.formats import BYTE_SYMBOLS, VOCABULARY_FILE


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
    """A TorchScript module with `tensors` at their dotted names, and what it holds besides."""
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
    merges = [f"{one} {other}" for one in BYTE_SYMBOLS for other in BYTE_SYMBOLS][: 49152 - 256 - 2]
    (folder / VOCABULARY_FILE).write_bytes(
        gzip.compress("\n".join(["header", *merges]).encode(), 1)
    )
