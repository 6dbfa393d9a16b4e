"""Wrong input: its error, warnings, the reading of text files, and the end of a command.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --method no-such` shows one.
"""

import contextlib
import difflib
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do.

    Commands print it and end with code 2. Control characters in quoted content are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


shows_warnings = True  # False in all processes of a run but the first
_shown: set[str] = set()


def warn(message: str) -> None:
    """Prints a warning, once, in the process that shows progress."""
    if shows_warnings and message not in _shown:
        _shown.add(message)
        print(f"warning: {message}", file=sys.stderr)


def few(texts: Sequence[str], separator: str = ", ", most: int = 3) -> str:
    """Returns the first `most` texts and the number of the others."""
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*texts[:most], *more])


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Returns the error for a name that is not among `known`. It suggests the nearest ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")


def flag(name: str) -> str:
    """Returns an option as the command line has it."""
    return f"--{name.replace('_', '-')}"


def check_positive(**options: int) -> None:
    """Raises InputError for an option that is below 1."""
    for name, value in options.items():
        if value < 1:
            raise InputError(f"{flag(name)} is {value}: give at least 1")


# ------------------------------------------------------------------------------------ text files


def read_text(path: Path, name: str = "", advice: str = "restore it as UTF-8 text") -> str:
    """Returns the content of a UTF-8 text, without a byte-order mark.

    Raises InputError, which calls the file `name`, if it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name or path} cannot be read ({error}): {advice}") from error


def read_lines(path: Path, name: str = "", advice: str = "restore it as UTF-8 text") -> list[str]:
    """Returns the lines of a text, without blank ones at its end. Raises like `read_text`."""
    return read_text(path, name, advice).rstrip().split("\n")


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file. Raises InputError if it cannot be read."""
    text = read_text(path, advice="restore the file")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): restore the file") from error


# -------------------------------------------------------------------------------------- commands


def expanded(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with `~` expanded, which a shell leaves in `--out=~/runs`."""
    home = os.path.expanduser("~")

    def expand(word: str) -> str:
        return re.sub(r"^(--[\w-]+=)?~(?=/|$)", lambda match: (match[1] or "") + home, word)

    return [expand(word) for word in arguments]


class Stream(io.FileIO):
    """Standard output or error. On a full disk, it loses lines or, `needed`, raises InputError."""

    needed = False

    def write(self, content: Any, /) -> int:
        """Returns the number of bytes that were written or lost."""
        try:
            return super().write(content)
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # the reader wants no more
                raise
            if self.needed:
                self.needed = False  # what is left in buffers goes nowhere
                advice = "make room, or write it elsewhere"
                raise InputError(f"the output cannot be written ({error}): {advice}") from error
            return len(content)


def prepare_streams(logs: bool) -> None:
    """Makes output appear at once in logs, and never fail for a character that a terminal lacks.

    A stream that was closed is replaced by one that discards. Unless it `logs`, output is needed.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or type(stream) is io.TextIOWrapper:  # others are notebooks' or tests'
            number = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)
            encoding = stream.encoding if stream else "utf-8"
            raw = Stream(number, "w", closefd=False)
            raw.needed = name == "stdout" and not logs
            buffer = io.BufferedWriter(raw)
            setattr(sys, name, io.TextIOWrapper(buffer, encoding, "replace", line_buffering=True))


def exit_code(command: Callable[[], None], logs: bool = False) -> int:
    """Runs a command. Returns 0, or 2 after one line on stderr for bad input or lack of memory.

    Ctrl-C is 130. An output that was closed, as by `| head`, is 141; one that only `logs` may lose
    lines. Faults of ours raise.
    """
    prepare_streams(logs)
    try:
        try:
            command()
        finally:
            sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:  # RuntimeError: JAX's
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("error: out of memory: use a machine or device that has more", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):  # what is left in their buffers goes nowhere
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    return 0


def quiet_interrupts() -> None:
    """Makes Ctrl-C end the command at once, in one line.

    As an exception it may be lost in a callback of a library.
    """

    def end(*_: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(2, b"interrupted\n")
        os._exit(130)

    # Otherwise it is ignored, as in the background. A notebook or shell of Python goes on.
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default and not hasattr(sys, "ps1"):
        signal.signal(signal.SIGINT, end)
