"""The reader of PyTorch archives: views, wrong and hostile files, and any bytes changed."""

import functools
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from archives_by_hand import (
    Build,
    Call,
    Global,
    New,
    Stored,
    archive,
    described,
    entries,
    module,
    pickled,
    rebuilt,
    state_dict,
    write,
)
from conftest import EXAMPLES
from helpers import CONFIG, openai_state, refused
from mutations import check_mutations

import clip
from support.weights import formats
from support.weights.archives import read_weights


def read(path: Path) -> clip.CLIP:
    """Reads one of OpenAI's files as `load` does, without the tokenizer."""
    state = read_weights(path)
    config = formats.openai_config(state, str(path))
    return clip.from_state_dict(state, config, "openai", str(path))


@pytest.mark.parametrize("tree", [state_dict, module])
@pytest.mark.parametrize("prefix", ["archive/", "x/y/", ""])
def test_archive(tree: Callable, prefix: str, tmp_path: Path) -> None:
    """Both kinds, saved on a GPU in mixed precision, with the integers in OpenAI's files."""
    integers = {name: np.array(8) for name in ("input_resolution", "context_length", "vocab_size")}
    files = archive(openai_state() | integers, tree, prefix, "cuda:0")
    actual = read(write(tmp_path / "clip.pt", files))
    assert actual.config == CONFIG
    for name, array in clip.to_state_dict(actual, "openai").items():
        expected = openai_state()[name].astype(np.float32)
        assert np.asarray(array).tobytes() == expected.tobytes(), name


def test_strides_and_offsets(tmp_path: Path) -> None:
    """Views of storages that tensors share have the right values, in every float dtype."""
    numbers = np.arange(24, dtype=np.float32)
    single, brain = Stored("0", "FloatStorage", 24), Stored("1", "BFloat16Storage", 24)
    scalar = rebuilt(single, 7, (), ())
    tensors = {
        "whole": (rebuilt(single, 0, (2, 3, 4), (12, 4, 1)), numbers.reshape(2, 3, 4)),
        "part": (rebuilt(single, 5, (2, 3), (6, 2)), np.array([[5, 7, 9], [11, 13, 15]])),
        "transposed": (rebuilt(single, 0, (4, 6), (1, 4)), numbers.reshape(6, 4).T),
        "permuted": (
            rebuilt(single, 0, (4, 2, 3), (1, 12, 4)),
            numbers.reshape(2, 3, 4).transpose(2, 0, 1),
        ),
        "scalar": (scalar, np.array(7)),
        "repeated": (rebuilt(single, 3, (5,), (0,)), np.full(5, 3)),
        "empty": (rebuilt(single, 0, (0, 4), (4, 1)), np.zeros((0, 4))),
        "brain": (rebuilt(brain, 4, (4, 5), (1, 4)), numbers[4:].reshape(5, 4).T),
        "half": (described("2", numbers.astype(np.float16)), numbers),
        "double": (described("3", numbers.astype(np.float64)), numbers),
        "parameter": (Call(Global("torch._utils _rebuild_parameter"), (scalar,)), np.array(7)),
    }
    dtypes = (np.float32, jnp.bfloat16, np.float16, np.float64)
    storages = {str(key): numbers.astype(dtype).tobytes() for key, dtype in enumerate(dtypes)}
    tree = {name: tensor for name, (tensor, _) in tensors.items()}
    tree["not a tensor"] = Build(Call(Global("collections OrderedDict"), ()), {"_metadata": 1})
    found = read_weights(write(tmp_path / "a.pt", entries(tree, storages)))
    assert found.keys() == tensors.keys()
    for name, (_, expected) in tensors.items():
        assert found[name].shape == expected.shape
        np.testing.assert_array_equal(found[name].astype(np.float32), expected, err_msg=name)


# -------------------------------------------------------------------------------- archives refused

FLOATS = Stored("0", "FloatStorage", 6)


def holding(tensor: Any) -> dict[str, bytes]:
    """Returns an archive of one tensor, whose storage 0 contains 6 float32 numbers."""
    return entries({"a": tensor}, {"0": np.arange(6, dtype=np.float32).tobytes()})


def holding_view(offset: Any, size: Any, stride: Any, stored: Any = FLOATS) -> dict[str, bytes]:
    """Returns an archive of one view of a storage."""
    return holding(rebuilt(stored, offset, size, stride))


def pickle_of(opcodes: bytes) -> dict[str, bytes]:
    return {"archive/data.pkl": pickle.PROTO + b"\x02" + opcodes}


def without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {other: content for other, content in files.items() if other != name}


