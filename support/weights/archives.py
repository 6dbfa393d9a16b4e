"""Reads weights by name from safetensors and PyTorch files, without torch.

Nothing in a file is executed. `python train.py --model ViT-B-32.pt` uses it.
"""

import contextlib
import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from support.errors import InputError, read_json

_ADVICE: dict[type[BaseException], str] = {
    FileNotFoundError: "give a file or folder that exists, or a preset such as ViT-B/16",
    zipfile.BadZipFile: "download it again, or, if an old PyTorch saved it, save it again with "
    "torch.save",
    pickle.UnpicklingError: "do not trust it; if the model is your own, save its state_dict()",
}


@contextlib.contextmanager
def refuse_damaged(file: str, advice: str) -> Iterator[None]:
    """Raises InputError, which names the file, for any error of the block that reads it.

    A damaged file may raise anything, and make a library that is written in Rust panic.
    """
    try:
        yield
    except BaseException as error:
        panics = type(error).__name__ == "PanicException"
        if isinstance(error, InputError) or not (isinstance(error, Exception) or panics):
            raise
        reason = f"{type(error).__name__}: {error!s:.200}"
        advice = _ADVICE.get(type(error), advice)
        raise InputError(f"{file} cannot be read ({reason}): {advice}") from error


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a file by name.

    The file is a safetensors file, the JSON index of several, or a PyTorch or TorchScript archive.
    Raises InputError if it cannot be read, or if an archive asks for more than tensors.
    """
    with refuse_damaged(f"weights {path}", "download it again"):
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".json":
            shards = sorted(set(read_json(path)["weight_map"].values()))
            parts = [read_weights(path.with_name(shard)) for shard in shards]
            return {name: array for part in parts for name, array in part.items()}
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if f"/{name}".endswith("/data.pkl")]
            main = min(pickles, key=len, default="data.pkl")
            tensors = _find_tensors(_unpickle(_read_entry(archive, main)))
            folder = f"{main.removesuffix('data.pkl')}data"
            data = {
                key: _read_entry(archive, f"{folder}/{key}")
                for key in {tensor.storage[2] for tensor in tensors.values()}
            }
        return {name: _to_array(tensor, data) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------- PyTorch archives

_STORAGES: dict[str, Any] = {"HalfStorage": "<f2", "FloatStorage": "<f4", "DoubleStorage": "<f8"}
_STORAGES |= {"LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2"}
_STORAGES |= {"CharStorage": "i1", "ByteStorage": "u1", "BoolStorage": "?"}
_STORAGES |= {"BFloat16Storage": jnp.bfloat16}


class _StandIn:
    """Replaces a TorchScript class: holds the attributes that the archive sets."""


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it, unchecked.

    Arrays are made after unpickling: a pickle can call `__setstate__` of any object in it, and that
    of a NumPy dtype changes the dtype for the whole process.
    """

    storage: Any  # ("storage", type, key, device, length)
    offset: Any
    size: Any
    stride: Any


class _Unpickler(pickle.Unpickler):
    """Reads only descriptions of tensors: it refuses any other global by name, and calls none."""

    def find_class(self, module: str, name: str) -> Any:
        # Functions are made afresh: a pickle can set attributes of any object in it.
        known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": lambda *arguments: _Tensor(*arguments[:4]),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            **{f"torch.{storage}": storage for storage in _STORAGES},
        }
        full_name = f"{module}.{name}"
        if full_name in known:
            return known[full_name]
        if module.partition(".")[0] == "__torch__":
            return type(name, (_StandIn,), {})
        raise pickle.UnpicklingError(
            f"its data.pkl asks for {full_name!r}, which weights never need"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns the content of one entry; `ZipFile.read` verifies its checksum."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"its entry {name!r} is compressed")
    return archive.read(name)


def _unpickle(content: bytes) -> Any:
    """Returns the unpickled object, once it is sure to fit into memory.

    The unpickler allocates memory for the highest memo index at once: four wrong bytes can cost
    64 GB. `genops` itself checks all other lengths against the content.
    """
    operations = pickletools.genops(content)
    puts = [index or 0 for operation, index, _ in operations if operation.name.endswith("PUT")]
    if max(puts, default=0) > len(content):
        raise pickle.UnpicklingError(f"its data.pkl has a memo of {max(puts)} objects")
    return _Unpickler(io.BytesIO(content)).load()


def _find_tensors(value: Any, prefix: str = "") -> dict[str, _Tensor]:
    """Returns the tensors in a state dict or in the stand-in of a module, by dotted name."""
    if isinstance(value, _Tensor):
        return {prefix: value}
    found: dict[str, _Tensor] = {}
    children = vars(value) if isinstance(value, _StandIn) else value
    if isinstance(children, dict):
        for name, child in children.items():
            found |= _find_tensors(child, f"{prefix}.{name}" if prefix else str(name))
    return found


def _to_array(tensor: _Tensor, data: Mapping[str, bytes]) -> np.ndarray:
    """Returns the described array: a view of its storage in `data`, never of other memory."""
    (kind, storage, key, _device, length), offset, size, stride = tensor
    dtype = np.dtype(_STORAGES[storage])
    count = math.prod(size)
    last = offset + sum((axis - 1) * step for axis, step in zip(size, stride, strict=True))
    fits = (
        kind == "storage"
        and length * dtype.itemsize <= len(data[key])
        and min((offset, *size, *stride)) >= 0
        and count <= length
        and (last < length or count == 0)
    )
    if not fits:
        raise pickle.UnpicklingError(f"a tensor of shape {size} exceeds its storage {key!r}")
    steps = [step * dtype.itemsize for step in stride]
    return np.ndarray(size, dtype, data[key], offset * dtype.itemsize, steps)
