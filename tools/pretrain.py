"""Contrastive pre-training of a tiny CLIP: the symmetric image-text loss, its training step, and the command.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. This command made assets/tiny-clip:

    python -m tools.pretrain --out assets/tiny-clip --seed 0

With `--data-root DIR` it trains on a folder of images with `captions.tsv`, one line `path<TAB>text` per caption.
"""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Int, Int32, PyTree, UInt8
from tokenizers import Tokenizer, trainers
from tqdm.contrib.concurrent import thread_map

import clip
import data
import eval as evaluation
import lipsum
from clip import END_TEXT, START_TEXT
from support import devices, weights
from support.errors import InputError, check_positive, exit_code, read_lines
from support.layouts import minidomain
from support.run.logs import Log

# Image size, patch size, both towers; `pretrain` sets the vocabulary size and the special tokens.
TINY_SIZES = clip.Config(
    36,
    6,
    clip.Transformer(96, 4, 3, 384),
    clip.Transformer(96, 2, 3, 384),
    embedding_size=64,
    context_length=16,
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
    vocabulary_size: int = 49_408
    """Maximal number of tokens in the vocabulary."""


class PretrainingState(eqx.Module):
    """Everything that a step updates, and its recipe."""

    model: clip.CLIP
    optimizer: optax.OptState
    step: Int[Array, ""]
    recipe: Recipe = eqx.field(static=True)


CaptionedBatch = dict[
    str, UInt8[np.ndarray, "batch height width 3"] | Int[np.ndarray, "batch tokens"]
]  # `image`, `ids`

# ------------------------------------------------------------------------------------------------------ loss and update


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
    """Returns `matrix` per matrix in a block, `embedding` per other array of two or more axes, `vector` otherwise."""

    def kind(path: tuple, leaf: Array) -> str:
        axes = lipsum.tensor_axes(path, leaf)
        if len(axes) < 2:
            return "vector"
        return "matrix" if axes[0] > 0 else "embedding"  # in a block, axis 0 counts the layers

    return jax.tree_util.tree_map_with_path(kind, model)


def muon_and_adamw(recipe: Recipe) -> optax.GradientTransformation:
    """Muon (https://kellerjordan.github.io/posts/muon) per matrix and layer of the blocks, AdamW for the rest.

    With AdamW alone the loss stays at log(batch) nats for most of a short run.
    """
    rate = partial(
        lipsum.warmup_cosine, steps=recipe.steps, warmup=recipe.warmup, final=recipe.final_rate
    )
    adamw = partial(optax.adamw, rate(recipe.learning_rate), b1=0.9, b2=0.98, eps=1e-6)
    muon = optax.contrib.muon(
        rate(10 * recipe.learning_rate),
        # With one triple per iteration, optax scans over the five iterations. With a single triple it unrolls them,
        # which takes longer to compile than everything else.
        ns_coeffs=((3.4445, -4.7750, 2.0315),) * 5,
        ns_steps=5,
        beta=0.95,
        weight_decay=recipe.matrix_weight_decay,
        muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(
            reduction_axis=2, output_axis=1
        ),
    )
    per_kind = {
        "matrix": muon,
        "embedding": adamw(weight_decay=recipe.weight_decay),
        "vector": adamw(weight_decay=0.0),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(per_kind, parameter_kinds))


@partial(jax.jit, static_argnames="recipe")
def pretraining_state(model: clip.CLIP, recipe: Recipe) -> PretrainingState:
    """Returns the state before the first step. It holds a copy of the model, because steps donate their state."""
    return PretrainingState(model, muon_and_adamw(recipe).init(model), jnp.int32(0), recipe)


def clip_loss(model: clip.CLIP, batch: dict[str, Array]) -> lipsum.Scalar:
    """`contrastive_loss` of a batch."""
    images = clip.image_features(model.vision, batch["image"])
    texts = clip.text_features(model.text, batch["ids"])
    return contrastive_loss(images, texts, batch["ids"], jnp.exp(model.logit_scale))


@partial(jax.jit, donate_argnums=0)
def clip_step(
    state: PretrainingState, batch: dict[str, Array]
) -> tuple[PretrainingState, lipsum.Metrics]:
    """One update, with the scale of the logits capped at 100. Donates the state."""
    loss, gradient = jax.value_and_grad(clip_loss)(state.model, batch)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer count with floats
        updates, optimizer = muon_and_adamw(state.recipe).update(
            gradient, state.optimizer, state.model
        )
    model = optax.apply_updates(state.model, updates)
    capped = jnp.minimum(model.logit_scale, math.log(100))
    model = eqx.tree_at(lambda model: model.logit_scale, model, capped)
    metrics = {"loss": loss, "scale": jnp.exp(capped), "gradient_norm": optax.tree.norm(gradient)}
    return PretrainingState(model, optimizer, state.step + 1, state.recipe), metrics


# ----------------------------------------------------------------------------------------- captions, images and batches


def train_tokenizer(
    captions: Iterable[str], vocabulary_size: int = Recipe.vocabulary_size
) -> Tokenizer:
    """Returns a byte-pair encoding like CLIP's: the symbols that occur, then merges, then start and end token.

    CLIP's vocabulary contains all 512 byte symbols. Here, symbols that never occur would stay untrained, and Lipsum-FT
    draws its random texts from the whole vocabulary.
    """
    texts = [clip.clean_text(caption) for caption in captions]
    tokenizer = clip.bpe_tokenizer({START_TEXT: 0, END_TEXT: 1}, [])
    normalized = map(tokenizer.normalizer.normalize_str, texts)
    words = {
        word for text in normalized for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)
    }
    symbols = sorted({symbol for word in words for symbol in word[:-1]}) + sorted(
        {f"{word[-1]}</w>" for word in words}
    )
    # The trainer numbers symbols with `</w>` in an order that varies from run to run, and breaks ties by number.
    # Special tokens are numbered in the order given.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2,
        special_tokens=symbols,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*symbols, *map("".join, merges), START_TEXT, END_TEXT])
    return clip.bpe_tokenizer({token: index for index, token in enumerate(tokens)}, merges)


