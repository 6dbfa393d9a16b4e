"""Files with some of their bytes changed, for the tests of what reads them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from support.errors import InputError


def with_mutations(
    examples: int, content: bytes, check: Callable[[bytes], None], places: Sequence[int] | None = None
) -> None:
    """Checks contents with up to three bytes changed, in any place or in those given, and some that end early."""
    among = range(len(content)) if places is None else places
    changes = st.lists(st.tuples(st.integers(0, len(among) - 1), st.integers(0, 255)), max_size=3)

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(changes, st.none() | st.integers(0, len(content)))
    def check_one(changes: list[tuple[int, int]], end: int | None) -> None:
        changed = bytearray(content)
        for place, value in changes:
            changed[among[place]] = value
        check(bytes(changed[:end]))

    check_one()


def read_unless_refused(read: Callable[[], Any], path: Path) -> Any:
    """What is read, or None where an error of ours, in one line that names the path, tells why not."""
    try:
        return read()
    except InputError as error:
        assert str(error).isprintable() and str(path) in str(error)
        return None
