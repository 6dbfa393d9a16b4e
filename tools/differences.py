"""Sizes of differences from the authors' script (docs/paper.md), measured on finished runs of one data set.

    python tests/differences.py runs/ft/seed-0 runs/lipsum/seed-0

The script is https://github.com/cs-giung/lipsum-ft. It resizes with TensorFlow's bicubic filter, which does not blur
before it shrinks an image, and keeps the result as floats. It selects on centre crops of 224/256 of the shorter side.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import clip
import data
import eval as evaluation
import lipsum
from support.errors import exit_code
from support.run import setup as opening


def as_tensorflow(image: Image.Image, resolution: int, share: float) -> jax.Array:
    """The centre square of `share` of the shorter side, resized as `tf.image.resize` does, in floats."""
    side = int(share * min(image.size))
    left, top = ((length - side + 1) // 2 for length in image.size)
    square = np.asarray(image.convert("RGB").crop((left, top, left + side, top + side)), np.float32)
    return jax.image.resize(square, (resolution, resolution, 3), "cubic", antialias=False)


PREPARATIONS: dict[str, Callable] = {
    "Pillow, bytes (this project)": lambda image, side: np.asarray(
        data.evaluation_image(image, side), np.float32
    ),
    "TensorFlow's filter, floats": lambda image, side: as_tensorflow(image, side, 1),
    "the same, centre crop of 224/256": lambda image, side: as_tensorflow(image, side, 224 / 256),
}


def accuracies(
    classifier: lipsum.Classifier, tau: jax.Array, split: data.Split, prepare: Callable
) -> np.ndarray:
    """Which images of a split are classified correctly after a preparation, which returns floats up to 255."""
    side = classifier.vision.image_size
    logits_of = jax.jit(
        lambda images: lipsum.logits(
            clip.image_features(classifier.vision, images), classifier.head, tau
        )
    )
    correct = []
    for start in range(0, len(split), 64):
        images = np.stack(
            [prepare(data.open_image(file), side) for file in split.images[start : start + 64]]
        )
        u = logits_of(images / 255)
        correct.append(np.argmax(u, axis=1) == split.labels[start : start + 64])
    return np.concatenate(correct)


def show(name: str, values: list[float]) -> None:
    print(f"  {name:34}", *(f"{value:8.3f}" for value in values))


def main() -> None:
    runs, setup = opening.open_runs(opening.Runs(tuple(map(Path, sys.argv[1:]))))
    evaluator = evaluation.Evaluator(setup)
    reports = setup.data.reports
    for run in runs:
        print(f"{run.folder}: {', '.join(reports)}")
        print(" accuracy, %, by preparation of the images")
        for name, prepare in PREPARATIONS.items():
            found = [
                accuracies(run.classifier, setup.tau, split, prepare) for split in reports.values()
            ]
            show(name, [100 * np.mean(correct) for correct in found])
        predictions = {
            name: evaluator.predict([run.classifier], split) for name, split in reports.items()
        }
        print(" ECE, %, by number of bins")
        for bins in (10, 15, 20):
            diagrams = [
                evaluation.reliability(each.confidence, each.correct, bins)
                for each in predictions.values()
            ]
            show(
                str(bins),
                [100 * evaluation.expected_calibration_error(diagram) for diagram in diagrams],
            )
        print(" NLL, nats")
        for name, added in {"exact (this project)": 0.0, "of p + 1e-8": 1e-8}.items():
            labels = [each.label_log_probability for each in predictions.values()]
            show(name, [evaluation.negative_log_likelihood(label, added) for label in labels])
        unseen = np.setdiff1d(np.arange(len(setup.classes)), setup.seen)
        for kind, classes in {"S": setup.seen, "U": unseen}.items() if len(unseen) else ():
            print(f" {kind}, %")
            split_labels = {name: split.labels for name, split in reports.items()}
            per_image = [
                np.mean(each.correct[np.isin(split_labels[name], classes)])
                for name, each in predictions.items()
            ]
            per_class = [
                np.mean([np.mean(each.correct[split_labels[name] == label]) for label in classes])
                for name, each in predictions.items()
            ]
            show("mean over images (this project)", [100 * value for value in per_image])
            show("mean over classes", [100 * value for value in per_class])
    if len(runs) > 1:
        print("ensemble of all, accuracy, %, by what is averaged")
        members = [run.classifier for run in runs]
        averages: dict[str, list[float]] = {"probabilities (this project)": [], "logits": []}
        for split in reports.values():
            averages["probabilities (this project)"].append(
                100 * np.mean(evaluator.predict(members, split).correct)
            )
            u = sum(
                evaluator.predict([each], split).features @ np.asarray(each.head)
                for each in members
            )
            averages["logits"].append(100 * np.mean(np.argmax(u, axis=1) == split.labels))
        for name, values in averages.items():
            show(name, values)


if __name__ == "__main__":
    sys.exit(exit_code(main))
