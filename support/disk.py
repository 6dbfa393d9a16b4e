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


# Permissions that the user withholds from new files. safetensors withholds more.
_UMASK = os.umask(0o077)
os.umask(_UMASK)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Replaces a file, or files of a folder, by what `write` makes at the path that it is given.

    Makes the folders above. The new version is flushed to the disk before it is renamed. Raises
    InputError if the disk refuses it; the old version then stays.
    """
    new = path.with_name(f"{path.name}.new")
    with reported(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _delete(new)
            write(new)
            made = {new: path}
            if new.is_dir():
                path.mkdir(exist_ok=True)
                made = {file: path / file.name for file in new.iterdir()}
            for file in made:
                with contextlib.suppress(OSError):  # some file systems have no permissions
                    file.chmod(file.stat().st_mode | 0o666 & ~_UMASK)
                _flush(file)
            for file, place in made.items():
                os.replace(file, place)
            _flush(path)
            _flush(path.parent)
        finally:
            _delete(new)  # it may fill the disk


def write_json(path: Path, content: Any) -> None:
    """Replaces a JSON file. Raises InputError like `write_whole`."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda new: new.write_text(text, encoding="utf-8"))


def _delete(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)  # a file is left to the next line
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
    # CIFS, vboxsf and some FUSE mounts flush files alone, which is enough.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
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
            advice = f"or, if it died on another machine, delete {lock.lock_file}"
            advice = f"wait until it ends, give another --out {advice}"
            raise InputError(f"another process writes to {path}: {advice}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # folders that are no longer empty stay
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            for parent in made:
                parent.rmdir()
