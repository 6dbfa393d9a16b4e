"""Contrastive pre-training: loss, step, corpus, tokenizer, batches, the command, the tiny model."""

import dataclasses
import functools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE
from helpers import raises

import clip
from clip import END_TEXT, START_TEXT
from support import weights
from support.layouts import minidomain
from tools import captions, pretrain

TINY_CLIP = REFERENCE.parents[1] / "assets" / "tiny-clip"
SMALL = clip.Config(
    preparation=clip.Preparation(12),
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

# --------------------------------------------------------------------------------------------- loss


def loss_by_loops(images: np.ndarray, texts: np.ndarray, ids: np.ndarray, scale: float) -> float:
    """The definition: -log of each pair's softmax among its negatives, in both directions."""
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


# --------------------------------------------------------------------------------------------- step


@functools.cache
def small_model() -> clip.CLIP:
    return jax.jit(clip.CLIP, static_argnums=0)(SMALL, jax.random.key(0))


def small_state(log_scale: float = math.log(14.0)) -> pretrain.State:
    model = eqx.tree_at(lambda model: model.logit_scale, small_model(), jnp.float32(log_scale))
    return pretrain.initial_state(model, RECIPE)


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
            state, metrics = pretrain.clip_step(state, small_batch(t), RECIPE)
            assert before.model.vision.patch_embedding.is_deleted()
        ends.append(jax.tree.leaves(state.model))
        assert set(metrics) == {"loss", "scale", "gradient_norm"}
        assert all(value.shape == () and np.isfinite(value) for value in metrics.values())
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)
    size = pretrain.clip_step._cache_size()
    pretrain.clip_step(state, small_batch(3), RECIPE)
    assert pretrain.clip_step._cache_size() == size


def test_scale_is_trained_and_capped() -> None:
    state = small_state()
    for t in range(2):  # the learning rate is 0 in the first step of the warm-up
        state, metrics = pretrain.clip_step(state, small_batch(t), RECIPE)
    assert float(state.model.logit_scale) != pytest.approx(math.log(14.0), abs=1e-6)
    _, metrics = pretrain.clip_step(small_state(math.log(130.0)), small_batch(0), RECIPE)
    assert float(metrics["scale"]) == pytest.approx(100, rel=1e-5)


def test_kind_of_every_parameter() -> None:
    kinds = pretrain.parameter_kinds(small_model())
    for tower in (kinds.vision, kinds.text):
        for block in (tower.blocks, tower.last):
            for layer in (block.query, block.key, block.value, block.out, block.fc1):
                assert (layer.weight, layer.bias) == ("matrix", "vector")
            assert {block.layer_norm1.weight, block.layer_norm2.bias} == {"vector"}
        assert {tower.projection.weight, tower.position_embedding} == {"embedding"}
    assert {kinds.vision.patch_embedding, kinds.text.token_embedding} == {"embedding"}
    norm = kinds.vision.layer_norm_pre.weight
    assert {kinds.logit_scale, kinds.vision.class_embedding, norm} == {"vector"}


@jax.numpy_dtype_promotion("standard")
def test_muon_updates_each_layer_separately() -> None:
    """Each layer's update is nearly orthogonal, and scaled by the root of the aspect ratio."""
    recipe = dataclasses.replace(RECIPE, warmup=0.0, matrix_weight_decay=0.0, learning_rate=0.1)
    model, optimizer = small_model(), pretrain.muon_and_adamw(recipe)
    rng = np.random.default_rng(0)
    gradient = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), model)
    state = pretrain.initial_state(model, recipe)
    updates, _ = jax.jit(optimizer.update)(gradient, state.optimizer, model)
    first = np.asarray(updates.vision.blocks.query.weight)
    assert first.shape == (1, 16, 16)
    for layer in (*first, np.asarray(updates.vision.last.query.weight)):
        singular = np.linalg.svd(layer, compute_uv=False)
        assert singular.min() > 0.3 and singular.max() < 1.3
    tall = np.asarray(updates.vision.blocks.fc1.weight)[0]  # twice as many outputs as inputs
    assert 0.6 < np.linalg.svd(tall, compute_uv=False).mean() / math.sqrt(2) < 1.2


# ----------------------------------------------------------------------------- corpus and tokenizer


@functools.cache
def corpus(number: int) -> tuple[np.ndarray, list[list[str]]]:
    return captions.draw_corpus(number)


