"""OpenAI's published weights give what OpenAI published.

`pytest -m weights` runs these where the cache holds them.
"""

import huggingface_hub
import numpy as np
import pytest
from conftest import shared
from PIL import Image

import clip
import data
import eval as evaluation
from support import layouts, weights
from support.run import options
from support.run.setup import open_setups
from support.weights import hub

pytestmark = pytest.mark.weights


def needs(name: str) -> None:
    """Skips the test if the hub's cache lacks the model. Tests download nothing."""
    if not huggingface_hub.try_to_load_from_cache(hub.OPENAI[name], "config.json"):
        pytest.skip(f"the cache lacks {name} (`python train.py --model {name}` downloads it)")


def test_probabilities_of_the_diagram() -> None:
    """The example in the README of github.com/openai/CLIP, which computes in float16 on a GPU."""
    needs("ViT-B/32")
    with Image.open(shared("data/openai/CLIP.png")) as file:
        image = data.evaluation_image(file, clip.Preparation(224))
    model, tokenizer = weights.load("ViT-B/32")
    assert model.config == clip.PRESETS["ViT-B/32"]
    head = clip.zero_shot_head(
        clip.prompt_features(model, tokenizer, ["a diagram", "a dog", "a cat"], ["{}"])
    )
    logits = (
        np.exp(model.logit_scale)
        * np.asarray(clip.image_features(model.vision, image[None]) @ head)[0]
    )
    probabilities = np.exp(logits - logits.max()) / np.sum(np.exp(logits - logits.max()))
    np.testing.assert_allclose(
        probabilities, [0.9927937, 0.00421068, 0.00299572], rtol=0, atol=5e-3
    )


# Per cent, the paper's Table 4: ImageNet, V2, R, A, Sketch. (Its Table 1 has 62.0 for B/16, V2.)
ZERO_SHOT = {
    "ViT-B/32": (63.2, 56.4, 68.4, 32.4, 41.2),
    "ViT-B/16": (68.2, 62.1, 76.3, 52.1, 46.7),
    "ViT-L/14": (75.2, 69.9, 86.9, 71.8, 58.6),
}


@pytest.mark.parametrize("name", ZERO_SHOT)
def test_zero_shot_accuracies_on_imagenet(name: str) -> None:
    """Half a point is left for what published figures differ by among themselves (B/32: 63.2 to
    63.4).
    """
    needs(name)
    root = shared("data/imagenet")
    sources = options.Sources(name, "imagenet", "imagenet", templates="openai", select_on="test")
    execution = options.Execution(precision="float32", data_root=root)
    (setup,) = open_setups([sources], execution, batch_size=256)
    predictions = evaluation.predict_reports(setup, [setup.zero_shot])
    found = evaluation.results_of(setup, predictions, predictions)
    assert "imagenet" in found
    for split, published in zip(layouts.imagenet.IMAGENET, ZERO_SHOT[name], strict=True):
        if split in found:
            assert abs(100 * found[split]["accuracy"] - published) < 0.5, split
