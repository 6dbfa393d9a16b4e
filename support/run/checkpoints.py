"""Checkpoints of a run, which `python train.py --resume` reads.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M.

A checkpoint is a safetensors file, `step-N.safetensors`. It contains every array of the state by
name. Its metadata contains how far the run has come, and a digest of all.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from clip import leaf_name, named_leaves
from support.disk import write_whole
from support.errors import InputError, few, warn

_NAME = re.compile(r"step-(\d+)\.safetensors")


class Checkpoint(NamedTuple):
    """How far a run has come, as JSON, and its arrays by name."""

    progress: Any  # as it was saved
    arrays: dict[str, np.ndarray]


class Checkpoints:
    """A run's two newest checkpoints, written by a thread while training goes on.

    Methods raise the InputError of a write that failed. Leaving the block waits for the last write.
    Without `writes`, `save` does nothing.
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
        """Returns the newest intact checkpoint, or None if there is none at all.

        Warns of damaged ones. Raises InputError if all are damaged.
        """
        found = [path for path in self.folder.glob("*") if _NAME.fullmatch(path.name)]
        for path in sorted(found, key=_step, reverse=True):
            try:
                checkpoint = read_checkpoint(path)
            except Exception as error:  # a damaged file may raise anything
                warn(f"checkpoint {path} is damaged ({error}): looking for the one before")
                continue
            self._kept = [path]
            return checkpoint
        if found:
            advice = "give --overwrite to start anew"
            raise InputError(f"no checkpoint in {self.folder} is whole: {advice}")
        return None

    def save(self, progress: Mapping[str, Any], tree: Any) -> None:
        """Writes host arrays, which must not change, as the checkpoint of `progress["step"]`."""
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
        text = json.dumps(progress)
        metadata = {"progress": text, "sha256": _digest(text, arrays)}
        write_whole(path, lambda new: save_file(arrays, new, metadata))
        self._kept = [path, *(kept for kept in self._kept if kept != path)][:2]
        for other in self.folder.iterdir():
            if other not in self._kept and _NAME.fullmatch(other.name.removesuffix(".new")):
                other.unlink()


def _step(path: Path) -> int:
    return int(path.name.split("-")[1].split(".")[0])


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint. Raises what a damaged file causes, and ValueError for another digest."""
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
    """Returns the leaves of a tree of host arrays by name."""
    return {name: np.asarray(leaf, order="C") for name, leaf in named_leaves(tree).items()}


def from_names(arrays: dict[str, np.ndarray], like: Any) -> Any:
    """Returns the tree that `by_name` flattened. `like` has its structure and its leaves' shapes.

    Raises InputError that names arrays that are missing or have another shape or type.
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
        problem = f"the checkpoint is of another model or version ({few(wrong, '; ', 2)})"
        raise InputError(f"{problem}: give --overwrite to start anew")
    return tree
