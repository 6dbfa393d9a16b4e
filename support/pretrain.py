"""Contrastive pre-training of a CLIP: the symmetric image-text loss, its step, and the embedded tiny model.

Paper: Radford et al. 2021, https://arxiv.org/abs/2103.00020. The command that made assets/tiny-clip:

    python -m support.pretrain --out assets/tiny-clip --seed 0

`--data-root DIR` trains on a folder of images with `captions.tsv`, a line `path<TAB>text` per caption. Batch number t
is a pure function of the captions, the seed and t.
"""

import dataclasses
import functools
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Float, Int, Int32, PyTree, UInt8
from tokenizers import Tokenizer, trainers
from tqdm import tqdm

import clip
import data
import eval as evaluation
import lipsum
from clip import END_TEXT, START_TEXT
from support import minidomain, weights
from support.errors import InputError, exit_code, read_lines
from support.logs import Log

# The vocabulary's size and its two last tokens are the tokenizer's.
TINY_SIZES = clip.Config(
    image_size=36,
    patch_size=6,
    vision=clip.Transformer(width=96, layers=4, heads=3, mlp_width=384),
    text=clip.Transformer(width=96, layers=2, heads=3, mlp_width=384),
    embedding_size=64,
    context_length=16,
)
MAXIMAL_SCALE = 100.0


@dataclass(frozen=True)
class Recipe:
    """How to pre-train. The defaults are the embedded tiny model's."""

    steps: int = 2_000
    """Updates to make."""
    batch_size: int = 128
    """Images per update, over all devices."""
    learning_rate: float = 2e-3
    """Peak rate of AdamW. Muon's is ten times as high."""
    weight_decay: float = 0.05
    """Weight decay of embeddings and projections."""
    matrix_weight_decay: float = 0.01
    """Weight decay of the blocks' matrices."""
    warmup: float = 0.05
    """Fraction of the steps over which the rates rise from 0."""
    final_rate: float = 0.02
    """Fraction of the peak at which the rates end."""
    shift: int = 2
    """The augmentation: images are shifted by up to so many pixels."""
    vocabulary_size: int = 49_408
    """Most tokens that the tokenizer learns."""


class PretrainingState(eqx.Module):
    """What one step maps to its successor."""

    model: clip.CLIP
    optimizer: optax.OptState
    step: Int[Array, ""]
    recipe: Recipe = eqx.field(static=True)


CaptionedBatch = dict[str, UInt8[Array, "batch height width 3"] | Int[Array, "batch tokens"]]
CaptionedHostBatch = dict[str, UInt8[np.ndarray, "batch height width 3"] | Int[np.ndarray, "batch tokens"]]

# ------------------------------------------------------------------------------------------------------ loss and update


def contrastive_loss(
    image_features: Float[Array, "batch dim"],
    text_features: Float[Array, "batch dim"],
    ids: Int[Array, "batch tokens"],
    scale: Float[Array, ""],
) -> Float[Array, ""]:
    """CLIP's figure 3: the mean of the cross-entropies image to text and text to image, in nats.

    Pairs with the same caption are no negatives of each other, in either direction.
    """
    logits = scale * image_features @ text_features.T
    same_text = jnp.all(ids[:, None] == ids[None], axis=2)
    logits = jnp.where(same_text & ~jnp.eye(len(ids), dtype=bool), -jnp.inf, logits)
    of_pairs = jnp.diagonal(logits)
    image_to_text = jax.nn.logsumexp(logits, axis=1) - of_pairs
    text_to_image = jax.nn.logsumexp(logits, axis=0) - of_pairs
    return (jnp.mean(image_to_text) + jnp.mean(text_to_image)) / 2


def parameter_kinds(model: PyTree) -> PyTree[str]:
    """`matrix` for the blocks' matrices, `embedding` for all else of two axes or more, `vector` for the rest."""

    def kind(path: tuple, leaf: Array) -> str:
        if "blocks" in clip.leaf_name(path).split("."):
            return "matrix" if leaf.ndim == 3 else "vector"  # the first axis is the layer
        return "embedding" if leaf.ndim >= 2 else "vector"

    return jax.tree_util.tree_map_with_path(kind, model)


