"""CLIP in JAX and Equinox: both towers, the table of weight names, heads from texts, tokenizer.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. `python train.py --method lipsum`
fine-tunes it. Equation numbers are those of the Lipsum-FT paper,
https://openreview.net/forum?id=2JF8mJRJ7M.

Each tower encodes ONE image or ONE text; `image_features` and `text_features` map over batches.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import ftfy
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from support import devices
from support.errors import InputError, few

Tokens = Float[Array, "tokens width"]  # of one image or text
Images = UInt8[Array, "batch height width 3"] | Float[Array, "batch height width 3"]

# ------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Transformer:
    """Sizes of one tower's transformer."""

    width: int
    layers: int
    heads: int
    mlp_width: int


@dataclass(frozen=True)
class Preparation:
    """How an image becomes a square of pixels, and how these are standardised.

    It is resized until its shorter edge, or with `squash` both edges, are `size + margin` pixels
    long. The square is the middle of that. The defaults are OpenAI's.
    """

    size: int  # pixels
    margin: int = 0  # pixels
    squash: bool = False
    resample: int = 3  # Pillow's filter: 2 is bilinear, 3 is bicubic
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # per channel
    deviation: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Config:
    """Sizes of a CLIP. `embedding_size` is D, the dimension of both image and text embeddings."""

    preparation: Preparation
    patch_size: int
    vision: Transformer
    text: Transformer
    embedding_size: int
    context_length: int = 77
    vocabulary_size: int = 49408
    start_token: int = 49406
    end_token: int = 49407
    activation: str = "quick_gelu"
    layer_norm_epsilon: float = 1e-5

    @property
    def image_size(self) -> int:
        """Side length, in pixels, of the images that the vision tower takes."""
        return self.preparation.size


_IMAGES = Preparation(224)
_BASE = Config(
    _IMAGES, 32, Transformer(768, 12, 12, 3072), Transformer(512, 12, 8, 2048), embedding_size=512
)
_LARGE = Config(
    _IMAGES, 14, Transformer(1024, 24, 16, 4096), Transformer(768, 12, 12, 3072), embedding_size=768
)
PRESETS = {
    "ViT-B/32": _BASE,
    "ViT-B/16": replace(_BASE, patch_size=16),
    "ViT-L/14": _LARGE,
    "ViT-L/14@336px": replace(_LARGE, preparation=Preparation(336)),
}

# -------------------------------------------------------------------------------------- towers

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    # By default, jax.nn.gelu is the tanh approximation.
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


def _linear(
    inputs: int, outputs: int, scale: float, key: PRNGKeyArray, use_bias: bool = True
) -> eqx.nn.Linear:
    """A linear layer with normally distributed weights of deviation `scale` and zero biases."""
    layer = eqx.nn.Linear(inputs, outputs, use_bias, key=key)
    weight = scale * jax.random.normal(key, (outputs, inputs))
    layer = eqx.tree_at(lambda layer: layer.weight, layer, weight)
    return eqx.tree_at(lambda layer: layer.bias, layer, jnp.zeros(outputs)) if use_bias else layer


def _apply(
    layer: eqx.nn.Linear, x: Float[Array, "tokens inputs"]
) -> Float[Array, "tokens outputs"]:
    """Applies a layer to all tokens in one matrix product.

    On CPU, a step takes 20% less time than with `jax.vmap(layer)`.
    """
    product = x @ layer.weight.T
    return product if layer.bias is None else product + layer.bias[None]


