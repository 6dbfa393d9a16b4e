"""Metrics against brute force and hand-made cases, whole splits against PyTorch, tables by hand."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from helpers import seeded_model

import clip
import data
import eval as evaluation
import lipsum
from support import devices, layouts, weights

# ------------------------------------------------------------------------------------------ metrics


def brute_force_ece(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for index in range(bins):
        inside = [i for i, c in enumerate(confidence) if index / bins < c <= (index + 1) / bins]
        if inside:
            accuracy = sum(float(correct[i]) for i in inside) / len(inside)
            mean_confidence = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean_confidence)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_ece_against_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    confidence = random.uniform(1 / 7, 1, 500).astype(np.float32)
    correct = random.random(500) < confidence**2
    expected = brute_force_ece(confidence, correct)
    assert expected > 0.01
    np.testing.assert_allclose(
        evaluation.expected_calibration_error(confidence, correct),
        expected,
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.75] * 4, [True, True, True, False], 0.0),  # perfectly calibrated
        ([1.0] * 3, [False] * 3, 1.0),  # always wrong and sure
        ([0.5, 1.0], [False, True], 0.25),
        # An edge belongs to the bin below it: 0.2 = 3/15 stays alone, and misses of opposite sign
        # do not cancel.
        ([0.2, 0.2001], [True, False], (0.8 + 0.2001) / 2),
    ],
)
def test_ece_by_hand(confidence: list[float], correct: list[bool], expected: float) -> None:
    actual = evaluation.expected_calibration_error(np.array(confidence), np.array(correct))
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_nll_of_a_probability_that_underflows() -> None:
    """exp(-200) is 0 in float32; its logarithm is not lost."""
    vision = seeded_model("tiny").vision
    images = np.full((8, 32, 32, 3), 128, np.uint8)
    feature = clip.image_features(vision, jnp.asarray(images))[0]
    classifier = lipsum.Classifier(vision, jnp.stack([feature, -feature], axis=1))
    _, label, confidence, correct = evaluation.outcomes(
        (classifier,), jnp.float32(100), None, {"image": images, "label": np.ones(8, np.int32)}
    )
    np.testing.assert_allclose(
        evaluation.negative_log_likelihood(np.asarray(label)), 200, rtol=1e-5
    )
    # The authors' script adds 1e-8 to the probability, which caps it at 8 ln 10 nats.
    np.testing.assert_allclose(
        evaluation.negative_log_likelihood(np.asarray(label), 1e-8), 8 * math.log(10), rtol=1e-5
    )
    capped = evaluation.negative_log_likelihood(np.log([0.5, 1e-8]), 1e-8)
    np.testing.assert_allclose(capped, -np.mean(np.log([0.5 + 1e-8, 2e-8])), rtol=1e-12)
    assert not correct.any() and np.all(confidence <= 1)
    np.testing.assert_allclose(confidence, 1, rtol=1e-5)


def test_harmonic_mean_by_hand() -> None:
    assert evaluation.harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert evaluation.harmonic_mean(0.0, 0.0) == 0.0


def test_metrics_by_hand() -> None:
    """NLL is that of the labels, where another class is predicted, too."""
    predictions = evaluation.Predictions(
        features=np.zeros((3, 2), np.float32),
        label_log_probability=np.log(np.array([0.5, 0.25, 0.125], np.float32)),
        confidence=np.array([0.5, 0.75, 0.75], np.float32),
        correct=np.array([True, False, False]),
    )
    metrics = evaluation.metrics(predictions)
    assert metrics["n"] == 3 and metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["nll"] == pytest.approx(2 * math.log(2))
    assert metrics["ece"] == pytest.approx((0.5 + 2 * 0.75) / 3)


@pytest.mark.parametrize("compared", [None, [True, False, True, True]], ids=str)
def test_an_ensemble_averages_probabilities(compared: list[bool] | None) -> None:
    """Against NumPy: softmax over the compared classes, the others have probability 0, the mean
    over two members.
    """
    vision = seeded_model("tiny").vision
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    heads = np.random.default_rng(1).normal(size=(2, 40, 4)).astype(np.float32)
    features = np.asarray(clip.image_features(vision, images), np.float64)
    mask = np.ones(4, bool) if compared is None else np.array(compared)
    exponentials = np.exp(5 * features @ heads) * mask
    expected = np.mean(exponentials / np.sum(exponentials, axis=-1, keepdims=True), axis=0)
    members = tuple(lipsum.Classifier(vision, jnp.asarray(head)) for head in heads)
    actual, _ = evaluation.log_probabilities(
        members, jnp.float32(5), images, None if compared is None else mask
    )
    np.testing.assert_allclose(np.exp(actual), expected, rtol=1e-4)


# ------------------------------------------------------------------------------------- whole splits


def test_zero_shot_on_real_images_equals_pytorch() -> None:
    """Accuracies exactly, logits within 2e-3 (they are rounded), NLL and ECE within 1e-4, on every
    list.
    """
    root = shared("data/pacs")
    reference = json.loads(shared("weights/pacs-clip/reference.json").read_text())
    model, tokenizer = weights.load(str(shared("weights/pacs-clip/openai.pt")))
    images = layouts.read_domainnet(root, "photo", ("art_painting", "cartoon", "sketch"), "test")
    assert list(images.train.classes) == reference["classes"] and list(images.reports) == list(
        reference["splits"]
    )
    features = clip.prompt_features(model, tokenizer, images.train.classes, reference["templates"])
    classifier = lipsum.Classifier(model.vision, clip.zero_shot_head(features))
    tau = jnp.exp(model.logit_scale)
    np.testing.assert_allclose(tau, reference["logit_scale_exp"], rtol=1e-6)
    mesh = devices.device_mesh(64)
    image_features = jax.jit(clip.image_features)
    for name, expected in reference["splits"].items():
        split = images.reports[name]
        first = [str(file.path.relative_to(root)) for file in split.images[:4]]
        assert first == expected["first_files"]
        batch = next(data.evaluation_batches(split, model.config.preparation, 4, workers=1))
        logits = lipsum.logits(
            image_features(model.vision, jnp.asarray(batch["image"])), classifier.head, tau
        )
        np.testing.assert_allclose(logits, expected["first_logits"], rtol=0, atol=2e-3)
        actual = evaluation.metrics(evaluation.predict([classifier], tau, split, 64, 2, mesh))
        assert actual["n"] == expected["n"]
        assert round(actual["accuracy"] * 210) == round(expected["accuracy"] * 210), name
        assert abs(actual["accuracy"] - expected["accuracy"]) < 1e-6
        assert abs(actual["nll"] - expected["nll"]) < 1e-4
        assert abs(actual["ece"] - expected["ece"]) < 1e-4
    # Padding never changes a metric: 210 images fill batches of 8 and of 64 with 6 and 46 more.
    other = evaluation.metrics(
        evaluation.predict([classifier], tau, split, 8, 2, devices.device_mesh(8))
    )
    for metric in ("accuracy", "ece", "nll"):
        np.testing.assert_allclose(other[metric], actual[metric], rtol=0, atol=1e-6)