def muon_and_adamw(recipe: Recipe) -> optax.GradientTransformation:
    """Muon (https://kellerjordan.github.io/posts/muon) for the blocks' matrices, layer by layer, AdamW for the rest.

    AdamW alone stays on the plateau at log(batch) nats for most of a short run.
    """
    rate = partial(lipsum.warmup_cosine, steps=recipe.steps, warmup=recipe.warmup, final=recipe.final_rate)
    adamw = partial(optax.adamw, rate(recipe.learning_rate), b1=0.9, b2=0.98, eps=1e-6)
    muon = optax.contrib.muon(
        rate(10 * recipe.learning_rate),
        # One triple for each of the five iterations makes optax scan over them; it would unroll them otherwise, which
        # takes longer to compile than all the rest.
        ns_coeffs=((3.4445, -4.7750, 2.0315),) * 5,
        ns_steps=5,
        beta=0.95,
        weight_decay=recipe.matrix_weight_decay,
        muon_weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1),
    )
    by_kind = {
        "matrix": muon,
        "embedding": adamw(weight_decay=recipe.weight_decay),
        "vector": adamw(weight_decay=0.0),
    }
    return optax.chain(optax.clip_by_global_norm(1.0), optax.partition(by_kind, parameter_kinds))


@partial(jax.jit, static_argnames="recipe")
def pretraining_state(model: clip.CLIP, recipe: Recipe) -> PretrainingState:
    """The state before the first step. Copies the model, since steps donate their state."""
    return PretrainingState(model, muon_and_adamw(recipe).init(model), jnp.int32(0), recipe)


def clip_loss(model: clip.CLIP, batch: CaptionedBatch) -> Float[Array, ""]:
    """`contrastive_loss` of a batch."""
    images = clip.image_features(model.vision, batch["image"])
    texts = clip.text_features(model.text, batch["ids"])
    return contrastive_loss(images, texts, batch["ids"], jnp.exp(model.logit_scale))


@partial(jax.jit, donate_argnums=0)
def clip_step(state: PretrainingState, batch: CaptionedBatch) -> tuple[PretrainingState, lipsum.Metrics]:
    """Gradient, update, and the cap on the logits' scale. Donates its state."""
    loss, gradient = jax.value_and_grad(clip_loss)(state.model, batch)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer count with floats
        updates, optimizer = muon_and_adamw(state.recipe).update(gradient, state.optimizer, state.model)
    model = optax.apply_updates(state.model, updates)
    capped = jnp.minimum(model.logit_scale, math.log(MAXIMAL_SCALE))
    model = eqx.tree_at(lambda model: model.logit_scale, model, capped)
    metrics = {"loss": loss, "scale": jnp.exp(capped), "gradient_norm": optax.tree.norm(gradient)}
    return PretrainingState(model, optimizer, state.step + 1, state.recipe), metrics


# ------------------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(captions: Iterable[str], vocabulary_size: int = Recipe.vocabulary_size) -> Tokenizer:
    """Byte-pair encoding of CLIP's kind: the symbols that occur, merges up to whole words, start and end token last.

    CLIP's own vocabulary holds all 512 byte symbols. Those that never occur would stay untrained here, and Lipsum-FT
    draws its random texts from the whole vocabulary.
    """
    texts = [clip.clean_text(caption) for caption in captions]
    splitter = clip.bpe_tokenizer({START_TEXT: 0, END_TEXT: 1}, [])
    words = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenizer.pre_tokenize_str(splitter.normalizer.normalize_str(text))
    )
    symbols = sorted({symbol for word in words for symbol in word[:-1]})
    symbols += sorted({f"{word[-1]}</w>" for word in words})
    # The trainer numbers symbols with `</w>` in an order that varies from run to run, and breaks ties by number: as
    # special tokens they are numbered in the order given.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2, special_tokens=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    splitter.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(splitter.to_str())["model"]["merges"]]
    tokens = list(dict.fromkeys([*symbols, *map("".join, merges), START_TEXT, END_TEXT]))
    return clip.bpe_tokenizer({token: index for index, token in enumerate(tokens)}, merges)


# --------------------------------------------------------------------------------------------------------------- corpus