def test_corpus_contains_few_real_images() -> None:
    attributes = [captions.draw(index)[1] for index in range(600)]
    domains = Counter(each.domain for each in attributes)
    assert 0.10 < domains["real"] / 600 < 0.20
    assert all(0.16 < domains[domain] / 600 < 0.27 for domain in minidomain.DOMAINS[1:])
    assert {each.label for each in attributes} == set(range(20))


def test_corpus_is_that_of_draw_and_no_part_of_the_benchmark() -> None:
    images, texts = corpus(300)
    assert np.array_equal(images, np.stack([captions.draw(index)[0] for index in range(300)]))
    assert {len(per_image) for per_image in texts} == {captions.CAPTIONS} == {4}
    rng = minidomain.stream("captions", "real", 7, 0)
    attributes = captions.draw(7)[1]
    assert texts[7] == [captions.write_caption(attributes, rng) for _ in range(4)]
    drawn = {image.tobytes() for image in images}
    assert len(drawn) == 300
    for split in minidomain.SIZES:
        for domain in minidomain.DOMAINS:
            benchmark, _ = minidomain.draw_all(split, domain, 20)
            assert not drawn & {image.tobytes() for image in benchmark}


def test_captions_match_the_attributes() -> None:
    rng = np.random.default_rng(0)
    for index in range(600):
        _, attributes = captions.draw(index)
        colour, background = attributes.colour, attributes.background
        places = [None, attributes.position, background, f"{background} background"]
        for caption in [captions.write_caption(attributes, rng) for _ in range(6)]:
            noun, _, place = re.match(r"(.*?)( (?:in|on|at) (.*?))?\.?$", caption).groups()
            words = set(noun.split())
            assert words & set(minidomain.CLASSES) <= {minidomain.CLASSES[attributes.label]}
            assert words & set(minidomain.COLOURS) <= {colour}
            assert words & set(minidomain.EXTENTS) <= {attributes.size}
            assert (place and place.removeprefix("the ").removeprefix("a ")) in places, caption
            if " of " in noun:
                style = re.fullmatch(r"(?:an?|the) (.*?) of (?:an?|the) .*", noun)[1]
                assert style in captions.STYLE_WORDS[attributes.domain]
            assert not re.search(r"[{}]|  |\ba [aeiou]|\ban [^aeiou]", caption), caption
            assert len(caption.replace(".", " .").split()) + 2 <= 16, "over the context's length"


def test_share_of_captions_with_class_style_and_colour() -> None:
    for domain, share in (("real", 0.85), ("sketch", 0.95)):
        _, attributes = minidomain.draw("test", domain, 0)
        rng = np.random.default_rng(1)
        texts = [captions.write_caption(attributes, rng) for _ in range(4000)]
        words = [set(text.replace(".", "").split()) for text in texts]
        assert np.mean(["star" in each for each in words]) == pytest.approx(share, abs=0.02)
        assert np.mean(["of" in each for each in words]) == pytest.approx(0.8, abs=0.02)
        coloured = np.mean([bool(each & set(minidomain.COLOURS)) for each in words])
        assert coloured == (pytest.approx(0.4, abs=0.03) if domain == "real" else 0)


def test_tokenizer_of_the_embedded_corpus() -> None:
    texts = [text for per_image in corpus(300)[1] for text in per_image]
    tokenizer = captions.train_tokenizer(texts)
    vocabulary = tokenizer.get_vocab()
    size = len(vocabulary)
    assert sorted(vocabulary.values()) == list(range(size)) and size < 400
    assert (vocabulary[START_TEXT], vocabulary[END_TEXT]) == (size - 2, size - 1)
    for text in texts[:200]:
        words = [f"{word}</w>" for word in re.findall(r"\w+|\.", text)]
        assert tokenizer.encode(text).tokens == [START_TEXT, *words, END_TEXT]
    # The one-character tokens are the symbols that occur in words, with `</w>` if they end one.
    words = {word for text in texts for word in re.findall(r"\w+|\.", text)}
    symbols = {symbol for word in words for symbol in [*word[:-1], f"{word[-1]}</w>"]}
    assert {token for token in vocabulary if len(token.removesuffix("</w>")) == 1} == symbols
    assert captions.train_tokenizer(texts).to_str() == tokenizer.to_str()


