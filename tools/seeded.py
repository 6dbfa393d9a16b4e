"""Weights, images and texts drawn from a seed: what `tests/reference/` was recorded from.

They are drawn again where they are needed; the repository stores only the reference outputs.
`python -m tools.record_reference` passes them to PyTorch, the tests to this project's code.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

SEED = 0
IMAGES = 4
TEXTS = 6

_VIT_BASE = {
    "image_size": 224,
    "patch_size": 32,
    "vision_width": 768,
    "vision_layers": 12,
    "vision_heads": 12,
    "text_width": 512,
    "text_layers": 12,
    "text_heads": 8,
    "context_length": 77,
    "vocabulary_size": 49408,
    "embedding_size": 512,
}

# Every MLP is four times as wide as its tower.
ARCHITECTURES = {
    "tiny": {
        "image_size": 32,
        "patch_size": 8,
        "vision_width": 64,
        "vision_layers": 3,
        "vision_heads": 4,
        "text_width": 48,
        "text_layers": 2,
        "text_heads": 3,
        "context_length": 16,
        "vocabulary_size": 100,
        "embedding_size": 40,
    },
    "ViT-B/32": _VIT_BASE,
    "ViT-B/16": _VIT_BASE | {"patch_size": 16},
    "ViT-L/14": _VIT_BASE
    | {
        "patch_size": 14,
        "vision_width": 1024,
        "vision_layers": 24,
        "vision_heads": 16,
        "text_width": 768,
        "text_heads": 12,
        "embedding_size": 768,
    },
}

# Heads that are not 64 wide, as in ViT-H and its like.
ARCHITECTURES["heads-80"] = ARCHITECTURES["tiny"] | {
    "vision_width": 160,
    "vision_heads": 2,
    "vision_layers": 1,
}
# Small enough to record whole gradients.
ARCHITECTURES["nano"] = ARCHITECTURES["tiny"] | {
    "image_size": 16,
    "vision_width": 16,
    "vision_layers": 2,
    "vision_heads": 2,
    "text_width": 16,
    "text_heads": 2,
    "embedding_size": 8,
}

Tensor = tuple[str, tuple[int, ...], float, float]  # name, shape, mean, standard deviation


def hugging_face_weights(architecture: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Returns random float32 weights as in `transformers.CLIPModel.state_dict()`.

    One generator draws them in the order of the returned dict: text tower, vision tower,
    projections. Order in a tower: embeddings, blocks, last LayerNorm. Order in a block: LayerNorm,
    attention (query, key, value, out), LayerNorm, MLP. `logit_scale` comes first. It is not drawn:
    it is log(100), as in the published models.
    """
    generator = np.random.default_rng(seed)
    weights = {"logit_scale": np.array(np.log(100), np.float32)}
    for name, shape, mean, deviation in _tensors(architecture):
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(deviation)
        values += np.float32(mean)
        weights[name] = values
    return weights


def images(architecture: dict[str, int], seed: int, number: int) -> np.ndarray:
    """Returns random colour fields with a little noise: uint8 `[number, height, width, 3]`."""
    generator = np.random.default_rng(seed)
    return np.stack([_image(generator, architecture["image_size"]) for _ in range(number)])


# Width and height. A centre crop that cuts off 3, 7, 11, ... pixels, as of the last one, begins at
# half of them rounded down in `transformers`, and up in torchvision.
PICTURES = [(24, 16), (16, 21), (50, 40), (9, 12), (30, 30), (16, 19)]


