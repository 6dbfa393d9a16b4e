"""The equations of lipsum.py by hand, and its steps against what the authors' own script computes."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeded
from conftest import shared
from test_clip import config_of, seeded_model

import clip
import data
import lipsum
import weights

# ------------------------------------------------------------------------------------------------- equations by hand


def unit_rows(rows: int, dim: int, seed: int) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(rows, dim))
    return jnp.asarray((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


IMAGES, OTHER, TEXTS, TAU = unit_rows(3, 5, 0), unit_rows(3, 5, 1), unit_rows(4, 5, 2), jnp.float32(20.0)


def test_equations_1_to_3() -> None:
    head, labels = unit_rows(5, 6, 3), jnp.array([5, 0, 2], jnp.int32)
    u = lipsum.logits(IMAGES, head, TAU)
    losses = []
    for image, label, row in zip(IMAGES, labels, np.asarray(u), strict=True):
        by_hand = [20 * sum(image * head[:, k]) for k in range(6)]
        np.testing.assert_allclose(row, by_hand, rtol=1e-5)
        total = sum(math.exp(value) for value in by_hand)
        losses.append(-math.log(math.exp(by_hand[label]) / total))
    np.testing.assert_allclose(lipsum.class_probabilities(u).sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(lipsum.class_probabilities(u)[2, 2], math.exp(-losses[2]), rtol=1e-4)
    np.testing.assert_allclose(lipsum.cross_entropy(u, labels), sum(losses) / 3, rtol=1e-5)


def test_equations_4_and_5() -> None:
    energy = lipsum.energy(IMAGES, TEXTS)
    np.testing.assert_allclose(energy[1, 3], -sum(IMAGES[1] * TEXTS[3]), rtol=1e-5)
    total = sum(math.exp(-value) for value in energy[1])
    np.testing.assert_allclose(
        lipsum.text_probabilities(IMAGES, TEXTS)[1, 3], math.exp(-energy[1, 3]) / total, rtol=1e-5
    )


def test_equations_6_to_8() -> None:
    """The energy gap by loops; the regulariser is tau^2 / 2 of it where both use the same texts."""
    gaps = [(sum(t * x) - sum(t * y)) ** 2 for x, y in zip(IMAGES, OTHER, strict=True) for t in TEXTS]
    gap = lipsum.energy_gap(IMAGES, OTHER, TEXTS)
    np.testing.assert_allclose(gap, sum(gaps) / 12, rtol=1e-5)
    v, zero_shot_v = (lipsum.text_energies(features, TEXTS, TAU) for features in (IMAGES, OTHER))
    np.testing.assert_allclose(v[2, 1], 20 * sum(IMAGES[2] * TEXTS[1]), rtol=1e-5)
    np.testing.assert_allclose(lipsum.lipsum_regularizer(v, zero_shot_v), 20**2 / 2 * gap, rtol=1e-5)


@pytest.mark.parametrize("special", [(98, 99), (0, 1), (99, 98), (0, 99), (40, 3)])
def test_random_texts_are_uniform_over_the_other_tokens(special: tuple[int, int]) -> None:
    tower = eqx.tree_at(lambda tower: tower.token_embedding, seeded_model("tiny").text, jnp.zeros((100, 48)))
    object.__setattr__(tower, "start_token", special[0])
    object.__setattr__(tower, "end_token", special[1])
    ids = np.asarray(lipsum.random_texts(tower, 5000, 8, jax.random.key(0)))
    assert ids.shape == (5000, 10)
    assert set(ids[:, 0]) == {special[0]} and set(ids[:, -1]) == {special[1]}
    counts = np.bincount(ids[:, 1:-1].ravel(), minlength=100)
    assert not counts[list(special)].any()
    others = np.delete(counts, special)
    expected = 40_000 / 98
    # A chi-square of 97 degrees of freedom exceeds 161 with probability 5e-5.
    assert np.sum((others - expected) ** 2 / expected) < 161


@jax.numpy_dtype_promotion("standard")
def test_learning_rate_schedule() -> None:
    """Linear from 0 over the first tenth, then half a cosine to 0; without a warm-up, the peak at once."""
    rate = lipsum.learning_rate(lipsum.Settings(steps=100, learning_rate=2.0))
    steps = np.arange(101)
    expected = np.where(steps < 10, steps / 10 * 2.0, 1 + np.cos(np.pi * (steps - 10) / 90))
    np.testing.assert_allclose([rate(jnp.int32(step)) for step in steps], expected, atol=1e-6)
    assert lipsum.learning_rate(lipsum.Settings(steps=100, learning_rate=2.0, warmup=0.0))(jnp.int32(0)) == 2.0


# ------------------------------------------------------------------------------------------------ the authors' script

SIZES = seeded.ARCHITECTURES["tiny"] | {
    "vision_layers": 2, "text_width": 64, "text_heads": 4, "context_length": 77, "vocabulary_size": 49408,
    "embedding_size": 32,
}  # fmt: skip


@functools.cache
def original() -> dict[str, np.ndarray]:
    with np.load(shared("reference/original_tiny.npz")) as file:
        return dict(file)


def entries(prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in original().items() if name.startswith(prefix)}


def original_models() -> tuple[clip.CLIP, lipsum.Frozen, lipsum.Classifier]:
    """The zero-shot model, what is frozen, and the perturbed classifier that the script's step starts from."""
    values, config = original(), config_of(SIZES)
    zero_shot = weights.from_state_dict(entries("w0/"), config, "hugging_face", "original")
    trained = weights.from_state_dict(entries("w0/") | entries("w1/"), config, "hugging_face", "original")
    frozen = lipsum.Frozen(
        zero_shot=lipsum.Classifier(zero_shot.vision, jnp.asarray(values["cls0"])),
        text=zero_shot.text,
        context_head=jnp.zeros((32, 1)),
        tau=jnp.exp(zero_shot.logit_scale),
        settings=lipsum.Settings(steps=20),
    )
    return zero_shot, frozen, lipsum.Classifier(trained.vision, jnp.asarray(values["cls1"]))


