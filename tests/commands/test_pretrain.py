"""Contrastive pre-training: loss, step, tokenizer, captions, batches, the command, and the stored tiny model."""

import dataclasses
import functools
import json
import math
import re
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE
from PIL import Image

import clip
from clip import END_TEXT, START_TEXT
from support import weights
from support.errors import InputError
from support.layouts import minidomain
from tools import pretrain

TINY_CLIP = REFERENCE.parents[1] / "assets" / "tiny-clip"
SMALL = clip.Config(
    image_size=12,
    patch_size=6,
    vision=clip.Transformer(16, 2, 2, 32),
    text=clip.Transformer(16, 1, 2, 32),
    embedding_size=8,
    context_length=16,
    vocabulary_size=12,
    start_token=10,
    end_token=11,
)
RECIPE = pretrain.Recipe(steps=20, batch_size=8)

# ----------------------------------------------------------------------------------------------------------------- loss


def loss_by_loops(images: np.ndarray, texts: np.ndarray, ids: np.ndarray, scale: float) -> float:
    """The contrastive loss from its definition: -log of each pair's softmax among its negatives, both directions."""
    total = 0.0
    number = len(ids)
    for i in range(number):
        others = [j for j in range(number) if j == i or tuple(ids[j]) != tuple(ids[i])]
        pair = math.exp(scale * images[i] @ texts[i])
        total -= math.log(pair / sum(math.exp(scale * images[i] @ texts[j]) for j in others))
        total -= math.log(pair / sum(math.exp(scale * images[j] @ texts[i]) for j in others))
    return total / (2 * number)


@pytest.mark.parametrize("captions", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [3, 3, 3, 3, 3]])
def test_loss(captions: list[int]) -> None:
    """Equals the loops; its gradients equal finite differences. Captions may repeat."""
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(2, 5, 4)) / 2
    ids = np.array([[9, caption, 7] for caption in captions], np.int32)
    arguments = jnp.float32(images), jnp.float32(texts), jnp.asarray(ids), jnp.float32(3.0)
    loss, gradients = jax.value_and_grad(pretrain.contrastive_loss, argnums=(0, 1, 3))(*arguments)
    np.testing.assert_allclose(loss, loss_by_loops(images, texts, ids, 3.0), rtol=1e-5, atol=1e-6)
    for argument, gradient in zip((0, 1), gradients, strict=False):
        for i, j in [(0, 1), (2, 3)]:
            values = []
            for step in (1e-5, -1e-5):
                moved = [images.copy(), texts.copy()]
                moved[argument][i, j] += step
                values.append(loss_by_loops(*moved, ids, 3.0))
            np.testing.assert_allclose(
                gradient[i, j], (values[0] - values[1]) / 2e-5, rtol=1e-4, atol=1e-6
            )
    by_scale = (
        loss_by_loops(images, texts, ids, 3 + 1e-5) - loss_by_loops(images, texts, ids, 3 - 1e-5)
    ) / 2e-5
    np.testing.assert_allclose(gradients[2], by_scale, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------- step


@functools.cache
def small_model() -> clip.CLIP:
    return jax.jit(clip.CLIP, static_argnums=0)(SMALL, jax.random.key(0))


def small_state(log_scale: float = math.log(14.0)) -> pretrain.PretrainingState:
    model = eqx.tree_at(lambda model: model.logit_scale, small_model(), jnp.float32(log_scale))
    return pretrain.pretraining_state(model, RECIPE)


def small_batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.zeros((8, 16), np.int32)
    ids[:, 0], ids[:, 1:5], ids[:, 5] = 10, rng.integers(0, 10, (8, 4)), 11
    return {"image": rng.integers(0, 256, (8, 12, 12, 3), np.uint8), "ids": ids}


def test_step_is_pure_donates_its_state_and_compiles_once() -> None:
    ends = []
    for _ in range(2):
        state = small_state()
        for t in range(3):
            before = state
            state, metrics = pretrain.clip_step(state, small_batch(t))
            assert before.model.vision.patch_embedding.is_deleted()
        ends.append(jax.tree.leaves(state.model))
        assert int(state.step) == 3
        assert set(metrics) == {"loss", "scale", "gradient_norm"}
        assert all(value.shape == () and np.isfinite(value) for value in metrics.values())
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)
    size = pretrain.clip_step._cache_size()
    pretrain.clip_step(state, small_batch(3))
    assert pretrain.clip_step._cache_size() == size


