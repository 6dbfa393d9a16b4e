"""OpenAI's published weights give what OpenAI published. `pytest -m weights` runs these where the cache holds them."""

from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from PIL import Image

import clip
import data
import weights

pytestmark = pytest.mark.weights


def cached(name: str) -> Path:
    """A file in the cache; skips the test where it is absent. Tests download nothing."""
    path = clip.cache_folder() / name
    if not path.exists():
        pytest.skip(f"{path} is missing (`python train.py --model ViT-B/32` downloads it)")
    return path


def test_probabilities_of_the_diagram() -> None:
    """The example in the README of github.com/openai/CLIP, which computes in float16 on a GPU."""
    for name in ("ViT-B-32.pt", clip.VOCABULARY_FILE):
        cached(name)
    with Image.open(shared("data/openai/CLIP.png")) as file:
        image = data.evaluation_image(file, 224)
    model, tokenizer = weights.load("ViT-B/32")
    assert model.config == clip.PRESETS["ViT-B/32"]
    head = clip.zero_shot_head(clip.prompt_features(model, tokenizer, ["a diagram", "a dog", "a cat"], ["{}"]))
    logits = np.exp(model.logit_scale) * np.asarray(clip.image_features(model.vision, image[None]) @ head)[0]
    probabilities = np.exp(logits - logits.max()) / np.sum(np.exp(logits - logits.max()))
    np.testing.assert_allclose(probabilities, [0.9927937, 0.00421068, 0.00299572], rtol=0, atol=5e-3)
