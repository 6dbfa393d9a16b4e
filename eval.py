"""Evaluation: metrics, one pass over a split, and tables of finished runs.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py table runs` prints the table of finished runs.

Accuracy and ECE are fractions and NLL is in nats in files; tables that people read show percent and nats.
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

import clip
import data
import lipsum
from clip import InputError

# ------------------------------------------------------------------------------------------------------------- metrics


def negative_log_likelihood(label_log_probability: Float[np.ndarray, " images"]) -> float:
    """The mean of `-log p(y | x)`, in nats. It takes logarithms: a probability that underflows still counts in full."""
    return -float(np.mean(label_log_probability, dtype=np.float64))


def expected_calibration_error(
    confidence: Float[np.ndarray, " images"], correct: Bool[np.ndarray, " images"], bins: int = 15
) -> float:
    """ECE (Guo et al. 2017): |accuracy - confidence| over bins of equal width, weighted by their sizes.

    Bins are open below and closed above; `confidence` is the top-1 probability.
    """
    bin_of = np.digitize(confidence, np.linspace(0, 1, bins + 1), right=True)
    gap = np.bincount(bin_of, correct - confidence.astype(np.float64), minlength=bins + 1)
    return float(np.sum(np.abs(gap)) / len(confidence))


# ---------------------------------------------------------------------------------------------------------- evaluation


@jax.jit
def _outcomes(
    classifier: lipsum.Classifier, tau: Float[Array, ""], batch: dict[str, Array]
) -> tuple[Float[Array, " batch"], Float[Array, " batch"], Bool[Array, " batch"]]:
    """Per image: the label's log-probability, the top-1 probability, and whether top-1 is the label."""
    u = lipsum.logits(clip.image_features(classifier.vision, batch["image"]), classifier.head, tau)
    log_probabilities = jax.nn.log_softmax(u)
    of_label = jnp.take_along_axis(log_probabilities, batch["label"][:, None], axis=1)[:, 0]
    return of_label, jnp.exp(jnp.max(log_probabilities, axis=1)), jnp.argmax(u, axis=1) == batch["label"]


def evaluate(
    classifier: lipsum.Classifier, tau: Float[Array, ""], split: data.Split, batch_size: int, workers: int, mesh: Mesh
) -> dict[str, int | float]:
    """`n`, `accuracy`, `ece` and `nll` of a classifier on a split, in one pass."""
    resolution = classifier.vision.image_size
    batches = data.evaluation_batches(split, resolution, batch_size, workers)
    collected = []
    for batch in tqdm(batches, f"evaluating {split.name}", -(-len(split) // batch_size), unit="batch", leave=False):
        valid = batch.pop("valid")
        collected.append([np.asarray(x)[valid] for x in _outcomes(classifier, tau, data.shard_batch(batch, mesh))])
    of_label, confidence, correct = (np.concatenate(parts) for parts in zip(*collected, strict=True))
    return {
        "n": len(split),
        "accuracy": float(np.mean(correct)),
        "ece": expected_calibration_error(confidence, correct),
        "nll": negative_log_likelihood(of_label),
    }


# -------------------------------------------------------------------------------------------------------------- tables

Metric = Literal["accuracy", "ece", "nll"]
# What tables show of each metric: heading, factor, decimals.
SHOWN = {"accuracy": ("accuracy, %", 100, 1), "ece": ("ECE, %", 100, 1), "nll": ("NLL, nats", 1, 3)}


def read_results(runs: list[Path]) -> list[dict[str, Any]]:
    """Every `results.json` in or under the given folders. Raises InputError where there is none or one is broken."""
    results = []
    for run in runs:
        found = sorted(run.rglob("results.json"))
        if not found:
            raise InputError(f"{run} holds no results.json: give the folders of finished runs")
        for path in found:
            content = clip.read_json(path)
            if missing := {"method", "seed", "splits", "zero_shot"} - set(content):
                raise InputError(f"{path} lacks {', '.join(sorted(missing))}: it is not a run's; leave it out")
            results.append(content | {"path": path})
    first = results[0]
    for other in results[1:]:
        if list(other["splits"]) != list(first["splits"]):
            raise InputError(
                f"{first['path']} has splits {', '.join(first['splits'])}, {other['path']} has "
                f"{', '.join(other['splits'])}: give runs of the same splits"
            )
    return results


def table(results: list[dict[str, Any]], metric: str) -> str:
    """Zero-shot and each method in rows, each split and the shifts' mean in columns; mean ± deviation over seeds."""
    splits = results[0]["splits"]
    shifts = [name for name, split in splits.items() if split["role"] == "shift"]
    heading, factor, decimals = SHOWN[metric]

    def cells(runs: list[dict[str, Any]]) -> list[str]:
        """Each column's mean over `runs`, with the sample standard deviation where there are two or more."""
        columns = [[run[name][metric] for run in runs] for name in splits]
        if shifts:
            columns.append([statistics.fmean(run[name][metric] for name in shifts) for run in runs])
        return [
            f"{factor * statistics.fmean(column):.{decimals}f}"
            + (f" ± {factor * statistics.stdev(column):.{decimals}f}" if len(column) > 1 else "")
            for column in columns
        ]

    rows = [[heading, *splits, *(["mean of shifts"] if shifts else [])]]
    rows.append(["zero-shot", *cells([results[0]["zero_shot"]])])
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result["splits"] for result in results if result["method"] == method]
        rows.append([lipsum.METHODS[method].label if method in lipsum.METHODS else method, *cells(runs)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# -------------------------------------------------------------------------------------------------------- command line


def exit_code(command: Callable[[], None]) -> int:
    """Runs a command: 0, or 2 after one line on stderr where the user's input is wrong. Faults of ours raise (1)."""
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def table_command(runs: tyro.conf.Positional[tuple[Path, ...]], metric: Metric = "accuracy") -> None:
    """Print the table of finished runs: a row per method, a column per split.

    Args:
        runs: Folders of runs, or folders that hold some.
        metric: What to show: accuracy or ECE in percent, NLL in nats.
    """
    print(table(read_results(list(runs)), metric))


app = tyro.extras.SubcommandApp()
app.command(name="table")(table_command)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: app.cli(description=__doc__.splitlines()[0])))
