"""Files that runs write: each is whole on the disk at any moment, in its old or its new version. And checkpoints.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py` writes them, and `--resume` reads them.

A checkpoint is a safetensors file, `step-N.safetensors`. It contains every array of the state by name; its metadata
contains how far the run has come, and a digest of all.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from clip import leaf_name, named_leaves
from support.errors import InputError

# -------------------------------------------------------------------------------------------------- files and folders


def cache_folder() -> Path:
    """The folder of what is drawn and compiled once: `LIPSUM_CACHE`, else `lipsum` in the user's cache folder."""
    if folder := os.environ.get("LIPSUM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lipsum"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Replaces a file, or a folder of files, by what `write` makes at the path that it is given.

    The new version is synced to the disk before it is renamed. Raises InputError if the disk refuses it; the old one
    then stays.
    """
    new = path.with_name(f"{path.name}.new")
    with reported(path):
        try:
            delete(new)
            write(new)
            for made in [*sorted(new.iterdir()), new] if new.is_dir() else [new]:
                _sync(made)
            if path.is_dir():
                shutil.rmtree(path)  # a folder cannot be renamed onto a full one
            os.replace(new, path)
            _sync(path.parent)
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                delete(new)  # it may fill the disk
            raise


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file. Raises InputError like `write_whole`."""
    write_whole(path, lambda new: new.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def delete(path: Path) -> None:
    """Deletes a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def reported(path: Path) -> Iterator[None]:
    """Raises InputError, which names the path, if the disk refuses what the block writes."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} cannot be written ({reason}): make room or give another place; what was saved before is whole"
        ) from error


def _sync(path: Path) -> None:
    """Flushes to the disk. Otherwise a power cut may leave an empty file under a new name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path, waiting: str = "") -> Iterator[None]:
    """Locks a file or folder against other processes until the block, or this process, ends. Leaves no lock behind.

    If another process holds the lock, prints `waiting` and waits. Without that text, raises InputError. Raises it also
    if nothing can be written there.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    made = [parent for parent in path.parents if not parent.exists()]
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            if not waiting:
                message = f"another process writes to {path}: wait until it ends, or give another --out"
                raise InputError(message) from error
            print(waiting, file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # folders that are no longer empty stay
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            for parent in made:
                parent.rmdir()


# --------------------------------------------------------------------------------------------------------- checkpoints

_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    """How far a run has come, as JSON, and its arrays by name."""

    progress: Any  # as it was saved
    arrays: dict[str, np.ndarray]


class Checkpoints:
    """A run's two newest checkpoints, written by a thread while training goes on.

    Methods raise the InputError of a write that failed. Leaving the block waits for the last write. Without `writes`,
    `save` does nothing.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder = folder
        self.writes = writes
        self._kept: list[Path] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._writer.shutdown()
        if kind is None:
            self.wait()

    def newest(self) -> Checkpoint | None:
        """Returns the newest intact checkpoint, or None if there is none at all. Names damaged ones on stderr.

        Raises InputError if all are damaged.
        """
        steps = {path: found for path in self.folder.glob("*") if (found := _NAME.fullmatch(path.name))}
        for path in sorted(steps, key=lambda path: int(steps[path][1]), reverse=True):
            try:
                checkpoint = read_checkpoint(path)
            except Exception as error:  # a damaged file may raise anything
                print(f"checkpoint {path} is damaged ({error}): looking for the one before", file=sys.stderr)
                continue
            self._kept = [path]
            return checkpoint
        if steps:
            raise InputError(f"no checkpoint in {self.folder} is whole: give --overwrite to start anew")
        return None

    def save(self, progress: Mapping[str, Any], tree: Any) -> None:
        """Writes host arrays, which must not change, after those before. `progress["step"]` names the file."""
        self.wait()
        if self.writes:
            self._writing = self._writer.submit(self._write, dict(progress), by_name(tree))

    def wait(self) -> None:
        """Waits until everything is on the disk."""
        if self._writing:
            self._writing.result()

    def check(self) -> None:
        """Raises if a write has failed. Does not wait."""
        if self._writing and self._writing.done():
            self._writing.result()

    def _write(self, progress: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        path = self.folder / f"step-{progress['step']}.safetensors"
        with reported(path):
            self.folder.mkdir(exist_ok=True)
        text = json.dumps(progress)
        metadata = {"progress": text, "sha256": _digest(text, arrays)}
        write_whole(path, lambda new: save_file(arrays, new, metadata))
        self._kept = [path, *(kept for kept in self._kept if kept != path)][:2]
        for other in self.folder.iterdir():
            if other not in self._kept:
                other.unlink()


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads one checkpoint. Raises whatever a damaged file causes, and ValueError if the digest differs."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    arrays = load_file(path)
    if metadata["sha256"] != _digest(metadata["progress"], arrays):
        raise ValueError("its content has changed since it was written")
    return Checkpoint(json.loads(metadata["progress"]), arrays)


def _digest(text: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def by_name(tree: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree of host arrays by name."""
    return {name: np.asarray(leaf, order="C") for name, leaf in named_leaves(tree).items()}


def from_names(arrays: dict[str, np.ndarray], like: Any) -> Any:
    """The tree that `by_name` flattened. `like` has its structure, and leaves of its shapes.

    Raises InputError that lists every array that is missing or has another shape.
    """
    wrong: list[str] = []

    def find(path: tuple, leaf: Any) -> np.ndarray | None:
        name = leaf_name(path)
        found = arrays.get(name)
        if found is None or found.shape != leaf.shape or found.dtype != leaf.dtype:
            what = "none" if found is None else f"{found.dtype} {found.shape}"
            wrong.append(f"{name} is {what} instead of {leaf.dtype} {leaf.shape}")
        return found

    tree = jax.tree_util.tree_map_with_path(find, like)
    if wrong:
        raise InputError(f"the checkpoint is of another model ({'; '.join(wrong)}): give --overwrite to start anew")
    return tree