def original_batch() -> dict[str, jax.Array]:
    return {"image": jnp.asarray(original()["images"]), "label": jnp.asarray(original()["labels"])}


def named(zero_shot: clip.CLIP, classifier: lipsum.Classifier) -> dict[str, np.ndarray]:
    """A classifier's leaves under the script's names."""
    model = eqx.tree_at(lambda model: model.vision, zero_shot, classifier.vision)
    return {name: np.asarray(leaf) for name, leaf in weights.to_state_dict(model, "hugging_face").items()} | {
        "cls": np.asarray(classifier.head)
    }


@pytest.fixture
def recorded_texts(monkeypatch: pytest.MonkeyPatch):
    """Makes `random_texts` return the script's texts of the given step."""

    def use(step: int) -> None:
        ids = jnp.asarray(original()["token_ids"][step])
        monkeypatch.setattr(lipsum, "random_texts", lambda text, num_texts, length, key: ids)

    return use


def test_original_stages() -> None:
    values = original()
    _, frozen, classifier = original_models()
    features = clip.image_features(classifier.vision, jnp.asarray(values["images"]))
    zero_shot_features = clip.image_features(frozen.zero_shot.vision, jnp.asarray(values["images"]))
    texts = clip.text_features(frozen.text, jnp.asarray(values["token_ids"][0]))
    for actual, name in [
        (features, "output"),
        (zero_shot_features, "priors"),
        (texts, "text_features"),
        (lipsum.logits(features, classifier.head, frozen.tau), "logits"),
        (lipsum.text_energies(features, texts, frozen.tau), "lipsum_source"),
        (lipsum.text_energies(zero_shot_features, texts, frozen.tau), "lipsum_target"),
    ]:
        np.testing.assert_allclose(
            actual, values[name], rtol=1e-5, atol=1e-5 * np.abs(values[name]).max(), err_msg=name
        )


