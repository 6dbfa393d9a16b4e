"""Files that commands write: each is whole at any moment, in its old or its new version.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py` writes a run's files with it.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from support.errors import InputError


def cache_folder() -> Path:
    """Returns the folder of what is drawn and compiled once.

    It is `LIPSUM_CACHE` or, without that, `lipsum` in the user's cache folder.
    """
    if folder := os.environ.get("LIPSUM_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lipsum"


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Replaces a file, or a folder of files, by what `write` makes at the path that it is given.

    The new version is flushed to the disk before it is renamed. Raises InputError if the disk
    refuses it; the old version then stays.
    """
    new = path.with_name(f"{path.name}.new")
    with reported(path):
        try:
            delete(new)
            write(new)
            for made in [*sorted(new.iterdir()), new] if new.is_dir() else [new]:
                _flush(made)
            if path.is_dir():
                shutil.rmtree(path)  # a folder cannot be renamed onto a full one
            os.replace(new, path)
            _flush(path.parent)
        except (OSError, SafetensorError):
            with contextlib.suppress(OSError):
                delete(new)  # it may fill the disk
            raise


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file. Raises InputError like `write_whole`."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda new: new.write_text(text, encoding="utf-8"))


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
        advice = "make room or give another place; what was saved before is whole"
        raise InputError(f"{path} cannot be written ({reason}): {advice}") from error


def _flush(path: Path) -> None:
    """Flushes to the disk. Otherwise a power cut may leave an empty file under a new name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks a file or folder against other processes until the block, or this process, ends.

    Leaves no lock behind. Raises InputError if another process holds the lock, or if nothing can be
    written there.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    made = [parent for parent in path.parents if not parent.exists()]
    with reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            advice = "wait until it ends, or give another --out"
            raise InputError(f"another process writes to {path}: {advice}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # folders that are no longer empty stay
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            for parent in made:
                parent.rmdir()
