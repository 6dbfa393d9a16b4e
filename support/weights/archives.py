"""Reads weights by name from safetensors and PyTorch archives, without torch and without executing anything in a file.

`python train.py --model ViT-B-32.pt` uses it.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from clip import PRESETS
from support.errors import InputError

_STORAGES = {
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
    "BFloat16Storage": jnp.bfloat16,
}


class _StandIn:
    """Replaces a TorchScript class: holds the attributes that the archive sets, and does nothing."""


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it, unchecked. Arrays are made after unpickling: a pickle can call
    `__setstate__` of any object in it, and that of a NumPy dtype changes the dtype for the whole process."""

    storage: Any  # ("storage", type, key, device, length)
    offset: Any
    size: Any
    stride: Any


class _Unpickler(pickle.Unpickler):
    """Reads only descriptions of tensors: it refuses any other global by name, and never calls it."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, size, stride)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in _STORAGES:
            return name
        if module.partition(".")[0] == "__torch__":
            return type(name, (_StandIn,), {})
        raise InputError(
            f"its data.pkl asks for '{module}.{name}', which weights never need: do not trust this file; if the model "
            "is your own, save its state_dict()"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """Returns the content of one entry; `ZipFile.read` verifies its checksum."""
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise InputError(f"its entry {name!r} is compressed: save it again with torch.save")
    return archive.read(name)


def _unpickle(content: bytes) -> Any:
    # The unpickler allocates memory for the highest memo index at once: four wrong bytes can cost 64 GB. genops itself
    # checks all other lengths against the content.
    puts = (
        index for opcode, index, _ in pickletools.genops(content) if opcode.name.endswith("PUT")
    )
    highest = max((index or 0 for index in puts), default=0)
    if highest > len(content):
        raise InputError(f"its data.pkl has a memo of {highest} objects: download the file again")
    return _Unpickler(io.BytesIO(content)).load()


def _to_array(tensor: _Tensor, data: Mapping[str, bytes]) -> np.ndarray:
    """Returns the described array: a view of its storage in `data`, never of other memory."""
    (kind, storage, key, _device, length), offset, size, stride = tensor
    if kind != "storage" or storage not in _STORAGES:
        raise InputError(
            f"its data.pkl refers to {tensor.storage!r}, which is no storage: download the file again"
        )
    dtype = np.dtype(_STORAGES[storage])
    if length * dtype.itemsize > len(data[key]):
        raise InputError(
            f"its storage {key!r} has fewer than {length} numbers: download the file again"
        )
    last = offset + sum((axis - 1) * step for axis, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if min((offset, *size, *stride)) < 0 or (count and last >= length) or count > length:
        raise InputError(f"a tensor of shape {size} exceeds its storage: download the file again")
    return np.ndarray(
        size, dtype, data[key], offset * dtype.itemsize, [step * dtype.itemsize for step in stride]
    )


def _tensors(value: Any, prefix: str = "") -> dict[str, _Tensor]:
    """Returns the tensors in a state dict or in the stand-in of a module, by dotted name."""
    if isinstance(value, _Tensor):
        return {prefix: value}
    children = (
        vars(value) if isinstance(value, _StandIn) else value if isinstance(value, dict) else {}
    )
    found: dict[str, _Tensor] = {}
    for name, child in children.items():
        found |= _tensors(child, f"{prefix}.{name}" if prefix else str(name))
    return found


def read_torch_archive(path: Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a PyTorch or TorchScript archive by name. Raises InputError if the file is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = (name for name in archive.namelist() if f"/{name}".endswith("/data.pkl"))
            if not (name := min(pickles, key=len, default="")):
                raise InputError("it is a zip file without a data.pkl: give one that PyTorch saved")
            tensors = _tensors(_unpickle(_read_entry(archive, name)))
            folder = f"{name.removesuffix('data.pkl')}data"
            data = {
                key: _read_entry(archive, f"{folder}/{key}")
                for key in {t.storage[2] for t in tensors.values()}
            }
        return {name: _to_array(tensor, data) for name, tensor in tensors.items()}
    except FileNotFoundError as error:
        advice = f"give a .pt file, a Hugging Face folder or one of {', '.join(PRESETS)}"
        raise InputError(f"weights {path} do not exist: {advice}") from error
    except InputError as error:
        raise InputError(f"weights {path} are refused: {error}") from error
    except zipfile.BadZipFile as error:
        advice = (
            "download them again, or, if an old PyTorch saved them, save them again with torch.save"
        )
        raise InputError(
            f"weights {path} are not a complete zip archive ({error}): {advice}"
        ) from error
    except Exception as error:  # a malformed pickle may raise anything
        raise InputError(f"weights {path} are damaged ({error!r}): download them again") from error


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Returns all tensors of a safetensors file by name. Raises InputError if the file cannot be read."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise InputError(
            f"weights {path} do not exist: put the model's safetensors file there"
        ) from error
    except Exception as error:  # AttributeError for a dtype that NumPy lacks, such as F8_E4M3
        raise InputError(
            f"weights {path} cannot be read ({error!r}): download them again"
        ) from error