def read_captions(root: Path) -> tuple[list[data.ListedFile], list[list[str]]]:
    """Images and the captions of each from `captions.tsv`: a line `path<TAB>text` a caption, paths relative to `root`.

    A first line `filepath<TAB>title`, as OpenCLIP has it, is skipped. Raises InputError naming the line where a tab,
    the image or the caption is missing.
    """
    path = root / "captions.tsv"
    lines = read_lines(path, f"captions {path}", "write UTF-8 text, a line 'path<TAB>text' per caption")
    first_lines: dict[str, int] = {}
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        name, tab, text = line.partition("\t")
        name, text = name.strip(), text.strip()
        if number == 1 and (name, text) == ("filepath", "title"):
            continue
        if not tab or not name:
            raise InputError(f"{path} line {number}: {line!r} is not 'path<TAB>text': correct the line")
        if not clip.clean_text(text):
            raise InputError(f"{path} line {number}: the caption of {name} is empty: write one or delete the line")
        if name not in captions and not (root / name).is_file():
            raise InputError(f"{path} line {number}: {root / name} does not exist: restore it or delete the line")
        first_lines.setdefault(name, number)
        captions.setdefault(name, []).append(text)
    if not captions:
        raise InputError(f"{path} lists no image: write a line 'path<TAB>text' for each caption")
    files = [data.ListedFile(root / name, f"{path} line {number}") for name, number in first_lines.items()]
    return files, list(captions.values())


def load_images(files: Sequence[data.ListedFile], resolution: int) -> UInt8[np.ndarray, "n side side 3"]:
    """All images, preprocessed as for evaluation. Raises InputError naming the file and its line."""

    read = partial(data.read_image, resolution=resolution)
    with ThreadPoolExecutor() as pool:
        return np.stack(list(tqdm(pool.map(read, files), "reading images", len(files), unit="image", leave=False)))


class Corpus(NamedTuple):
    """Images in memory; image i has the captions `first[i]` up to but not `first[i + 1]`."""

    images: UInt8[np.ndarray, "n side side 3"]
    ids: Int32[np.ndarray, "captions tokens"]
    first: Int[np.ndarray, " n_plus_1"]


@functools.lru_cache(maxsize=2)
def epoch_order(number: int, seed: int, epoch: int) -> Int[np.ndarray, " number"]:
    return np.random.default_rng([seed, 0, epoch]).permutation(number)


