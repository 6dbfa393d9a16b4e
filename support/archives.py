"""Weights from files, by name: PyTorch's archives, read without torch and without executing anything, and safetensors.

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
    """Takes the place of a TorchScript class: holds what the archive sets on it and does nothing."""


class _Tensor(NamedTuple):
    """A tensor as the pickle describes it, not checked. Arrays are made once the pickle has been read: it could call
    `__setstate__` of whatever it holds, and that of a NumPy dtype changes the dtype for the whole process."""

    storage: Any  # ("storage", type, key, device, length)
    offset: Any
    size: Any
    stride: Any


class _Unpickler(pickle.Unpickler):
    """Reads descriptions of tensors and nothing else: any other global is refused by name, never called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, size, stride)
        if module == "torch" and name in _STORAGES:
            return name
        if module.partition(".")[0] == "__torch__":
            return type(name, (_StandIn,), {})
        wanted = f"{module}.{name}"
        raise InputError(
            f"its data.pkl asks for {wanted!r}, which no weights need: do not trust this file; of a model of your own, "
            "save the state_dict()"
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    """One entry, its checksum verified."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise InputError(f"its entry {name!r} is compressed: save it again with torch.save")
    return archive.read(entry)


def _unpickle(content: bytes) -> Any:
    # The unpickler makes room for the highest memo index at once: four wrong bytes may cost 64 GB. Other lengths are
    # checked against the content by genops itself.
    highest = max((index for opcode, index, _ in pickletools.genops(content) if opcode.name.endswith("PUT")), default=0)
    if highest > len(content):
        raise InputError(f"its data.pkl has a memo of {highest} objects: download the file again")
    return _Unpickler(io.BytesIO(content)).load()


def _to_array(tensor: _Tensor, data: Mapping[str, bytes]) -> np.ndarray:
    """The array that `tensor` describes, a view of its storage in `data` and never of other memory."""
    (kind, storage, key, _device, length), offset, size, stride = tensor
    if kind != "storage" or storage not in _STORAGES:
        raise InputError(f"its data.pkl refers to {tensor.storage!r}, which is no storage: download the file again")
    dtype = np.dtype(_STORAGES[storage])
    if length * dtype.itemsize > len(data[key]):
        raise InputError(f"its storage {key!r} is shorter than {length} numbers: download the file again")
    last = offset + sum((axis - 1) * step for axis, step in zip(size, stride, strict=True))
    count = math.prod(size)
    if min((offset, *size, *stride)) < 0 or (count and last >= length) or count > length:
        raise InputError(f"a tensor of shape {size} reaches outside its storage: download the file again")
    return np.ndarray(size, dtype, data[key], offset * dtype.itemsize, [step * dtype.itemsize for step in stride])


def _tensors(value: Any, prefix: str = "") -> dict[str, _Tensor]:
    """Every tensor under a module stand-in or a state dict, by its dotted name."""
    if isinstance(value, _Tensor):
        return {prefix: value}
    children = vars(value) if isinstance(value, _StandIn) else value if isinstance(value, dict) else {}
    found: dict[str, _Tensor] = {}
    for name, child in children.items():
        found |= _tensors(child, f"{prefix}.{name}" if prefix else str(name))
    return found


def read_torch_archive(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a PyTorch or TorchScript archive by name, read without torch and without executing anything in it.

    Raises InputError, naming the file, for whatever is not such an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
            if not pickles:
                raise InputError("it is a zip file without a data.pkl: give one that PyTorch saved")
            name = min(pickles, key=len)
            tensors = _tensors(_unpickle(_read_entry(archive, name)))
            folder = f"{name.removesuffix('data.pkl')}data"
            data = {key: _read_entry(archive, f"{folder}/{key}") for key in {t.storage[2] for t in tensors.values()}}
        return {name: _to_array(tensor, data) for name, tensor in tensors.items()}
    except FileNotFoundError as error:
        raise InputError(
            f"weights {path} do not exist: give a .pt file, a Hugging Face folder or one of {', '.join(PRESETS)}"
        ) from error
    except InputError as error:
        raise InputError(f"weights {path} are refused: {error}") from error
    except zipfile.BadZipFile as error:
        raise InputError(
            f"weights {path} are not a whole zip archive ({error}): download the file again, or, if it was saved by an "
            "old PyTorch, save it again with torch.save"
        ) from error
    except Exception as error:  # a malformed pickle may raise anything
        raise InputError(f"weights {path} are damaged ({error!r}): download them again") from error


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of one safetensors file. Raises InputError, naming the file, where it cannot be read."""
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise InputError(f"weights {path} do not exist: put the model's safetensors file there") from error
    except Exception as error:  # AttributeError for a dtype that NumPy lacks, such as F8_E4M3
        raise InputError(f"weights {path} cannot be read ({error!r}): download them again") from error