def _at_least_float32(x: Array) -> jnp.dtype:
    """Returns float32, or a larger type of `x`, for what would lose too much in bfloat16."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(x.dtype, jnp.float32)


class Block(eqx.Module):
    """A pre-LayerNorm residual block: self-attention, then a two-layer perceptron."""

    layer_norm1: eqx.nn.LayerNorm
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear
    layer_norm2: eqx.nn.LayerNorm
    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear
    heads: int = eqx.field(static=True)
    activation: str = eqx.field(static=True)
    causal: bool = eqx.field(static=True)

    def __init__(self, sizes: Transformer, config: Config, causal: bool, key: PRNGKeyArray):
        width = sizes.width
        residual = width**-0.5 * (2 * sizes.layers) ** -0.5
        keys = jax.random.split(key, 6)
        self.layer_norm1 = eqx.nn.LayerNorm(width, config.layer_norm_epsilon)
        self.query = _linear(width, width, width**-0.5, keys[0])
        self.key = _linear(width, width, width**-0.5, keys[1])
        self.value = _linear(width, width, width**-0.5, keys[2])
        self.out = _linear(width, width, residual, keys[3])
        self.layer_norm2 = eqx.nn.LayerNorm(width, config.layer_norm_epsilon)
        self.fc1 = _linear(width, sizes.mlp_width, (2 * width) ** -0.5, keys[4])
        self.fc2 = _linear(sizes.mlp_width, width, residual, keys[5])
        self.heads = sizes.heads
        self.activation = config.activation
        self.causal = causal

    def attention(
        self, x: Tokens, only: Int[Array, " rows"] | None = None
    ) -> Float[Array, "rows width"]:
        """Softmax attention over all tokens, from all tokens or from the rows `only`."""
        queries = x if only is None else x[only]
        # [heads, tokens, width / heads]: from here on, matrix products need no transposition.
        query, key, value = (
            _apply(layer, inputs).reshape(len(inputs), self.heads, -1).swapaxes(0, 1)
            for layer, inputs in ((self.query, queries), (self.key, x), (self.value, x))
        )
        scores = jnp.matmul(query, key.mT, preferred_element_type=_at_least_float32(x))
        scores = scores / query.shape[-1] ** 0.5
        if self.causal:
            positions = jnp.arange(len(x))
            rows = positions if only is None else only
            scores = jnp.where((positions[None] <= rows[:, None])[None], scores, -jnp.inf)
        mixed = jax.nn.softmax(scores).astype(value.dtype) @ value
        return _apply(self.out, mixed.swapaxes(0, 1).reshape(queries.shape))

    def mlp(self, x: Tokens) -> Tokens:
        return _apply(self.fc2, ACTIVATIONS[self.activation](_apply(self.fc1, x)))

    def __call__(
        self, x: Tokens, only: Int[Array, " rows"] | None = None
    ) -> Float[Array, "rows width"]:
        """Returns the block's output for all tokens, or for the rows `only`."""
        attended = self.attention(jax.vmap(self.layer_norm1)(x), only)
        x = (x if only is None else x[only]) + attended
        return x + self.mlp(jax.vmap(self.layer_norm2)(x))


def _draw_blocks(
    sizes: Transformer, config: Config, causal: bool, key: PRNGKeyArray
) -> tuple[Block, Block]:
    """Returns a tower's first blocks, stacked along a leading layer axis, and its last block."""
    keys = jax.random.split(key, sizes.layers)
    stack = eqx.filter_vmap(lambda key: Block(sizes, config, causal, key))(keys)
    return jax.tree.map(lambda leaf: leaf[:-1], stack), jax.tree.map(lambda leaf: leaf[-1], stack)


