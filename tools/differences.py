"""Sizes of differences from the authors' script (docs/paper.md), measured on finished runs.

    python -m tools.differences runs/ft/seed-0 runs/lipsum/seed-0

All runs are of one data set. The script is https://github.com/cs-giung/lipsum-ft. It resizes with
TensorFlow's bicubic filter, which does not blur before it shrinks an image, and keeps the result as
floats. It selects on centre crops of 224/256 of the shorter side.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from PIL import Image

import clip
import data
import eval as evaluation
import lipsum
from support.errors import exit_code
from support.run import finished
from support.run.options import Places
from support.run.setup import Setup


def as_tensorflow(image: Image.Image, resolution: int, share: float) -> jax.Array:
    """Returns the centre square of `share` of the shorter side, resized as `tf.image.resize` does.

    The values are floats of up to 255.
    """
    side = int(share * min(image.size))
    left, top = ((length - side + 1) // 2 for length in image.size)
    square = np.asarray(image.convert("RGB").crop((left, top, left + side, top + side)), np.float32)
    return jax.image.resize(square, (resolution, resolution, 3), "cubic", antialias=False)


PREPARATIONS: dict[str, Callable] = {
    "Pillow, bytes (this project)": lambda image, side: np.asarray(
        data.evaluation_image(image, clip.Preparation(side)), np.float32
    ),
    "TensorFlow's filter, floats": lambda image, side: as_tensorflow(image, side, 1),
    "the same, centre crop of 224/256": lambda image, side: as_tensorflow(image, side, 224 / 256),
}


def accuracy(
    classifier: lipsum.Classifier, tau: jax.Array, split: data.Split, prepare: Callable
) -> float:
    """Returns the accuracy on a split, in percent, after a preparation of its images."""
    side = classifier.vision.preparation.size
    images: Any = split.images

    @jax.jit
    def logits(pixels: jax.Array) -> jax.Array:
        return lipsum.logits(clip.image_features(classifier.vision, pixels), classifier.head, tau)

    correct = []
    for start in range(0, len(split), 64):
        part = slice(start, start + 64)
        pixels = np.stack([prepare(data.open_image(file), side) for file in images[part]])
        correct.append(np.argmax(logits(pixels / 255), axis=1) == split.labels[part])
    return percent(np.concatenate(correct))


def percent(correct: np.ndarray) -> float:
    """Returns the share of what is true, in percent."""
    return 100 * float(np.mean(correct))


def show(name: str, values: list[float]) -> None:
    """Prints a line of the report, a value per split."""
    print(f"  {name:34}", *(f"{value:8.3f}" for value in values))


def report(run: finished.FinishedRun, setup: Setup) -> None:
    """Prints the differences on one run."""
    reports = setup.data.reports
    print(f"{run.folder}: {', '.join(reports)}")
    print(" accuracy, %, by preparation of the images")
    for name, prepare in PREPARATIONS.items():
        splits = reports.values()
        tau = setup.model.tau
        show(name, [accuracy(run.classifier, tau, split, prepare) for split in splits])
    predictions = list(evaluation.predict_reports(setup, [run.classifier]).values())
    print(" ECE, %, by number of bins")
    for bins in (10, 15, 20):
        ece = evaluation.expected_calibration_error
        show(str(bins), [100 * ece(x.confidence, x.correct, bins) for x in predictions])
    print(" NLL, nats")
    for name, added in {"exact (this project)": 0.0, "of p + 1e-8": 1e-8}.items():
        logs = [each.label_log_probability for each in predictions]
        show(name, [evaluation.negative_log_likelihood(log, added) for log in logs])
    unseen = np.setdiff1d(np.arange(len(setup.classes)), setup.seen)
    for kind, classes in {"S": setup.seen, "U": unseen}.items() if len(unseen) else ():
        print(f" {kind}, %")
        per_image = []
        per_class = []
        for split, each in zip(reports.values(), predictions, strict=True):
            of_class = [percent(each.correct[split.labels == label]) for label in classes]
            per_class.append(float(np.mean(of_class)))
            per_image.append(percent(each.correct[np.isin(split.labels, classes)]))
        show("mean over images (this project)", per_image)
        show("mean over classes", per_class)


def report_ensemble(runs: Sequence[finished.FinishedRun], setup: Setup) -> None:
    """Prints what averaging logits in place of probabilities changes."""
    print("ensemble of all, accuracy, %, by what is averaged")
    members = [run.classifier for run in runs]
    probabilities = []
    logits = []
    for split in setup.data.reports.values():
        probabilities.append(percent(evaluation.predict_split(setup, members, split).correct))
        u = sum(
            evaluation.predict_split(setup, [each], split).features @ np.asarray(each.head)
            for each in members
        )
        logits.append(percent(np.argmax(u, axis=1) == split.labels))
    show("probabilities (this project)", probabilities)
    show("logits", logits)


def main(folders: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Measure the differences on finished runs, and for several also those of their ensemble.

    Args:
        folders: Folders of the runs.
    """
    runs, setup = finished.open_runs(folders, Places())
    for run in runs:
        report(run, setup)
    if len(runs) > 1:
        report_ensemble(runs, setup)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, prog="python -m tools.differences")))
