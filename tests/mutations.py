"""Changes some bytes of a file, for tests of the functions that read it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from support.errors import InputError


def with_mutations(
    examples: int,
    content: bytes,
    check: Callable[[bytes], None],
    places: Sequence[int] | None = None,
) -> None:
    """Calls `check` with up to three bytes of `content` changed, at any of the `places`, and
    sometimes truncated.
    """
    allowed = range(len(content)) if places is None else places
    changes = st.lists(st.tuples(st.integers(0, len(allowed) - 1), st.integers(0, 255)), max_size=3)

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None)
    @given(changes, st.none() | st.integers(0, len(content)))
    def check_one(changes: list[tuple[int, int]], end: int | None) -> None:
        changed = bytearray(content)
        for index, value in changes:
            changed[allowed[index]] = value
        check(bytes(changed[:end]))

    check_one()


def read_unless_refused(read: Callable[[], Any], path: Path) -> Any:
    """Returns the content, or None after an InputError, which must be one line with the path."""
    try:
        return read()
    except InputError as error:
        assert str(error).isprintable() and str(path) in str(error)
        return None
