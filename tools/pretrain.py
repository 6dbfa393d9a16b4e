"""Contrastive pre-training of a tiny CLIP: the loss, its step, and the command.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020.

    python -m tools.pretrain --out my-clip
"""

import dataclasses
import math
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Int, Int32, PyTree, UInt8
from tokenizers import Tokenizer

import clip
import data
import eval as evaluation
import lipsum
from support import devices, weights
from support.errors import InputError, exit_code
from support.layouts import minidomain
from support.run.logs import Log
from tools.captions import CAPTIONS, draw_corpus, train_tokenizer

# Image and patch size and both towers. `pretrain` sets the vocabulary size and special tokens.
VISION = clip.Transformer(96, 4, 3, 384)
TEXT = clip.Transformer(96, 2, 3, 384)
TINY_SIZES = clip.Config(
    clip.Preparation(36), 6, VISION, TEXT, embedding_size=64, context_length=16
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of pre-training. The defaults are those of the embedded tiny model."""

    steps: int = 2_000
    """Number of updates."""
    batch_size: int = 128
    """Images per update, over all devices."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW. Muon's is ten times as high."""
    weight_decay: float = 0.05
    """Weight decay of embeddings and projections."""
    matrix_weight_decay: float = 0.01
    """Weight decay of the matrices in transformer blocks."""
    warmup: float = 0.05
    """Fraction of the steps over which the learning rates rise from 0."""
    final_rate: float = 0.02
    """Final learning rates, as a fraction of the peak."""
    shift: int = 2
    """Augmentation: each image is shifted by up to this many pixels."""


class State(NamedTuple):
    """What a step updates."""

    model: clip.CLIP
    optimizer: optax.OptState


class Corpus(NamedTuple):
    """Images and their tokenized captions, of which each image has four, one after the other."""

    images: UInt8[np.ndarray, "images side side 3"]
    ids: Int32[np.ndarray, "four_times_images tokens"]


# ---------------------------------------------------------------------------------- loss and update


def contrastive_loss(
    images: lipsum.Features,
    texts: lipsum.Features,
    ids: Int[Array, "batch tokens"],
    scale: lipsum.Scalar,
) -> lipsum.Scalar:
    """CLIP's figure 3: the mean of the image-to-text and text-to-image cross-entropies, in nats.

    Pairs with the same caption are not negatives of each other.
    """
    logits = scale * images @ texts.T
    same_text = jnp.all(ids[:, None] == ids[None], axis=2)
    logits = jnp.where(same_text & ~jnp.eye(len(ids), dtype=bool), -jnp.inf, logits)
    pair_logits = jnp.diagonal(logits)
    image_to_text = jax.nn.logsumexp(logits, axis=1) - pair_logits
    text_to_image = jax.nn.logsumexp(logits, axis=0) - pair_logits
    return (jnp.mean(image_to_text) + jnp.mean(text_to_image)) / 2


def parameter_kinds(model: PyTree) -> PyTree[str]:
    """Returns `matrix` per matrix in a block, `embedding` per other matrix, `vector` otherwise."""

    def kind(path: tuple, leaf: Array) -> str:
        if len(lipsum.tensor_axes(path, leaf)) < 2:
            return "vector"
        in_block = {"blocks", "last"} & set(clip.leaf_name(path).split("."))
        return "matrix" if in_block else "embedding"

    return jax.tree_util.tree_map_with_path(kind, model)


def muon_and_adamw(recipe: Recipe) -> optax.GradientTransformation:
    """Returns Muon for each layer's matrices in the blocks, and AdamW for the rest.

    Muon: https://kellerjordan.github.io/posts/muon. With AdamW alone the loss stays at log(batch)
    nats for most of a short run.
    """
    schedule = {"steps": recipe.steps, "warmup": recipe.warmup, "final": recipe.final_rate}
    rate = partial(lipsum.warmup_cosine, **schedule)
    adamw = partial(optax.adamw, rate(recipe.learning_rate), b1=0.9, b2=0.98, eps=1e-6)
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    muon = optax.contrib.muon(
        rate(10 * recipe.learning_rate),
        # With one triple per iteration, optax scans over the five iterations. With a single triple
        # it unrolls them, which takes longer to compile than everything else.
        ns_coeffs=((3.4445, -4.7750, 2.0315),) * 5,
        ns_steps=5,
        beta=0.95,
        weight_decay=recipe.matrix_weight_decay,
        muon_weight_dimension_numbers=axes,
    )
    per_kind = {
        "matrix": muon,
        "embedding": adamw(weight_decay=recipe.weight_decay),
        "vector": adamw(weight_decay=0.0),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(per_kind, parameter_kinds))


@partial(jax.jit, static_argnames="recipe")
def initial_state(model: clip.CLIP, recipe: Recipe) -> State:
    """Returns the state before the first step, with a copy of the model: steps donate theirs."""
    return State(model, muon_and_adamw(recipe).init(model))


def clip_loss(model: clip.CLIP, batch: dict[str, Array]) -> lipsum.Scalar:
    """`contrastive_loss` of a batch."""
    images = clip.image_features(model.vision, batch["image"])
    texts = clip.text_features(model.text, batch["ids"])
    return contrastive_loss(images, texts, batch["ids"], jnp.exp(model.logit_scale))


@partial(jax.jit, static_argnames="recipe", donate_argnums=0)
def clip_step(
    state: State, batch: dict[str, Array], recipe: Recipe
) -> tuple[State, lipsum.Metrics]:
    """One update, with the scale of the logits capped at 100. Donates the state."""
    model, optimizer = state
    loss, gradient = jax.value_and_grad(clip_loss)(model, batch)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer count with floats
        updates, optimizer = muon_and_adamw(recipe).update(gradient, optimizer, model)
    model = optax.apply_updates(model, updates)
    capped = jnp.minimum(model.logit_scale, math.log(100))
    model = eqx.tree_at(lambda model: model.logit_scale, model, capped)
    metrics = {"loss": loss, "scale": jnp.exp(capped), "gradient_norm": optax.tree.norm(gradient)}
    return State(model, optimizer), metrics


# ----------------------------------------------------------------------------- batches and training


def draw_batch(corpus: Corpus, t: int, recipe: Recipe, seed: int) -> dict[str, np.ndarray]:
    """Returns batch t, a pure function of the arguments: shifted images, and a caption of each."""
    number = len(corpus.images)
    size = recipe.batch_size
    epoch, place = divmod(t, number // size)
    order = np.random.default_rng([seed, 0, epoch]).permutation(number)
    chosen = order[place * size :][:size]
    rng = np.random.default_rng([seed, 1, t])
    caption = rng.integers(CAPTIONS * chosen, CAPTIONS * (chosen + 1))
    pixels = np.arange(corpus.images.shape[1])
    shifts = rng.integers(-recipe.shift, recipe.shift + 1, (2, size, 1))
    rows, columns = np.clip(pixels + shifts, 0, pixels[-1])  # repeats the edges
    images = corpus.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    return {"image": images, "ids": corpus.ids[caption]}


def pretrain(
    images: UInt8[np.ndarray, "images side side 3"],
    captions: list[list[str]],
    recipe: Recipe,
    seed: int,
) -> tuple[clip.CLIP, Tokenizer, float]:
    """Trains a tiny CLIP from random weights. Returns it, its tokenizer, and the time in seconds.

    Raises InputError if the batch does not divide among the devices, or a loss is not finite.
    """
    mesh = devices.device_mesh(recipe.batch_size)
    texts = [text for per_image in captions for text in per_image]
    tokenizer = train_tokenizer(texts)
    size = tokenizer.get_vocab_size()
    config = dataclasses.replace(
        TINY_SIZES, vocabulary_size=size, start_token=size - 2, end_token=size - 1
    )
    corpus = Corpus(images, clip.tokenize(tokenizer, texts, config))
    model = jax.jit(clip.CLIP, static_argnums=0)(config, jax.random.key(seed))
    state = devices.place(initial_state(model, recipe), mesh)
    with Log(f"clip seed {seed}", 0, recipe.steps, recipe.batch_size) as log:
        for t in range(recipe.steps):
            batch = devices.shard_batch(draw_batch(corpus, t, recipe, seed), mesh)
            state, metrics = clip_step(state, batch, recipe)
            log.add(t + 1, metrics)
        log.settle()
        return state.model, tokenizer, log.seconds()


def zero_shot_accuracies(model: clip.CLIP, tokenizer: Tokenizer, split: str) -> dict[str, float]:
    """Returns the accuracy (a fraction) per domain of the embedded benchmark's `val` or `test`."""
    features = clip.prompt_features(model, tokenizer, minidomain.CLASSES, minidomain.TEMPLATES)
    classifier = lipsum.Classifier(model.vision, clip.zero_shot_head(features))
    tau = jnp.exp(model.logit_scale)
    batch_size = devices.evaluation_batch_size(512)
    mesh = devices.device_mesh(batch_size)
    accuracies = {}
    for domain in minidomain.DOMAINS:
        images = data.Split(domain, minidomain.CLASSES, *minidomain.load_domain(domain, split))
        predictions = evaluation.predict([classifier], tau, images, batch_size, 1, mesh)
        accuracies[domain] = float(np.mean(predictions.correct))
    return accuracies


def model_card(
    recipe: Recipe, seed: int, seconds: float, accuracies: dict[str, dict[str, float]]
) -> str:
    """Returns the content of README.md. `accuracies` are per split and domain."""
    options = shlex.join(sys.argv[1:])
    hardware = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(recipe).items())
    table = f"| split | {' | '.join(minidomain.DOMAINS)} |\n"
    table += f"{'|---' * (1 + len(minidomain.DOMAINS))}|\n"
    for split, per_domain in accuracies.items():
        percent = " | ".join(f"{100 * accuracy:.1f}" for accuracy in per_domain.values())
        table += f"| {split} | {percent} |\n"
    return f"""# A CLIP made by contrastive pre-training

Made by `python -m tools.pretrain {options}` in {seconds / 60:.0f} minutes on {hardware}, \
seed {seed}. Weights are stored in float16.

Settings: {settings}.

Zero-shot accuracy of the stored model in percent, the prompts `minidomain.TEMPLATES`:

{table}"""


def main(out: Path, seed: int = 0, recipe: Recipe = Recipe()) -> None:
    """Pre-train a tiny CLIP on drawn images with captions, evaluate it, and write a model card.

    Args:
        out: New folder to write: a Hugging Face CLIP folder in float16, with README.md.
        seed: Seed of the weights, the order of images, the choice of captions, and the shifts.
    """
    if out.exists():
        raise InputError(f"--out {out} exists: give a new folder")
    model, tokenizer, seconds = pretrain(*draw_corpus(), recipe, seed)
    weights.save(out, model, tokenizer, np.float16)
    stored = weights.load(str(out))
    accuracies = {split: zero_shot_accuracies(*stored, split) for split in ("val", "test")}
    card = model_card(recipe, seed, seconds, accuracies)
    (out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    sys.exit(
        exit_code(lambda: tyro.cli(main, prog="python -m tools.pretrain", config=config), logs=True)
    )