def _gathered(block: Block) -> Block:
    """Copies a layer's weights to every device of the mesh in use; a no-op without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return block
    return jax.lax.with_sharding_constraint(block, jax.sharding.PartitionSpec())


def run_blocks(
    blocks: Block, last: Block, x: Tokens, token: Int[Array, ""], recompute: bool = False
) -> Float[Array, " width"]:
    """Applies the blocks in sequence, and returns one token.

    `lax.scan` compiles one block, at any depth. Nothing reads the other tokens after the last
    block, so it computes its queries, output and perceptron for the one. It has leaves of its own,
    since a slice of the stack would be a copy, and it stores all that its backward pass reads,
    which comes first.

    The forward pass stores the results of matrix products. The backward pass computes all else
    again, which is faster than to store it. With `recompute`, only each block's input is stored.
    """

    def run(x: Tokens, block: Block) -> tuple[Tokens, None]:
        return _gathered(block)(x), None  # one layer at a time: all at once would not fit

    policy = None if recompute else jax.checkpoint_policies.dots_saveable
    run = jax.checkpoint(run, prevent_cse=False, policy=policy)  # in a scan, XLA cannot undo it
    return _gathered(last)(jax.lax.scan(run, x, blocks)[0], token[None])[0]


class VisionTower(eqx.Module):
    """`F_theta` before normalisation: a vision transformer, whose class token is projected."""

    class_embedding: Float[Array, " width"]
    patch_embedding: Float[Array, "width 3 patch patch"]
    position_embedding: Float[Array, "tokens width"]
    layer_norm_pre: eqx.nn.LayerNorm
    blocks: Block  # all but the last, stacked
    last: Block
    layer_norm_post: eqx.nn.LayerNorm
    projection: eqx.nn.Linear
    preparation: Preparation = eqx.field(static=True)

    def __init__(self, config: Config, key: PRNGKeyArray):
        sizes, patch = config.vision, config.patch_size
        tokens = 1 + (config.image_size // patch) ** 2
        keys = jax.random.split(key, 5)
        self.class_embedding = sizes.width**-0.5 * jax.random.normal(keys[0], (sizes.width,))
        self.patch_embedding = 0.02 * jax.random.normal(keys[1], (sizes.width, 3, patch, patch))
        positions = jax.random.normal(keys[2], (tokens, sizes.width))
        self.position_embedding = sizes.width**-0.5 * positions
        self.layer_norm_pre = eqx.nn.LayerNorm(sizes.width, config.layer_norm_epsilon)
        self.blocks, self.last = _draw_blocks(sizes, config, False, keys[3])
        self.layer_norm_post = eqx.nn.LayerNorm(sizes.width, config.layer_norm_epsilon)
        scale = sizes.width**-0.5
        self.projection = _linear(sizes.width, config.embedding_size, scale, keys[4], False)
        self.preparation = config.preparation

    def embed(self, image: Float[Array, "side side 3"]) -> Tokens:
        """Returns class token and patch embeddings, plus positions, after the first LayerNorm."""
        kernel = self.patch_embedding
        patch = kernel.shape[-1]
        rows, columns = image.shape[0] // patch, image.shape[1] // patch
        # A convolution whose stride is its kernel size is one matrix product: several times faster
        # on CPU.
        patches = image.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
        patches = patches.reshape(rows * columns, -1).astype(kernel.dtype)
        x = patches @ kernel.reshape(kernel.shape[0], -1).T
        x = jnp.concatenate([self.class_embedding[None], x]) + self.position_embedding
        return jax.vmap(self.layer_norm_pre)(x)

    def __call__(
        self, image: Float[Array, "side side 3"], recompute: bool = False
    ) -> Float[Array, " dim"]:
        """Returns the embedding of one standardised image, not normalised."""
        first = jnp.int32(0)  # the class token
        x = run_blocks(self.blocks, self.last, self.embed(image), first, recompute)
        return self.projection(self.layer_norm_post(x))


class TextTower(eqx.Module):
    """`G_phi` before normalisation: a causal transformer, whose end token is projected."""

    token_embedding: Float[Array, "vocabulary width"]
    position_embedding: Float[Array, "context width"]
    blocks: Block  # all but the last, stacked
    last: Block
    layer_norm_final: eqx.nn.LayerNorm
    projection: eqx.nn.Linear
    start_token: int = eqx.field(static=True)
    end_token: int = eqx.field(static=True)

    def __init__(self, config: Config, key: PRNGKeyArray):
        width = config.text.width
        keys = jax.random.split(key, 4)
        self.token_embedding = 0.02 * jax.random.normal(keys[0], (config.vocabulary_size, width))
        self.position_embedding = 0.01 * jax.random.normal(keys[1], (config.context_length, width))
        self.blocks, self.last = _draw_blocks(config.text, config, True, keys[2])
        self.layer_norm_final = eqx.nn.LayerNorm(width, config.layer_norm_epsilon)
        self.projection = _linear(width, config.embedding_size, width**-0.5, keys[3], False)
        self.start_token, self.end_token = config.start_token, config.end_token

    def embed(self, ids: Int[Array, " tokens"]) -> Tokens:
        return self.token_embedding[ids] + self.position_embedding[: ids.size]

    def __call__(self, ids: Int[Array, " tokens"]) -> Float[Array, " dim"]:
        """Returns the embedding of one text of at most `context_length` tokens, not normalised."""
        end = jnp.argmax(ids == self.end_token)
        x = run_blocks(self.blocks, self.last, self.embed(ids), end)
        return self.projection(self.layer_norm_final(x))


Tower = TypeVar("Tower", VisionTower, TextTower)


class CLIP(eqx.Module):
    """Both towers and the log of the logits' scale, initialised at random as in OpenAI's code."""

    vision: VisionTower
    text: TextTower
    logit_scale: Float[Array, ""]
    config: Config = eqx.field(static=True)

    def __init__(self, config: Config, key: PRNGKeyArray):
        vision_key, text_key = jax.random.split(key)
        self.vision = VisionTower(config, vision_key)
        self.text = TextTower(config, text_key)
        self.logit_scale = jnp.log(jnp.float32(1 / 0.07))
        self.config = config


# ------------------------------------------------------------------------------- table of names


class Names(NamedTuple):
    """A leaf of `CLIP` and the name of its entry in both published formats; `{}` is the layer.

    OpenAI stores query, key and value as parts 0, 1 and 2 of one entry, along its first axis.
    """

    leaf: str
    hugging_face: str
    openai: str
    part_in_openai: int | None = None
    transposed_in_openai: bool = False


def _layer(leaf: str, hugging_face: str, openai: str, part: int | None = None) -> list[Names]:
    """The weight and the bias of a layer. `openai` includes the separator before `weight`."""
    return [
        Names(f"{leaf}.{kind}", f"{hugging_face}.{kind}", f"{openai}{kind}", part)
        for kind in ("weight", "bias")
    ]


def _blocks(tower: str, hugging_face: str, openai: str) -> list[Names]:
    layers = [
        ("layer_norm1", "layer_norm1", "ln_1.", None),
        ("query", "self_attn.q_proj", "attn.in_proj_", 0),
        ("key", "self_attn.k_proj", "attn.in_proj_", 1),
        ("value", "self_attn.v_proj", "attn.in_proj_", 2),
        ("out", "self_attn.out_proj", "attn.out_proj.", None),
        ("layer_norm2", "layer_norm2", "ln_2.", None),
        ("fc1", "mlp.fc1", "mlp.c_fc.", None),
        ("fc2", "mlp.fc2", "mlp.c_proj.", None),
    ]
    return [
        names
        for stack in ("blocks", "last")
        for own, hf, oa, part in layers
        for names in _layer(
            f"{tower}.{stack}.{own}", f"{hugging_face}.{hf}", f"{openai}.{oa}", part
        )
    ]


_IMAGE, _TEXT = "vision_model.embeddings", "text_model.embeddings"
NAMES = [
    Names("logit_scale", "logit_scale", "logit_scale"),
    Names("vision.class_embedding", f"{_IMAGE}.class_embedding", "visual.class_embedding"),
    Names("vision.patch_embedding", f"{_IMAGE}.patch_embedding.weight", "visual.conv1.weight"),
    Names(
        "vision.position_embedding",
        f"{_IMAGE}.position_embedding.weight",
        "visual.positional_embedding",
    ),
    *_layer("vision.layer_norm_pre", "vision_model.pre_layrnorm", "visual.ln_pre."),
    *_blocks("vision", "vision_model.encoder.layers.{}", "visual.transformer.resblocks.{}"),
    *_layer("vision.layer_norm_post", "vision_model.post_layernorm", "visual.ln_post."),
    Names("vision.projection.weight", "visual_projection.weight", "visual.proj", None, True),
    Names("text.token_embedding", f"{_TEXT}.token_embedding.weight", "token_embedding.weight"),
    Names("text.position_embedding", f"{_TEXT}.position_embedding.weight", "positional_embedding"),
    *_blocks("text", "text_model.encoder.layers.{}", "transformer.resblocks.{}"),
    *_layer("text.layer_norm_final", "text_model.final_layer_norm", "ln_final."),
    Names("text.projection.weight", "text_projection.weight", "text_projection", None, True),
]
MAXIMAL_LOGIT_SCALE = 7.0  # logits of above 1,000 times a cosine; CLIP's own training stops at 100
# Entries of published files that are not weights.
_IGNORED = {
    "hugging_face": {"vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"},
    "openai": {"input_resolution", "context_length", "vocab_size", "attn_mask"},
}


def leaf_name(path: tuple) -> str:
    """Returns the dotted name of the leaf at `path` in a tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by dotted name."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def is_stacked(leaf_name: str) -> bool:
    """Whether the first axis of a leaf counts layers."""
    return ".blocks." in f".{leaf_name}"