PKL, DATA = "archive/data.pkl", "archive/data/0"
INTACT = holding_view(0, (2, 3), (3, 1))
EXCEEDS = "exceeds its storage '0'"
ARCHIVES: list[tuple[dict[str, bytes], str]] = [
    ({"a/readme.txt": b"hello"}, "There is no item named 'data.pkl'"),
    (without(INTACT, PKL), "There is no item named 'data.pkl'"),
    (without(INTACT, DATA), f"There is no item named '{DATA}'"),
    (INTACT | {PKL: b""}, "pickle exhausted before seeing STOP"),
    (INTACT | {DATA: b""}, EXCEEDS),
    # Views that are not inside their storage
    (holding_view(0, (2, 3), (4, 1)), EXCEEDS),
    (holding_view(1, (2, 3), (3, 1)), EXCEEDS),
    (holding_view(2**62, (2,), (1,)), EXCEEDS),
    (holding_view(0, (7,), (1,)), EXCEEDS),
    (holding_view(0, (2**62, 4), (4, 1)), EXCEEDS),
    (holding_view(0, (-2, 3), (3, 1)), EXCEEDS),
    (holding_view(0, (-2, -3), (3, 1)), EXCEEDS),
    (holding_view(5, (6,), (-1,)), EXCEEDS),
    (holding_view(-1, (2,), (1,)), EXCEEDS),
    (holding_view(0, (10**12,), (0,)), EXCEEDS),
    (holding_view(0, (2, 3), (1,)), "ValueError"),
    (holding_view(0, (2.0, 3), (3, 1)), "TypeError"),
    (holding_view(0, "23", "31"), "TypeError"),
    # Storages that are not what the pickle says
    (holding_view(0, (2, 3), (3, 1), Stored("0", "FloatStorage", 7)), EXCEEDS),
    (holding_view(0, (2,), (1,), Stored("0", "DoubleStorage", 6)), EXCEEDS),
    (holding_view(0, (2,), (1,), Stored("0", "FloatStorage", -1)), EXCEEDS),
    (holding_view(0, (2, 3), (3, 1), Stored("0", "FloatStorage", 5)), EXCEEDS),
    (holding_view(0, (6,), (1,), ("tensor", "FloatStorage", "0", "cpu", 6)), EXCEEDS),
    (holding_view(0, (6,), (1,), ("storage", "FloatStorage")), "IndexError"),
    (holding_view(0, (6,), (1,), ("storage", "os", "0", "cpu", 6)), "KeyError: 'os'"),
    (holding_view(0, (6,), (1,), Stored("1", "FloatStorage", 6)), "There is no item named"),
    (holding_view(0, (1,), (1,), Stored("../version", "ByteStorage", 1)), "There is no item named"),
    # Calls that no archive of weights makes
    (holding(Call(Global("torch._utils _rebuild_tensor_v2"), (FLOATS, 0))), "TypeError"),
    (holding(Call(Global("torch FloatStorage"), (6,))), "TypeError"),
    (holding(Call(Global("__torch__.os system"), ("true",))), "TypeError"),
    # Pickles that would fill the memory, or end early
    (pickle_of(b"}" + pickle.LONG_BINPUT + b"\xff\xff\xff\x7f."), "memo of 2147483647 objects"),
    (pickle_of(b"}" + pickle.PUT + b"99999999999\n."), "has a memo of 99999999999 objects"),
    (pickle_of(pickle.BYTEARRAY8 + struct.pack("<Q", 2**36)), "ValueError"),
    (pickle_of(pickle.BINUNICODE8 + struct.pack("<Q", 2**62)), "ValueError"),
    (pickle_of(pickle.LONG4 + b"\xff\xff\xff\x7f"), "ValueError"),
    (pickle_of(pickle.GLOBAL + b"torch\n\xff\n"), "UnicodeDecodeError"),
    (pickle_of(pickle.EMPTY_DICT), "ValueError"),
    (pickle_of(pickle.PROTO + b"\x09}."), "unsupported pickle protocol: 9"),
    (pickle_of(b"}q\x00X\x01\x00\x00\x00ah\x00s."), "RecursionError"),  # it contains itself
]