def test_scale_is_trained_and_capped() -> None:
    state = small_state()
    for t in range(2):  # the learning rate is 0 in the first step of the warm-up
        state, metrics = pretrain.clip_step(state, small_batch(t))
    assert float(state.model.logit_scale) != pytest.approx(math.log(14.0), abs=1e-6)
    _, metrics = pretrain.clip_step(small_state(math.log(130.0)), small_batch(0))
    assert float(metrics["scale"]) == pytest.approx(100, rel=1e-5)


def test_kind_of_every_parameter() -> None:
    kinds = pretrain.parameter_kinds(small_model())
    for tower in (kinds.vision, kinds.text):
        for layer in (
            tower.blocks.query,
            tower.blocks.key,
            tower.blocks.value,
            tower.blocks.out,
            tower.blocks.fc1,
        ):
            assert (layer.weight, layer.bias) == ("matrix", "vector")
        assert {tower.blocks.layer_norm1.weight, tower.blocks.layer_norm2.bias} == {"vector"}
        assert {tower.projection.weight, tower.position_embedding} == {"embedding"}
    assert {kinds.vision.patch_embedding, kinds.text.token_embedding} == {"embedding"}
    assert {
        kinds.logit_scale,
        kinds.vision.class_embedding,
        kinds.vision.layer_norm_pre.weight,
    } == {"vector"}


@jax.numpy_dtype_promotion("standard")
def test_muon_updates_each_layer_separately() -> None:
    """Each layer's update is nearly orthogonal. That of a tall matrix is scaled by the root of its aspect ratio."""
    recipe = dataclasses.replace(RECIPE, warmup=0.0, matrix_weight_decay=0.0, learning_rate=0.1)
    model, optimizer = small_model(), pretrain.muon_and_adamw(recipe)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), model)
    updates, _ = jax.jit(optimizer.update)(
        gradient, pretrain.pretraining_state(model, recipe).optimizer, model
    )
    update = np.asarray(updates.vision.blocks.query.weight)
    assert update.shape == (2, 16, 16)
    for layer in update:
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.min() > 0.3 and singular.max() < 1.3
    tall = np.asarray(updates.vision.blocks.fc1.weight)[0]  # twice as many outputs as inputs
    assert 0.6 < np.linalg.svd(tall, compute_uv=False).mean() / math.sqrt(2) < 1.2


# ------------------------------------------------------------------------------------------------------------ tokenizer


def minidomain_captions(number: int = 3000) -> list[str]:
    rng = np.random.default_rng(0)
    texts = []
    for index in range(number):
        domain = minidomain.DOMAINS[index % 5]
        colour = None if domain == "sketch" else minidomain.pick(rng, tuple(minidomain.COLOURS))
        size = minidomain.pick(rng, tuple(minidomain.EXTENTS))
        position = minidomain.pick(rng, tuple(minidomain.POSITIONS))
        background = minidomain.pick(rng, minidomain.BACKDROPS[domain])
        seen = minidomain.Attributes(index % 20, domain, colour, size, position, background)
        texts += minidomain.captions(seen, rng)
    return texts


def test_tokenizer_of_the_embedded_corpus() -> None:
    texts = minidomain_captions()
    tokenizer = pretrain.train_tokenizer(texts)
    vocabulary = tokenizer.get_vocab()
    size = len(vocabulary)
    assert (
        sorted(vocabulary.values()) == list(range(size))
        and tokenizer.get_vocab_size() == size < 400
    )
    assert (vocabulary[START_TEXT], vocabulary[END_TEXT]) == (size - 2, size - 1)
    config = dataclasses.replace(
        pretrain.TINY_SIZES, vocabulary_size=size, start_token=size - 2, end_token=size - 1
    )
    ids = clip.tokenize(tokenizer, texts, config)  # raises if a caption exceeds the context
    for text in texts[:200]:
        words = re.findall(r"\w+|\.", text)
        assert tokenizer.encode(text).tokens == [
            START_TEXT,
            *(f"{word}</w>" for word in words),
            END_TEXT,
        ]
    assert ids.max() == size - 1

    # The one-character tokens are the symbols that occur in words, with `</w>` if they end one.
    words = {word for text in texts for word in re.findall(r"\w+|\.", text)}
    symbols = {symbol for word in words for symbol in [*word[:-1], f"{word[-1]}</w>"]}
    assert {token for token in vocabulary if len(token.removesuffix("</w>")) == 1} == symbols | {
        "a</w>",
        ".</w>",
    }
    for word in minidomain.CLASSES:
        assert tokenizer.decode(tokenizer.encode(word).ids).removesuffix("</w>") == word


def test_tokenizer_is_deterministic() -> None:
    texts = minidomain_captions(1000)
    one, other = (pretrain.train_tokenizer(texts).to_str() for _ in range(2))
    assert one == other