def _layers_of(leaf_name: str, config: Config) -> Sequence[int]:
    """Returns the layers that a leaf has the weights of: 0 for one outside blocks."""
    tower, _, rest = leaf_name.partition(".")
    if rest.startswith("blocks."):
        return range(getattr(config, tower).layers - 1)
    return [getattr(config, tower).layers - 1] if rest.startswith("last.") else [0]


def to_state_dict(model: CLIP, style: str) -> dict[str, Array | np.ndarray]:
    """Returns the weights in PyTorch's layout, named as in `style`, `hugging_face` or `openai`."""
    leaves = named_leaves(model)
    parts: dict[str, list[Array | np.ndarray]] = {}
    for names in NAMES:
        leaf = leaves[names.leaf]
        arrays = leaf if is_stacked(names.leaf) else [leaf]
        for layer, array in zip(_layers_of(names.leaf, model.config), arrays, strict=True):
            if names.transposed_in_openai and style == "openai":
                array = array.T
            parts.setdefault(getattr(names, style).format(layer), []).append(array)
    joined = {name: jnp.concatenate(arrays) for name, arrays in parts.items() if len(arrays) > 1}
    return {name: joined.get(name, arrays[0]) for name, arrays in parts.items()}


def from_state_dict(
    state: Mapping[str, np.ndarray], config: Config, style: str, source: str
) -> CLIP:
    """Returns a CLIP with the given weights, cast to float32, from names of `style`.

    Raises one InputError that names the file, `source`, and the missing, unexpected and wrong
    entries.
    """
    skeleton = eqx.filter_eval_shape(CLIP, config, jax.random.key(0))
    entries = eqx.filter_eval_shape(to_state_dict, skeleton, style)
    expected = {name: leaf.shape for name, leaf in entries.items()}
    state = {name: array for name, array in state.items() if name not in _IGNORED[style]}
    if "logit_scale" in state and state["logit_scale"].shape == (1,):  # as some checkpoints have it
        state["logit_scale"] = state["logit_scale"].reshape(())
    problems = [f"lacks {name}" for name in expected if name not in state]
    problems += [f"unexpected {name!r}" for name in state if name not in expected]
    for name in expected.keys() & state.keys():
        if state[name].shape != expected[name]:
            problems.append(f"{name} has shape {state[name].shape}, not {expected[name]}")
        elif not jnp.issubdtype(state[name].dtype, jnp.floating):
            problems.append(f"{name} has dtype {state[name].dtype}, not a floating-point one")
        elif not np.all(np.isfinite(state[name])):
            problems.append(f"{name} is not finite")
        elif name == "logit_scale" and state[name] > MAXIMAL_LOGIT_SCALE:
            scale = float(state[name])
            problems.append(f"logit_scale is {scale:.4g}, not a logarithm: store its logarithm")
    if problems:
        raise InputError(
            f"weights {source} do not fit the model's sizes; download them and their configuration "
            f"again: {few(sorted(problems), '; ', 6)}"
        )

    def read(names: Names, layer: int) -> np.ndarray:
        array = state[getattr(names, style).format(layer)]
        if names.transposed_in_openai and style == "openai":
            array = array.T
        if names.part_in_openai is not None and style == "openai":
            array = np.split(array, 3)[names.part_in_openai]
        return array.astype(np.float32)

    leaves = named_leaves(skeleton)
    for names in NAMES:
        arrays = [read(names, layer) for layer in _layers_of(names.leaf, config)]
        leaf = np.asarray(arrays, np.float32).reshape(leaves[names.leaf].shape)
        leaves[names.leaf] = jnp.asarray(leaf)
    return jax.tree.unflatten(jax.tree.structure(skeleton), list(leaves.values()))


