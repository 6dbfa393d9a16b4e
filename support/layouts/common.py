"""What the readers share: records of text files, the choice of splits, wrong roots."""

import re
import unicodedata
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from data import Data, Split, hold_out
from support.errors import InputError, read_lines, unknown


def wrong_root(root: Path | None, lacks: str, layout: str) -> InputError:
    """Returns the error for a root with another layout: what it contains and what it should."""
    found = ["no such folder"]
    if root and root.is_dir():
        found = sorted(path.name for path in root.iterdir())[:8] or ["nothing"]
    return InputError(
        f"--data-root {root} has no {lacks} (found: {', '.join(found)}): expected {layout}"
    )


def composed(name: str) -> str:
    """Returns a name in Unicode's composed form: a letter may be spelled in two ways."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class Record(NamedTuple):
    """A line of a text file: its place (file and line) for messages, and its later fields."""

    place: str
    fields: tuple[str, ...]


def read_records(path: Path, form: str, pattern: str, name: str = "") -> dict[str, Record]:
    """Reads a text file with one record per line. Returns the records by their first fields.

    `pattern` has a group per field; messages call it `form`, and the file `name`. Raises
    InputError, with the place, for a line that does not match, or whose first field is taken.
    """
    name = name or str(path)
    records: dict[str, Record] = {}
    advice = f"restore it as UTF-8 text with '{form}' per line"
    for number, line in enumerate(read_lines(path, name, advice), start=1):
        place = f"{name} line {number}"
        match = re.fullmatch(pattern, line.strip())
        if not match:
            raise InputError(f"{place}: {line!r} is not '{form}': correct the line")
        first, *others = match.groups()
        if first in records:
            raise InputError(f"{place}: {records[first].place} has {first} already: delete one")
        records[first] = Record(place, tuple(others))
    return records


def choose_shifts(
    splits: Collection[str], reference: str, shifts: tuple[str, ...], left_out: Collection[str] = ()
) -> tuple[str, ...]:
    """Returns `shifts` or, if empty, all splits except the reference and those `left_out`.

    Raises InputError if a split is unknown, or if a shift is given twice or is the reference.
    """
    for split in (reference, *shifts):
        if split not in splits:
            raise unknown("split", split, splits)
        if (reference, *shifts).count(split) > 1:
            problem = f"{split!r} is the reference and a shift at once, or a shift twice"
            raise InputError(f"{problem}: give each shift once, and not the reference")
    return shifts or tuple(split for split in splits if split not in (reference, *left_out))


def add_selection(
    train: Split,
    reports: dict[str, Split],
    select_on: str,
    val: Callable[[], Split] | None = None,
    every: int = 10,
) -> Data:
    """Returns the data of a run, with the split to select on.

    That is the reference's reported images for `select_on` test, else `val()` or, without it, one
    in `every` training images.
    """
    if select_on == "test":
        return Data(train, next(iter(reports.values())), reports)  # the reference comes first
    if val:
        return Data(train, val(), reports)
    return Data(*hold_out(train, every), reports)