def test_tokenizer_of_other_languages_and_vocabulary_size() -> None:
    texts = ["Grüße aus Köln!", "une fenêtre ouverte &amp; un café", "猫の写真", "it's 1999"] * 3
    tokenizer = pretrain.train_tokenizer(texts, vocabulary_size=60)
    assert tokenizer.get_vocab_size() <= 60
    tokens = tokenizer.encode("it's a cat").tokens
    assert tokens[0] == START_TEXT and tokens[-1] == END_TEXT
    whole = pretrain.train_tokenizer(texts)
    assert "fenêtre" in whole.decode(whole.encode("fenêtre").ids)
    assert "1</w>" in whole.get_vocab() and "'s</w>" in whole.get_vocab()


# ------------------------------------------------------------------------------------------------- captions and batches


def captions_folder(folder: Path, number: int = 24, header: str = "filepath\ttitle\n") -> Path:
    """Writes red and blue images with two captions each. Returns `folder`."""
    rng = np.random.default_rng(0)
    lines = []
    for index in range(number):
        name = f"{index}.png"
        colour = ("red", "blue")[index % 2]
        pixels = rng.integers(0, 60, (20, 30, 3), np.uint8)
        pixels[..., 0 if colour == "red" else 2] += 180
        Image.fromarray(pixels).save(folder / name)
        lines += [f"{name}\ta {colour} image, {index // 2}\n", f"{name}\t{colour}\n"]
    (folder / "captions.tsv").write_text(header + "".join(lines))
    return folder


@pytest.mark.parametrize("header", ["", "filepath\ttitle\n", "\ufefffilepath\ttitle\r\n"])
def test_read_captions(tmp_path: Path, header: str) -> None:
    files, captions = pretrain.read_captions(captions_folder(tmp_path, 3, header))
    assert [file.path.name for file in files] == ["0.png", "1.png", "2.png"]
    assert captions[2] == ["a red image, 1", "red"]
    assert files[2].place.endswith(f"line {5 + bool(header)}")
    assert pretrain.load_images(files, 12).shape == (3, 12, 12, 3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "7.png\ta cat",
            r"captions.tsv line 3: .*7.png does not exist: restore it or delete the line",
        ),
        ("0.png\t", r"captions.tsv line 3: the caption of 0.png is empty"),
        ("0.png\t &nbsp; ", r"captions.tsv line 3: the caption of 0.png is empty"),
        ("0.png a cat", r"captions.tsv line 3: '0.png a cat' is not 'path<TAB>text'"),
        ("", r"captions.tsv line 3: '' is not 'path<TAB>text'"),
        ("\ta cat", r"captions.tsv line 3: .* is not 'path<TAB>text'"),
    ],
)
def test_wrong_line_of_captions(tmp_path: Path, line: str, message: str) -> None:
    lines = (captions_folder(tmp_path, 1) / "captions.tsv").read_text().splitlines()
    (tmp_path / "captions.tsv").write_text("\n".join([*lines[:2], line, lines[2]]) + "\n")
    with pytest.raises(InputError, match=message):
        pretrain.read_captions(tmp_path)


def test_unusable_captions_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"captions .*captions.tsv cannot be read"):
        pretrain.read_captions(tmp_path)
    (tmp_path / "captions.tsv").write_text("filepath\ttitle\n")
    with pytest.raises(InputError, match=r"captions.tsv lists no image"):
        pretrain.read_captions(tmp_path)
    files, _ = pretrain.read_captions(captions_folder(tmp_path, 2))
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"captions.tsv line 4: .*1.png is no readable image"):
        pretrain.load_images(files, 12)