@pytest.mark.parametrize(("loss", "prefix"), [(lipsum.ft_loss, "ft/"), (lipsum.lipsum_loss, "")])
def test_original_losses_and_gradients(loss: lipsum.Loss, prefix: str, recorded_texts) -> None:
    recorded_texts(0)
    zero_shot, frozen, classifier = original_models()
    values = original()
    gradient_of = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, terms), gradient = gradient_of(classifier, frozen, original_batch(), jax.random.key(0))
    np.testing.assert_allclose(value, values[f"{prefix}loss"], rtol=1e-5)
    if terms:
        np.testing.assert_allclose(terms["cross_entropy"], values["negative_log_likelihood"], rtol=1e-5)
        np.testing.assert_allclose(terms["regularizer"], values["feat_regularization"], rtol=1e-5)
    leaves, compared = named(zero_shot, gradient), 0
    for name, expected in entries(f"{prefix}grad/").items():
        # A constant added to every key changes no attention: this gradient is zero, and noise in practice.
        if name != "logit_scale" and not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(leaves[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name)
            compared += 1
    assert compared == 9 + 2 * 15  # embeddings, outer LayerNorms, projection and head; two blocks without k_proj.bias


def test_original_three_steps(recorded_texts) -> None:
    zero_shot, frozen, classifier = original_models()
    state = lipsum.State(classifier, lipsum.optimizer(frozen.settings).init(classifier), jnp.int32(0))
    for step in range(3):
        recorded_texts(step)
        state, metrics = lipsum.training_step(lipsum.lipsum_loss)(state, frozen, original_batch(), jax.random.key(0))
        expected = entries(f"steps/{step}/")
        for name, theirs in {
            "loss": "loss",
            "cross_entropy": "negative_log_likelihood",
            "regularizer": "feat_regularization",
            "gradient_norm": "g_norm",
            "learning_rate": "lr",
        }.items():
            np.testing.assert_allclose(metrics[name], expected[theirs], rtol=1e-5, err_msg=f"step {step}: {name}")
    leaves, start = named(zero_shot, state.classifier), entries("w1/")
    for name, expected in entries("after3/").items():
        if name in leaves and name != "logit_scale" and not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(leaves[name], expected, rtol=0, atol=1e-7, err_msg=name)
            if name in start:  # and the steps did move it
                assert np.abs(expected - start[name]).max() > 5e-6


# --------------------------------------------------------------------------------------------------------------- steps


def tiny_setup() -> tuple[lipsum.Frozen, lipsum.Batch]:
    model = seeded_model("tiny")
    frozen = lipsum.Frozen(
        zero_shot=lipsum.Classifier(model.vision, unit_rows(5, 40, 0).T),
        text=model.text,
        context_head=unit_rows(2, 40, 1).T,
        tau=jnp.float32(100),
        settings=lipsum.Settings(steps=20, learning_rate=1e-3),
    )
    batch = {
        "image": jnp.asarray(seeded.images(seeded.ARCHITECTURES["tiny"], 1, 8)),
        "label": jnp.arange(8, dtype=jnp.int32) % 5,
    }
    return frozen, batch


@pytest.mark.parametrize("method", lipsum.METHODS)
def test_steps_are_pure_compile_once_and_agree_on_1_2_and_8_devices(method: str) -> None:
    frozen, batch = tiny_setup()
    host_batch = {name: np.asarray(array) for name, array in batch.items()}
    step = lipsum.METHODS[method].step
    losses = {}
    for devices in (1, 2, 8):
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
        )
        for repeat in range(2):
            placed = data.replicate(frozen, mesh)
            state = data.replicate(lipsum.initial_state(frozen), mesh)
            compiled = step._cache_size()
            losses[devices, repeat] = []
            for _ in range(5):
                given = state
                state, metrics = step(given, placed, data.shard_batch(host_batch, mesh), jax.random.key(0))
                losses[devices, repeat].append(float(metrics["loss"]))
            assert given.classifier.head.is_deleted()  # donated
            assert step._cache_size() - compiled == (repeat == 0)
        assert losses[devices, 0] == losses[devices, 1]
    np.testing.assert_allclose(losses[2, 0], losses[1, 0], rtol=1e-5)
    np.testing.assert_allclose(losses[8, 0], losses[1, 0], rtol=1e-5)
    assert losses[1, 0][-1] < losses[1, 0][1]


def test_texts_are_fresh_at_every_step_and_the_zero_shot_model_stays() -> None:
    """At rate 0 only the texts can change the regulariser; frozen weights keep their bits."""
    frozen, batch = tiny_setup()
    before = [np.array(leaf) for leaf in jax.tree.leaves(frozen)]
    state = lipsum.initial_state(frozen)
    moved = jax.tree.map(lambda leaf: leaf * jnp.float32(1.1), state.classifier)
    still = eqx.tree_at(lambda frozen: frozen.tau, frozen, jnp.float32(10))
    object.__setattr__(still, "settings", lipsum.Settings(steps=20, learning_rate=0.0))
    state = lipsum.State(moved, state.optimizer, state.step)
    seen = []
    for _ in range(3):
        state, metrics = lipsum.lipsum_step(state, still, batch, jax.random.key(0))
        seen.append(float(metrics["regularizer"]))
    assert len(set(seen)) == 3
    for leaf, old in zip(jax.tree.leaves(frozen), before, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_regulariser_is_zero_at_the_start() -> None:
    frozen, batch = tiny_setup()
    _, terms = lipsum.lipsum_loss(frozen.zero_shot, frozen, batch, jax.random.key(0))
    assert terms["regularizer"] == 0