def read_captions(root: Path) -> tuple[list[data.ListedFile], list[list[str]]]:
    """Returns the images that `captions.tsv` lists, and the captions per image. Paths are relative to `root`.

    Skips OpenCLIP's header `filepath<TAB>title`. Raises InputError with the line if it has no tab, path or caption, or
    if the image does not exist.
    """
    path = root / "captions.tsv"
    files: dict[str, data.ListedFile] = {}
    captions: dict[str, list[str]] = {}
    lines = read_lines(
        path, f"captions {path}", "write UTF-8 text, one line 'path<TAB>text' per caption"
    )
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        name, tab, text = line.partition("\t")
        name = name.strip()
        text = text.strip()
        if number == 1 and (name, text) == ("filepath", "title"):
            continue
        if not tab or not name:
            raise InputError(f"{place}: {line!r} is not 'path<TAB>text': correct the line")
        if not clip.clean_text(text):
            raise InputError(
                f"{place}: the caption of {name} is empty: write one or delete the line"
            )
        if name not in files and not (root / name).is_file():
            raise InputError(
                f"{place}: {root / name} does not exist: restore it or delete the line"
            )
        files.setdefault(name, data.ListedFile(root / name, place))
        captions.setdefault(name, []).append(text)
    if not files:
        raise InputError(f"{path} lists no image: write one line 'path<TAB>text' per caption")
    return list(files.values()), list(captions.values())


def load_images(
    files: Sequence[data.ListedFile], resolution: int
) -> UInt8[np.ndarray, "n side side 3"]:
    """Returns all images, preprocessed as for evaluation. Raises InputError with the file and its line."""
    read = partial(data.read_image, resolution=resolution)
    return np.stack(thread_map(read, files, desc="reading images", unit="image", leave=False))


class Corpus(NamedTuple):
    """Images and tokenized captions. Image i has the captions `first[i]` to `first[i + 1] - 1`."""

    images: UInt8[np.ndarray, "n side side 3"]
    ids: Int32[np.ndarray, "captions tokens"]
    first: Int[np.ndarray, " n_plus_1"]


@lru_cache(maxsize=2)
def epoch_order(number: int, seed: int, epoch: int) -> Int[np.ndarray, " number"]:
    """Returns the order of an epoch's images."""
    return np.random.default_rng([seed, 0, epoch]).permutation(number)