def test_batch_is_a_pure_function_of_its_number() -> None:
    """Images and captions match, each epoch has every image at most once, and seeds differ."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 12, 12, 3), np.uint8)
    images[:, 2:10, 2:10] = np.arange(20, dtype=np.uint8)[
        :, None, None, None
    ]  # the middle identifies the image
    first = np.array([0, *np.cumsum(1 + np.arange(20) % 3)])
    ids = np.repeat(np.arange(20), np.diff(first)).astype(np.int32)[:, None]
    corpus = pretrain.Corpus(images, ids, first)
    forward = [pretrain.draw_batch(corpus, t, RECIPE, 5) for t in range(6)]
    for t in (5, 2, 4, 0):
        pretrain.epoch_order.cache_clear()
        again = pretrain.draw_batch(corpus, t, RECIPE, 5)
        assert all(np.array_equal(again[name], forward[t][name]) for name in again)
    for batch in forward:
        np.testing.assert_array_equal(batch["ids"][:, 0], batch["image"][:, 6, 6, 0])
        assert batch["image"].dtype == np.uint8
    for epoch in range(3):  # two batches of 8 from 20 images
        assert len({*forward[2 * epoch]["ids"][:, 0], *forward[2 * epoch + 1]["ids"][:, 0]}) == 16
    assert not np.array_equal(forward[0]["ids"], pretrain.draw_batch(corpus, 0, RECIPE, 6)["ids"])


def test_shifts_repeat_the_edges() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), np.uint8)
    corpus = pretrain.Corpus(images, np.arange(8, dtype=np.int32)[:, None], np.arange(9))
    seen = set()
    for t in range(20):
        batch = pretrain.draw_batch(corpus, t, RECIPE, 0)
        for image, (index,) in zip(batch["image"], batch["ids"], strict=True):
            padded = np.pad(images[index], [(2, 2), (2, 2), (0, 0)], mode="edge")
            shifts = [
                (y, x)
                for y in range(5)
                for x in range(5)
                if np.array_equal(padded[y:, x:][:12, :12], image)
            ]
            assert len(shifts) == 1
            seen |= set(shifts)
    assert len(seen) == 25


# --------------------------------------------------------------------------------------------------------- pre-training


def test_command_on_a_folder_lowers_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """20 steps, with the loss of every step recorded."""
    monkeypatch.setattr(pretrain, "TINY_SIZES", SMALL)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--the", "options"])
    losses = []
    clip_step = pretrain.clip_step

    def recording_step(
        state: pretrain.PretrainingState, batch: dict
    ) -> tuple[pretrain.PretrainingState, dict]:
        state, metrics = clip_step(state, batch)
        losses.append(float(metrics["loss"]))
        return state, metrics

    monkeypatch.setattr(pretrain, "clip_step", recording_step)
    (tmp_path / "in").mkdir()
    options = {
        "out": tmp_path / "out",
        "data_root": captions_folder(tmp_path / "in"),
        "recipe": dataclasses.replace(RECIPE, learning_rate=4e-3),
    }
    pretrain.main(**options)
    assert len(losses) == 20 and np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    model, tokenizer = weights.load(str(tmp_path / "out"))
    assert (
        model.config.image_size == 12 and tokenizer.get_vocab_size() == model.config.vocabulary_size
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        "`python -m tools.pretrain --the options`" in card
        and "seed 0" in card
        and "steps 20" in card
        and "accurac" not in card
    )
    with pytest.raises(InputError, match="is not empty: give --overwrite"):
        pretrain.main(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"batch_size": 4}, "does not divide among 8 devices"),
        ({"batch_size": 32}, "24 images are fewer than a batch"),
        ({"learning_rate": -1.0}, "--learning-rate is -1"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_bad_options(tmp_path: Path, changes: dict, message: str) -> None:
    seed = changes.pop("seed", 0)
    recipe = (
        dataclasses.replace(RECIPE, steps=2, **changes)
        if "steps" not in changes
        else pretrain.Recipe(**changes)
    )
    with pytest.raises(InputError, match=message):
        pretrain.main(tmp_path / "out", captions_folder(tmp_path), seed, recipe=recipe)


# ------------------------------------------------------------------------------------------------------ the tiny model


def test_stored_model_agrees_with_its_card() -> None:
    """Sizes, tokenizer, and zero-shot accuracies on `val`, with a tolerance for rounding on other CPUs."""
    assert sum(path.stat().st_size for path in TINY_CLIP.iterdir()) < 2e6
    model, tokenizer = weights.load(str(TINY_CLIP))
    size = model.config.vocabulary_size
    assert model.config == dataclasses.replace(
        pretrain.TINY_SIZES, vocabulary_size=size, start_token=size - 2, end_token=size - 1
    )
    assert tokenizer.get_vocab_size() == size
    assert (
        json.loads((TINY_CLIP / "config.json").read_text())["text_config"]["eos_token_id"]
        == size - 1
    )

    card = (TINY_CLIP / "README.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in card.splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == ["split", *minidomain.DOMAINS]
    stated = {
        row[0]: dict(zip(minidomain.DOMAINS, map(float, row[1:]), strict=True)) for row in rows[1:]
    }
    for split in ("val", "test"):
        assert 65 <= stated[split]["real"] <= 80, split
        assert min(stated[split].values()) > 60, split
    for domain, accuracy in pretrain.zero_shot_accuracies(model, tokenizer, "val").items():
        assert 100 * accuracy == pytest.approx(stated["val"][domain], abs=0.5), domain
