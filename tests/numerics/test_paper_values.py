"""The paper's values in `support/report/paper.json`: known names, and numbers that fit together."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lipsum
from support.layouts.imagenet import IMAGENET
from support.report import tables
from support.report.labels import post_hoc_kind
from support.run import options

TABLES = json.loads(Path(tables.__file__).with_name("paper.json").read_text(encoding="utf-8"))[
    "tables"
]
SPLITS = {
    "domainnet": list(options.PAPER["domainnet"]["shifts"]),
    "imagenet": list(IMAGENET),
    "cub": ["cub"],
}
# Methods that are not this project's, and rows whose marks the text lacks.
LABELS = {"zero-shot (Wang et al. 2023)", "CoOp", "CoOp + SHIP"}
UNNAMED = {f"kld-random or mse-fixed, row {row}" for row in (2, 3)}


def values(**wanted: Any) -> dict[str, list[float]]:
    """The means per method of the one block with these attributes."""
    (found,) = (
        block for block in TABLES if all(block[name] == value for name, value in wanted.items())
    )
    return {row.get("method") or row["label"]: row["mean"] for row in found["rows"]}


def test_every_numbered_table_is_there() -> None:
    assert {block["table"] for block in TABLES} == {*range(1, 12), None}
    assert sum(len(row["mean"]) for block in TABLES for row in block["rows"]) == 1086


@pytest.mark.parametrize("block", TABLES, ids=lambda block: f"table-{block['table']}")
def test_names_and_shapes(block: dict[str, Any]) -> None:
    assert block["splits"] == SPLITS[block["data"]] and block["reference"] in block["splits"]
    assert block["metric"] in tables.METRICS
    assert block["model"] in {*options.PAPER_BATCH_SIZES, None}
    largest = {"ece": 1, "nll": 10}.get(block["metric"], 100)
    for row in block["rows"]:
        if "label" in row:
            assert row["label"] in LABELS | UNNAMED
        else:
            base, *suffixes = row["method"].split("+")
            assert base in lipsum.METHODS and all(map(post_hoc_kind, suffixes))
        assert row.keys() <= {
            *("method", "label", "mean", "deviation", "average"),
            *("text_length", "num_texts"),
        }
        assert len(row["mean"]) == len(row.get("deviation", row["mean"])) == len(block["splits"])
        assert all(0 < mean < largest for mean in row["mean"])
        assert all(0 <= each < 0.04 * largest for each in row.get("deviation", []))


def test_printed_averages_fit_their_columns() -> None:
    """Over the shifts in Table 4, over all five domains in Table 10; to the printed digit."""
    checked = 0
    for block in TABLES:
        everything = block.get("average_over") == "splits"
        for row in block["rows"] if "average_over" in block else []:
            pairs = zip(block["splits"], row["mean"], strict=True)
            chosen = [mean for split, mean in pairs if everything or split != block["reference"]]
            assert abs(np.mean(chosen) - row["average"]) < 0.0501
            checked += 1
    assert checked == 6 * 5 + 4 * 6


@pytest.mark.parametrize(
    ("reference", "method", "average"),
    [
        ("painting", "ft", 60.42),
        ("painting", "lipsum", 64.24),
        ("clipart", "ft", 61.50),
        ("sketch", "ft", 59.34),
    ],
)
def test_averages_of_table_10_by_hand(reference: str, method: str, average: float) -> None:
    rows = values(table=10, reference=reference)
    assert np.mean(rows[method]) == pytest.approx(average, abs=1e-9)


def test_harmonic_means_of_table_11() -> None:
    seen, unseen, harmonic = (
        values(table=11, metric=metric) for metric in ("seen", "unseen", "harmonic-mean")
    )
    for method, (h,) in harmonic.items():
        (s,), (u,) = seen[method], unseen[method]
        assert abs(2 * s * u / (s + u) - h) < 0.1  # H is the mean of the runs'


def test_tables_agree_where_they_repeat_each_other() -> None:
    """All but the contradictions that paper.json's notes name."""
    found: dict[tuple, set[tuple]] = {}
    for block, number in itertools.product(TABLES, range(5)):
        for row in block["rows"] if number < len(block["splits"]) else []:
            place = (block["model"], block["data"], block["reference"], block["metric"])
            method = (row.get("method") or row["label"]).removesuffix("+wise-1")
            length, count = row.get("text_length", 8), row.get("num_texts", 80)
            name = (*place, block["splits"][number], method, length, count)
            found.setdefault(name, set()).add(row["mean"][number])
    contradictions = {name[4:] for name, means in found.items() if len(means) > 1}
    table_6 = {(split, "ft", 8, 80) for split in SPLITS["domainnet"]}
    table_8 = {
        (split, "lipsum", 8, 80)
        for split in ("imagenet", "imagenet-v2", "imagenet-r", "imagenet-a")
    }
    assert contradictions == {("imagenet-v2", "zero-shot", 8, 80), *table_6, *table_8}
    (rows,) = (b["rows"] for b in TABLES if b["table"] == 8 and b["data"] == "imagenet")
    means = [row["mean"] for row in rows if row["text_length"] == 8]
    assert means[0] == means[1] and means[0] != means[4]  # 80 texts, 10 texts, 80 texts


def test_orders_that_the_documents_state() -> None:
    """By the mean of the shifts: docs/settings.md; Lipsum-FT against FT and zero-shot:
    docs/analysis.md.
    """
    ends = {
        ("domainnet", "ViT-B/32"): ["kd", "ema", "lipsum"],
        ("domainnet", "ViT-B/16"): ["car-ft", "ema", "lipsum"],
        ("domainnet", "ViT-L/14"): ["car-ft", "ema", "lipsum"],
        **{("imagenet", model): ["car-ft", "kd", "lipsum"] for model in options.PAPER_BATCH_SIZES},
    }
    for (data, model), end in ends.items():
        table = 1 if model == "ViT-B/16" else 5
        rows = values(table=table, data=data, model=model, metric="accuracy")
        shifts = {method: np.mean(means[1:]) for method, means in rows.items()}
        assert shifts["lipsum"] > shifts.pop("zero-shot")
        assert sorted(shifts, key=lambda method: shifts[method])[-3:] == end
    rows = values(table=1, data="domainnet", metric="accuracy")
    assert rows["lipsum"][0] == max(means[0] for means in rows.values()) == 89.0