@pytest.mark.parametrize(("files", "outcome"), ARCHIVES)
def test_archive_is_refused(files: dict[str, bytes], outcome: str, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", files)
    refused(lambda: read_weights(path), f"weights {path} cannot be read (", outcome)


NO_ZIP = "BadZipFile: File is not a zip file): download it again, or, if an old PyTorch saved it"
DAMAGES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda content: b"", NO_ZIP),
    (lambda content: content[: len(content) // 2], NO_ZIP),
    (lambda content: content[:-1], NO_ZIP),
    (lambda content: pickle.dumps({"a": 1}, 2), NO_ZIP),
    (lambda content: content.replace(b"torch._utils", b"torch._evils"), "Bad CRC-32 for file"),
]


@pytest.mark.parametrize(("damage", "outcome"), DAMAGES)
def test_damaged_archive(damage: Callable[[bytes], bytes], outcome: str, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.pt", INTACT)
    path.write_bytes(damage(path.read_bytes()))
    refused(lambda: read_weights(path), f"weights {path} cannot be read (", outcome)


@pytest.mark.parametrize("entry", [PKL, DATA])
def test_compressed_entry(entry: str, tmp_path: Path) -> None:
    """A small file may contain gigabytes."""
    path = write(tmp_path / "clip.pt", INTACT, entry)
    refused(lambda: read_weights(path), path, f"its entry '{entry}' is compressed")


FORBIDDEN = [
    *("os system", "posix system", "builtins eval", "builtins getattr", "__builtin__ eval"),
    *("torch load", "torch.storage _load_from_bytes", "torch._utils _rebuild_tensor"),
    *("torch.jit._pickle build_intlist", "numpy.core.multiarray _reconstruct", "numpy dtype"),
    *("copyreg _reconstructor", "collections OrderedDict.__init__", "__torch__evil system"),
]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_forbidden_global_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """Wherever it stands: in a call, as the class of a module, as a value."""
    asked = f"its data.pkl asks for {name.replace(' ', '.')!r}, which weights never need"
    path = tmp_path / "clip.pt"
    for tree in (Call(Global(name), ("",)), Build(New(Global(name)), {}), Global(name)):
        write(path, holding(tree))
        refused(lambda: read_weights(path), path, asked, "do not trust it", "its state_dict()")


@pytest.mark.parametrize(
    ("name", "code"), [("os system", "touch {}"), ("builtins eval", "open('{}', 'w').close()")]
)
def test_nothing_is_executed(name: str, code: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    payload = Call(Global(name), (code.format(trace),))
    path = write(tmp_path / "clip.pt", holding(payload))
    refused(lambda: read_weights(path), path)
    assert not trace.exists()
    pickle.loads(pickled(payload) + pickle.STOP)  # without the checks, the payload is executed
    assert trace.exists()


def test_archive_cannot_change_a_dtype(tmp_path: Path) -> None:
    """NumPy's bfloat16 is one object per process, and BUILD would call its `__setstate__`."""
    swapped = Build(Global("torch BFloat16Storage"), (3, ">", None, None, None, -1, -1, 0))
    path = write(tmp_path / "clip.pt", holding(swapped))
    refused(lambda: read_weights(path), path)
    assert np.dtype(jnp.bfloat16).byteorder == "="


def test_archive_cannot_change_the_reader(tmp_path: Path) -> None:
    """BUILD sets attributes of a function, but of one that no other archive gets."""
    function = Global("torch._utils _rebuild_parameter")
    changed = holding(Build(function, (None, {"__defaults__": (3,)})))
    assert read_weights(write(tmp_path / "clip.pt", changed)) == {}
    path = write(tmp_path / "clip.pt", holding(Call(function, ())))
    refused(lambda: read_weights(path), path, "TypeError")


# --------------------------------------------------------------------------------- corrupted bytes


@functools.cache
def packed() -> Mapping[str, bytes]:
    """Returns a small archive: its tensors share one storage."""
    state = openai_state()
    stored = Stored("0", "HalfStorage", max(array.size for array in state.values()))
    tensors = {
        name: rebuilt(stored, 0, array.shape, [step // array.itemsize for step in array.strides])
        for name, array in state.items()
    }
    numbers = np.linspace(-1, 1, stored.length, dtype=np.float16)
    return entries(module(tensors), {"0": numbers.tobytes()})


@EXAMPLES
def test_any_bytes_in_a_pickle(examples: int, tmp_path: Path) -> None:
    (tmp_path / "data.pkl").write_bytes(packed()[PKL])

    def read_archive() -> clip.CLIP:
        content = (tmp_path / "data.pkl").read_bytes()
        return read(write(tmp_path / "clip.pt", {**packed(), PKL: content}))

    check_mutations(examples, tmp_path / "data.pkl", read_archive)


@EXAMPLES
def test_any_bytes_in_a_zip(examples: int, tmp_path: Path) -> None:
    """Checksums protect the contents: a file that is not refused has the original values."""
    path = write(tmp_path / "clip.pt", packed())
    original = {name: array.tobytes() for name, array in read_weights(path).items()}
    with zipfile.ZipFile(path) as file:
        places = [*range(file.start_dir, path.stat().st_size)]
        for entry in file.infolist():
            places += range(entry.header_offset, entry.header_offset + 30 + len(entry.filename))

    def check(tensors: dict[str, np.ndarray]) -> None:
        assert {name: array.tobytes() for name, array in tensors.items()} == original

    check_mutations(examples, path, lambda: read_weights(path), check, places)