def test_tokenizer_of_other_languages() -> None:
    texts = ["Grüße aus Köln!", "une fenêtre ouverte &amp; un café", "猫の写真", "it's 1999"] * 3
    tokenizer = captions.train_tokenizer(texts)
    assert "fenêtre" in tokenizer.decode(tokenizer.encode("fenêtre").ids)
    assert "1</w>" in tokenizer.get_vocab() and "'s</w>" in tokenizer.get_vocab()


# ----------------------------------------------------------------------------- batches and training


def test_batch_is_a_pure_function_of_its_number() -> None:
    """Images and captions match, each epoch has every image at most once, and seeds differ."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 12, 12, 3), np.uint8)
    images[:, 2:10, 2:10] = np.arange(20)[:, None, None, None]  # the middle identifies the image
    ids = np.stack([np.repeat(np.arange(20), 4), np.tile(np.arange(4), 20)], 1).astype(np.int32)
    corpus = pretrain.Corpus(images, ids)
    forward = [pretrain.draw_batch(corpus, t, RECIPE, 5) for t in range(6)]
    for t in (5, 2, 4, 0):
        again = pretrain.draw_batch(corpus, t, RECIPE, 5)
        assert all(np.array_equal(again[name], forward[t][name]) for name in again)
    for batch in forward:
        np.testing.assert_array_equal(batch["ids"][:, 0], batch["image"][:, 6, 6, 0])
        assert batch["image"].dtype == np.uint8
    assert {*np.concatenate([batch["ids"][:, 1] for batch in forward])} == {0, 1, 2, 3}
    for epoch in range(3):  # two batches of 8 from 20 images
        assert len({*forward[2 * epoch]["ids"][:, 0], *forward[2 * epoch + 1]["ids"][:, 0]}) == 16
    assert not np.array_equal(forward[0]["ids"], pretrain.draw_batch(corpus, 0, RECIPE, 6)["ids"])


def test_shifts_repeat_the_edges() -> None:
    images = np.random.default_rng(0).integers(0, 256, (8, 12, 12, 3), np.uint8)
    corpus = pretrain.Corpus(images, np.repeat(np.arange(8, dtype=np.int32), 4)[:, None])
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


def test_command_lowers_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 steps on 24 images, with the loss of every step recorded."""
    small = dataclasses.replace(pretrain.TINY_SIZES, vision=SMALL.vision, text=SMALL.text)
    monkeypatch.setattr(pretrain, "TINY_SIZES", small)
    monkeypatch.setattr(pretrain, "draw_corpus", lambda: captions.draw_corpus(24))
    accuracies = {domain: index / 8 for index, domain in enumerate(minidomain.DOMAINS)}
    monkeypatch.setattr(pretrain, "zero_shot_accuracies", lambda *_: accuracies)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--the", "options"])
    losses = []
    clip_step = pretrain.clip_step

    def recording_step(*arguments: object) -> tuple[pretrain.State, dict]:
        state, metrics = clip_step(*arguments)
        losses.append(float(metrics["loss"]))
        return state, metrics

    monkeypatch.setattr(pretrain, "clip_step", recording_step)
    out = tmp_path / "out"
    recipe = dataclasses.replace(RECIPE, learning_rate=4e-3)
    pretrain.main(out, recipe=recipe)
    assert len(losses) == 20 and np.mean(losses[-4:]) < 0.95 * np.mean(losses[:4])
    model, tokenizer = weights.load(str(out))
    assert model.config.vision == SMALL.vision
    assert tokenizer.get_vocab_size() == model.config.vocabulary_size
    card = (out / "README.md").read_text()
    assert capsys.readouterr().out == card + "\n"
    assert "`python -m tools.pretrain --the options`" in card
    assert "seed 0" in card and "steps 20" in card
    table = "|---|---|---|---|---|---|\n| val | {0} |\n| test | {0} |\n"
    assert card.endswith(table.format("0.0 | 12.5 | 25.0 | 37.5 | 50.0"))
    with raises("out exists: give a new folder"):
        pretrain.main(out)
    with raises("does not divide among 8 devices"):
        pretrain.main(tmp_path / "new", recipe=dataclasses.replace(RECIPE, batch_size=4))


# ----------------------------------------------------------------------------------- the tiny model


def test_stored_model_agrees_with_its_card() -> None:
    """Sizes, tokenizer, and zero-shot accuracies on `val`, up to rounding on other CPUs."""
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