def pictures(seed: int) -> list[np.ndarray]:
    """Returns noise of other sizes than a model takes: uint8 `[height, width, 3]` each."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (h, w, 3), np.uint8) for w, h in PICTURES]


def token_ids(architecture: dict[str, int], seed: int, number: int) -> np.ndarray:
    """Returns int32 `[number, context_length]`: start, random tokens, end, zeros.

    The first text has no zeros.
    """
    generator = np.random.default_rng(seed)
    context_length = architecture["context_length"]
    end = architecture["vocabulary_size"] - 1
    start = end - 1
    lengths = generator.integers(0, context_length - 1, number)
    lengths[0] = context_length - 2
    texts = np.zeros((number, context_length), np.int32)
    for text, length in zip(texts, lengths, strict=True):
        text[: length + 2] = [start, *generator.integers(0, start, length), end]
    return texts


def fine_tuning(seed: int) -> dict[str, Any]:
    """Returns the inputs of one step of every method, at the size `nano`.

    `zero_shot` and `trained` are weights by name. `trained` has a changed vision tower; otherwise
    the regularizers would be zero. Unit-norm heads are [dim, classes] and [dim, templates]; `texts`
    is [texts, tokens]; `probe_*` is the data of a linear probe.
    """
    architecture = ARCHITECTURES["nano"]
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    def unit_columns(columns: int) -> np.ndarray:
        head = normal(architecture["embedding_size"], columns)
        return head / np.linalg.norm(head, axis=0)

    zero_shot = hugging_face_weights(architecture, seed)
    vision = ("vision_model", "visual_projection")
    trained = dict(zero_shot)
    for name, weight in zero_shot.items():
        if name.startswith(vision):
            trained[name] = weight + np.float32(0.02) * normal(*weight.shape)
    head = unit_columns(5)
    texts = generator.integers(0, 98, (9, 6)).astype(np.int32)
    texts[:, 0], texts[:, -1] = 98, 99
    probe_features = unit_columns(60).T
    return {
        "zero_shot": zero_shot,
        "trained": trained,
        "zero_shot_head": head,
        "trained_head": head + np.float32(0.05) * normal(*head.shape),
        "context_head": unit_columns(7),
        "images": images(architecture, seed, 6),
        "labels": generator.integers(0, 5, 6).astype(np.int32),
        "texts": texts,
        "probe_features": probe_features,
        "probe_labels": generator.integers(0, 5, 60).astype(np.int32),
    }


def _tensors(architecture: dict[str, int]) -> Iterator[Tensor]:
    """Yields every drawn tensor, with the standard deviations of CLIP's initialization."""
    text_width, vision_width = architecture["text_width"], architecture["vision_width"]
    patch_size, embedding_size = architecture["patch_size"], architecture["embedding_size"]
    embeddings = "text_model.embeddings"
    tokens = (architecture["vocabulary_size"], text_width)
    yield f"{embeddings}.token_embedding.weight", tokens, 0, 0.02
    positions = (architecture["context_length"], text_width)
    yield f"{embeddings}.position_embedding.weight", positions, 0, 0.01
    yield from _blocks("text_model", architecture["text_layers"], text_width)
    yield from _layer_norm("text_model.final_layer_norm", text_width)
    embeddings = "vision_model.embeddings"
    deviation = vision_width**-0.5
    yield f"{embeddings}.class_embedding", (vision_width,), 0, deviation
    kernel = (3, patch_size, patch_size)
    patches = (vision_width, *kernel)
    yield f"{embeddings}.patch_embedding.weight", patches, 0, np.prod(kernel) ** -0.5
    positions = ((architecture["image_size"] // patch_size) ** 2 + 1, vision_width)
    yield f"{embeddings}.position_embedding.weight", positions, 0, deviation
    yield from _layer_norm("vision_model.pre_layrnorm", vision_width)
    yield from _blocks("vision_model", architecture["vision_layers"], vision_width)
    yield from _layer_norm("vision_model.post_layernorm", vision_width)
    yield "text_projection.weight", (embedding_size, text_width), 0, text_width**-0.5
    yield "visual_projection.weight", (embedding_size, vision_width), 0, deviation


def _blocks(tower: str, layers: int, width: int) -> Iterator[Tensor]:
    inward, outward, hidden = width**-0.5, (2 * layers * width) ** -0.5, (2 * width) ** -0.5
    for layer in range(layers):
        block = f"{tower}.encoder.layers.{layer}"
        yield from _layer_norm(f"{block}.layer_norm1", width)
        for projection in ("q_proj", "k_proj", "v_proj"):
            yield from _linear(f"{block}.self_attn.{projection}", width, width, inward)
        yield from _linear(f"{block}.self_attn.out_proj", width, width, outward)
        yield from _layer_norm(f"{block}.layer_norm2", width)
        yield from _linear(f"{block}.mlp.fc1", 4 * width, width, hidden)
        yield from _linear(f"{block}.mlp.fc2", width, 4 * width, outward)


def _linear(name: str, outputs: int, inputs: int, deviation: float) -> Iterator[Tensor]:
    yield f"{name}.weight", (outputs, inputs), 0, deviation
    yield f"{name}.bias", (outputs,), 0, 0.1


def _layer_norm(name: str, width: int) -> Iterator[Tensor]:
    # With the usual ones and zeros, a mistake in scale or shift would not change the output.
    yield f"{name}.weight", (width,), 1, 0.1
    yield f"{name}.bias", (width,), 0, 0.1


def _image(generator: np.random.Generator, size: int) -> np.ndarray:
    noise = generator.random((size, size, 3))
    coarse, fine = _colour_field(generator, size, 3), _colour_field(generator, size, 9)
    mixture = 0.6 * coarse + 0.3 * fine + 0.1 * noise
    return np.clip(256 * (1.8 * (mixture - 0.5) + 0.5), 0, 255).astype(np.uint8)


def _colour_field(generator: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Returns colours in [0, 1], bilinear between random ones at corners of `cells` x `cells`.

    It uses sums and products only: the last bit of a sine, and so a rounded pixel, can differ
    between machines.
    """
    corners = generator.random((cells + 1, cells + 1, 3))
    position = np.arange(size) * cells / size
    lower = position.astype(int)
    fraction = (position - lower)[:, None]
    rows = corners[lower] + fraction[:, :, None] * (corners[lower + 1] - corners[lower])
    return rows[:, lower] + fraction * (rows[:, lower + 1] - rows[:, lower])
