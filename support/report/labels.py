"""What tables and figures call a method: `lipsum+wise-0.9` is Lipsum-FT + WiSE 0.9.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py wise runs/lipsum/seed-0` makes
this one.
"""

from typing import Any

from lipsum import METHODS

POST_HOC = {"wise": "WiSE", "tpgm-c": "TPGM-C", "tpgm": "TPGM"}


def post_hoc_kind(suffix: str) -> str:
    """Returns the key of `POST_HOC` with which a suffix such as `wise-0.9` starts, or ""."""
    for kind in POST_HOC:  # `tpgm-c` comes before `tpgm`
        if suffix.startswith(kind):
            return kind
    return ""


def label_method(method: str) -> str:
    """Returns a method's label, such as FT, Lipsum-FT + soup for `ft,lipsum+soup`."""
    base, *suffixes = method.split("+")
    names = [METHODS[name].label if name in METHODS else name for name in base.split(",")]
    label = ", ".join(names)
    for suffix in suffixes:
        kind = post_hoc_kind(suffix)
        label += " + " + POST_HOC.get(kind, "") + suffix.removeprefix(kind).replace("-", " ")
    return label


def describe_method(method: str) -> dict[str, Any]:
    """Returns what results.json contains for tables: a method's label, and its place among rows.

    So tables can be printed without `lipsum.METHODS`, which imports JAX.
    """
    base = method.partition("+")[0]
    row = list(METHODS).index(base) if base in METHODS else len(METHODS)
    return {"label": label_method(method), "row": row}