def draw_batch(corpus: Corpus, t: int, recipe: Recipe, seed: int) -> CaptionedHostBatch:
    """Batch number t: its part of the epoch's order, one caption of each image, images shifted by a few pixels."""
    size = recipe.batch_size
    epoch, place = divmod(t, len(corpus.images) // size)
    chosen = epoch_order(len(corpus.images), seed, epoch)[place * size :][:size]
    rng = np.random.default_rng([seed, 1, t])
    caption = rng.integers(corpus.first[chosen], corpus.first[chosen + 1])
    pixels = np.arange(corpus.images.shape[1])
    # Shifted indices, clipped to the image, repeat its edges.
    rows, columns = np.clip(pixels + rng.integers(-recipe.shift, recipe.shift + 1, (2, size, 1)), 0, pixels[-1])
    images = corpus.images[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    return {"image": images, "ids": corpus.ids[caption]}


# --------------------------------------------------------------------------------------------------------- pre-training


def pretrain(
    images: UInt8[np.ndarray, "n side side 3"],
    captions: Sequence[Sequence[str]],
    config: clip.Config,
    recipe: Recipe,
    seed: int,
) -> tuple[clip.CLIP, Tokenizer, float]:
    """A CLIP of the sizes of `config` trained from random weights, the tokenizer of its captions, the seconds it took.

    Captions that are too long are cut, as CLIP does. Raises InputError if images are fewer than a batch, the batch
    does not divide among the devices, or the loss is not finite.
    """
    if len(images) < recipe.batch_size:
        raise InputError(f"{len(images)} images are less than a batch: give --batch-size {len(images)} or less")
    mesh = data.device_mesh(recipe.batch_size)
    texts = [text for per_image in captions for text in per_image]
    tokenizer = train_tokenizer(texts, recipe.vocabulary_size)
    size = tokenizer.get_vocab_size()
    config = dataclasses.replace(config, vocabulary_size=size, start_token=size - 2, end_token=size - 1)
    ids = clip.tokenize(tokenizer, texts, config, truncate=True)
    corpus = Corpus(images, ids, np.cumsum([0, *map(len, captions)]))
    model = jax.jit(clip.CLIP, static_argnums=0)(config, jax.random.key(seed))
    state = data.place(pretraining_state(model, recipe), mesh)
    del model
    with Log(f"clip seed {seed}", 0, recipe.steps, recipe.batch_size) as log:
        for t in range(recipe.steps):
            state, metrics = clip_step(state, data.shard_batch(draw_batch(corpus, t, recipe, seed), mesh))
            log.add(t + 1, metrics)
        log.settle()
        return state.model, tokenizer, log.seconds()


# ----------------------------------------------------------------------------------------------- zero-shot, model card


def zero_shot_accuracies(model: clip.CLIP, tokenizer: Tokenizer, split: str) -> dict[str, float]:
    """Accuracy, a fraction, on each domain of the embedded benchmark's `val` or `test`, with its own templates."""
    features = clip.prompt_features(model, tokenizer, minidomain.CLASSES, minidomain.TEMPLATES)
    classifier = lipsum.Classifier(model.vision, clip.zero_shot_head(features))
    batch_size = data.evaluation_batch_size(512)
    accuracies = {}
    for domain in minidomain.DOMAINS:
        images = data.Split(domain, minidomain.CLASSES, *minidomain.load(domain, split))
        found = evaluation.predict(
            [classifier], jnp.exp(model.logit_scale), images, batch_size, 1, data.device_mesh(batch_size)
        )
        accuracies[domain] = float(np.mean(found.correct))
    return accuracies


def write_model_card(
    folder: Path, command: str, recipe: Recipe, seed: int, seconds: float, accuracies: dict[str, dict[str, float]]
) -> None:
    """README.md: the command, settings, seed, time, and zero-shot accuracies by split and domain, where there are."""
    lines = [
        "# A CLIP made by contrastive pre-training",
        "",
        f"Made by `{command}` in {seconds / 60:.0f} minutes on {jax.device_count()} {jax.devices()[0].device_kind} "
        f"device(s), seed {seed}. Weights are stored in float16.",
        "",
        "Settings: " + ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(recipe).items()) + ".",
    ]
    if accuracies:
        domains = list(next(iter(accuracies.values())))
        lines += ["", "Zero-shot accuracy of the stored model in percent, the prompts `minidomain.TEMPLATES`:", ""]
        lines += [f"| split | {' | '.join(domains)} |", "|---" * (1 + len(domains)) + "|"]
        for split, of_domain in accuracies.items():
            lines.append(f"| {split} | {' | '.join(f'{100 * of_domain[domain]:.1f}' for domain in domains)} |")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- command line


def check(out: Path, seed: int, overwrite: bool, recipe: Recipe) -> None:
    """Raises InputError for a value that makes no sense."""
    for name in ("steps", "batch_size"):
        if getattr(recipe, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(recipe, name)}: give at least 1")
    if not 0 <= recipe.learning_rate < math.inf:
        raise InputError(f"--learning-rate is {recipe.learning_rate}: give a number, at least 0")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed is {seed}: give one from 0 to 2**32 - 1")
    if out.is_file():
        raise InputError(f"--out {out} is a file: give a folder")
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise InputError(f"{out} is not empty: give --overwrite or another --out")


def main(
    out: Path,
    data_root: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: none)")] = None,
    seed: int = 0,
    overwrite: bool = False,
    recipe: Recipe = Recipe(),
    command: tyro.conf.Fixed[str] = "",
) -> None:
    """Pre-train a tiny CLIP on images with captions: saves it, evaluates what was saved, writes a model card.

    Args:
        out: New folder for the model: a Hugging Face CLIP folder in float16, with README.md.
        data_root: A folder of images with captions.tsv. Without it: the embedded captioned corpus.
        seed: Seed of the initial weights, the images' order, the choice of captions and the shifts.
        overwrite: Write into --out although it holds files.
        recipe: How to pre-train. The defaults are the embedded tiny model's.
        command: What the model card says made it.
    """
    check(out, seed, overwrite, recipe)
    if data_root is not None:
        files, captions = read_captions(data_root)
        images = load_images(files, TINY_SIZES.image_size)
    else:
        images, captions = minidomain.load_web()
    model, tokenizer, seconds = pretrain(images, captions, TINY_SIZES, recipe, seed)
    weights.save(out, model, tokenizer, np.float16)
    accuracies = {}
    if data_root is None:
        stored = weights.load(str(out))
        accuracies = {split: zero_shot_accuracies(*stored, split) for split in ("val", "test")}
    write_model_card(out, command, recipe, seed, seconds, accuracies)
    print((out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run = partial(main, command=shlex.join(["python", "-m", "support.pretrain", *sys.argv[1:]]))
    sys.exit(exit_code(lambda: tyro.cli(
        run, prog="python -m support.pretrain", config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    )))  # fmt: skip