def draw_batch(corpus: Corpus, t: int, recipe: Recipe, seed: int) -> CaptionedBatch:
    """Returns batch number t, a pure function of its arguments: shifted images, and one random caption per image."""
    size = recipe.batch_size
    epoch, place = divmod(t, len(corpus.images) // size)
    chosen = epoch_order(len(corpus.images), seed, epoch)[place * size :][:size]
    rng = np.random.default_rng([seed, 1, t])
    caption = rng.integers(corpus.first[chosen], corpus.first[chosen + 1])
    pixels = np.arange(corpus.images.shape[1])
    # Clipping the shifted indices to the image repeats its edges.
    rows, columns = np.clip(
        pixels + rng.integers(-recipe.shift, recipe.shift + 1, (2, size, 1)), 0, pixels[-1]
    )
    images = corpus.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    return {"image": images, "ids": corpus.ids[caption]}


def pretrain(
    images: UInt8[np.ndarray, "n side side 3"],
    captions: Sequence[Sequence[str]],
    recipe: Recipe,
    seed: int,
) -> tuple[clip.CLIP, Tokenizer, float]:
    """Trains a tiny CLIP from random weights. Returns the model, its tokenizer, and the training time in seconds.

    Truncates captions that are too long, like CLIP. Raises InputError if there are fewer images than a batch needs, if
    the batch does not divide among the devices, or if the loss is not finite.
    """
    if len(images) < recipe.batch_size:
        raise InputError(
            f"{len(images)} images are fewer than a batch: give --batch-size {len(images)} or less"
        )
    mesh = devices.device_mesh(recipe.batch_size)
    texts = [text for per_image in captions for text in per_image]
    tokenizer = train_tokenizer(texts, recipe.vocabulary_size)
    size = tokenizer.get_vocab_size()
    config = dataclasses.replace(
        TINY_SIZES, vocabulary_size=size, start_token=size - 2, end_token=size - 1
    )
    ids = clip.tokenize(tokenizer, texts, config, truncate=True)
    corpus = Corpus(images, ids, np.cumsum([0, *map(len, captions)]))
    model = jax.jit(clip.CLIP, static_argnums=0)(config, jax.random.key(seed))
    state = devices.place(pretraining_state(model, recipe), mesh)
    with Log(f"clip seed {seed}", 0, recipe.steps, recipe.batch_size) as log:
        for t in range(recipe.steps):
            state, metrics = clip_step(
                state, devices.shard_batch(draw_batch(corpus, t, recipe, seed), mesh)
            )
            log.add(t + 1, metrics)
        log.settle()
        return state.model, tokenizer, log.seconds()


def zero_shot_accuracies(model: clip.CLIP, tokenizer: Tokenizer, split: str) -> dict[str, float]:
    """Returns the accuracy (a fraction) per domain of the embedded benchmark's `val` or `test`, with its templates."""
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
    options: str, recipe: Recipe, seed: int, seconds: float, accuracies: dict[str, dict[str, float]]
) -> str:
    """Returns the content of README.md. `options` are those of the command; `accuracies` are per split and domain."""
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)"
    settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(recipe).items())
    card = f"""# A CLIP made by contrastive pre-training

Made by `python -m tools.pretrain {options}` in {seconds / 60:.0f} minutes on {devices}, seed {seed}. \
Weights are stored in float16.

Settings: {settings}.
"""
    if accuracies:
        domains = list(accuracies["val"])
        card += "\nZero-shot accuracy of the stored model in percent, the prompts `minidomain.TEMPLATES`:\n\n"
        card += f"| split | {' | '.join(domains)} |\n{'|---' * (1 + len(domains))}|\n"
        for split, per_domain in accuracies.items():
            card += f"| {split} | {' | '.join(f'{100 * accuracy:.1f}' for accuracy in per_domain.values())} |\n"
    return card


def main(
    out: Path,
    data_root: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: none)")
    ] = None,
    seed: int = 0,
    overwrite: bool = False,
    recipe: Recipe = Recipe(),
) -> None:
    """Pre-train a tiny CLIP on images with captions, evaluate what was saved, and write a model card.

    Args:
        out: Folder to write: a Hugging Face CLIP folder in float16, with README.md.
        data_root: Folder of images with captions.tsv. Without it, the embedded captioned corpus.
        seed: Seed of the initial weights, the order of the images, the choice of captions, and the shifts.
        overwrite: Write into --out even if it contains files.
    """
    check_positive(steps=recipe.steps, batch_size=recipe.batch_size)
    if not 0 <= recipe.learning_rate < math.inf:
        raise InputError(f"--learning-rate is {recipe.learning_rate}: give a number, at least 0")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed is {seed}: give one from 0 to 2**32 - 1")
    if out.is_file():
        raise InputError(f"--out {out} is a file: give a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} is not empty: give --overwrite or another --out")
    if data_root is None:
        images, captions = minidomain.load_web()
    else:
        files, captions = read_captions(data_root)
        images = load_images(files, TINY_SIZES.image_size)
    model, tokenizer, seconds = pretrain(images, captions, recipe, seed)
    weights.save(out, model, tokenizer, np.float16)
    accuracies = {}
    if data_root is None:
        stored = weights.load(str(out))
        accuracies = {split: zero_shot_accuracies(*stored, split) for split in ("val", "test")}
    card = model_card(shlex.join(sys.argv[1:]), recipe, seed, seconds, accuracies)
    (out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    sys.exit(exit_code(lambda: tyro.cli(main, prog="python -m tools.pretrain", config=config)))