# --------------------------------------------------------------------------- features and heads


def normalize(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Divides `x` by its Euclidean norm along the last axis."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def standardize(
    images: UInt8[Array, "*batch height width 3"] | Float[Array, "*batch height width 3"],
    vision: VisionTower,
) -> Float[Array, "*batch height width 3"]:
    """Standardises bytes, or floats in [0, 1], with the tower's channel means and deviations."""
    if images.dtype == jnp.uint8:
        images = images.astype(jnp.float32) / 255

    def per_channel(values: tuple[float, ...]) -> Array:
        return jnp.asarray(values, images.dtype).reshape((1,) * (images.ndim - 1) + (3,))

    preparation = vision.preparation
    return (images - per_channel(preparation.mean)) / per_channel(preparation.deviation)


def compute_in(tower: Tower, precision: str) -> Tower:
    """Casts the tower to `precision`, but for LayerNorms, which compute in float32.

    A no-op for float32.
    """
    if precision == "float32":
        return tower

    def cast(node: Any) -> Any:
        return node if isinstance(node, eqx.nn.LayerNorm) else node.astype(precision)

    return jax.tree.map(cast, tower, is_leaf=lambda node: isinstance(node, eqx.nn.LayerNorm))


def _unit_norm(embeddings: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
    """Normalises in float32 at least, whatever type the tower computes in."""
    return normalize(embeddings.astype(_at_least_float32(embeddings)))


def image_features(
    vision: VisionTower, images: Images, recompute: bool = False
) -> Float[Array, "batch dim"]:
    """`F_theta(x)`: unit-norm embeddings of images, which are bytes or floats in [0, 1]."""
    return _unit_norm(jax.vmap(lambda image: vision(image, recompute))(standardize(images, vision)))


def text_features(text: TextTower, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch dim"]:
    """`G_phi(t)`: unit-norm embeddings of tokenized texts."""
    return _unit_norm(jax.vmap(text)(ids))


_text_features = jax.jit(text_features)
PromptFeatures = Float[np.ndarray, "templates classes dim"]


def prompt_features(
    model: CLIP,
    tokenizer: Tokenizer,
    classes: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> PromptFeatures:
    """`G_phi(template_j(class_k))` for every template and class.

    Raises InputError if a prompt exceeds the context.
    """
    prompts = [template.replace("{}", name) for template in templates for name in classes]
    ids = without_padding(tokenize(tokenizer, prompts, model.config), model.config)
    batch_size = min(batch_size, len(ids))
    # Batches of one shape need one compilation.
    padded = np.concatenate([ids, ids[: -len(ids) % batch_size]])
    batches = padded.reshape(-1, batch_size, ids.shape[1])
    # With --fsdp, each process may have a part of them.
    features = [devices.fetch(_text_features(model.text, batch)) for batch in batches]
    return np.concatenate(features)[: len(ids)].reshape(len(templates), len(classes), -1)


def zero_shot_head(features: PromptFeatures) -> Float[Array, "dim classes"]:
    """The head `W` of equation 1: per class, the normalised mean over templates."""
    return normalize(jnp.mean(features, axis=0)).T


def context_head(features: PromptFeatures) -> Float[Array, "dim templates"]:
    """The context head `C` of equation 15: per template, the normalised mean over classes."""
    return normalize(jnp.mean(features, axis=1)).T


# ----------------------------------------------------------------------------------- tokenizer

# Apostrophe endings, words, single digits, runs of anything else. OpenAI uses `regex` and ignores
# case: the long s (U+017F) then matches s, and the last class excludes the combining iota (U+0345).
_WORD = Regex("'[s\u017f]|'t|'re|'ve|'m|'ll|'d|\\p{L}+|\\p{N}|[^\\s\\p{L}\\p{N}\u0345]+")
_SPACE = r"[^\S\x1c-\x1f]+"  # white space as `regex` defines it: without the ASCII separators
START_TEXT, END_TEXT = "<|startoftext|>", "<|endoftext|>"


def bpe_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Returns CLIP's byte-pair encoder, in which words end with `</w>`."""
    encoder = models.BPE(vocabulary, merges, unk_token=END_TEXT, end_of_word_suffix="</w>")
    tokenizer = Tokenizer(encoder)
    one_space = normalizers.Replace(Regex(_SPACE), " ")
    tokenizer.normalizer = normalizers.Sequence([one_space, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_WORD, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [(token, vocabulary[token]) for token in (START_TEXT, END_TEXT)]
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{START_TEXT} $A {END_TEXT}", special_tokens=special
    )
    added = [AddedToken(token, normalized=False, special=True) for token, _ in special]
    tokenizer.add_special_tokens(added)
    return tokenizer


def clean_text(text: str) -> str:
    """Cleans a text as OpenAI does.

    Repairs mis-decoded text, unescapes HTML entities twice, collapses white space, lowercases.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(_SPACE, " ", text).strip().lower()


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], config: Config, truncate: bool = False
) -> Int[np.ndarray, "texts context"]:
    """Returns start token, tokens, end token, and zeros up to the context length, per text.

    `truncate` shortens texts that are too long. Without it, they raise InputError.
    """
    room = config.context_length - 2
    ids = np.zeros((len(texts), config.context_length), np.int32)
    cleaned = [clean_text(text) for text in texts]
    encodings = tokenizer.encode_batch(cleaned, add_special_tokens=False)
    for row, text, encoding in zip(ids, texts, encodings, strict=True):
        count = len(encoding.ids)
        if count > room and not truncate:
            raise InputError(
                f"the text {text!r} has {count} tokens, the model takes {room}: shorten it"
            )
        tokens = [config.start_token, *encoding.ids[:room], config.end_token]
        row[: len(tokens)] = tokens
    return ids


def without_padding(
    ids: Int[np.ndarray, "texts context"], config: Config
) -> Int[np.ndarray, "texts longest"]:
    """Cuts tokenized texts after the end token of the longest one."""
    return ids[:, : 1 + np.max(np.argmax(ids == config.end_token, axis=1))]
