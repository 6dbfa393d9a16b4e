"""Wrong input: its error, and the reading of text files, which raises it.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. Every module uses it; `python train.py --method no-such` shows one.
"""

import difflib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Bad input: one line that says what is wrong, where, and what to do. Commands print it and end with code 2.

    Line ends and other controls in quoted content are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not among `known`. It suggests the nearest ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")


def read_text(path: Path, name: str = "", advice: str = "restore it as UTF-8 text") -> str:
    """The content of a UTF-8 text, without a byte-order mark. Raises InputError if it cannot be read.

    `name` is how the message calls the file.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name or path} cannot be read ({error}): {advice}") from error


def read_lines(path: Path, name: str = "", advice: str = "restore it as UTF-8 text") -> list[str]:
    """The lines of a text, without blank ones at its end. Raises InputError like `read_text`."""
    return read_text(path, name, advice).rstrip().split("\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError, which names the file, if it cannot be read."""
    text = read_text(path, advice="restore the file")
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}): restore the file") from error


def flag(name: str) -> str:
    """An option as the command line has it."""
    return f"--{name.replace('_', '-')}"


def check_positive(**options: int) -> None:
    """Raises InputError for an option that is below 1."""
    for name, value in options.items():
        if value < 1:
            raise InputError(f"{flag(name)} is {value}: give at least 1")


def exit_code(command: Callable[[], None]) -> int:
    """Runs a command. Returns 0, or 2 after one line on stderr if its input is bad. Faults of ours raise (1)."""
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
