"""The equations of lipsum.py against computations by hand, its steps against the authors' own
script.
"""

import dataclasses
import functools
import math
import zlib
from collections import Counter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling
from conftest import REFERENCE
from helpers import config_of, seeded_model

import clip
import lipsum
from support import devices
from tools import seeded

# -------------------------------------------------------------------------------- equations by hand


def unit_rows(rows: int, dim: int, seed: int) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(rows, dim))
    return jnp.asarray((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


IMAGES, OTHER, TEXTS, TAU = (
    unit_rows(3, 5, 0),
    unit_rows(3, 5, 1),
    unit_rows(4, 5, 2),
    jnp.float32(20.0),
)


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
    """The energy gap by loops.

    Lipsum-FT's loss by loops, which is tau^2 / 2 times the gap over the same texts.
    """
    gaps = [
        (sum(t * x) - sum(t * y)) ** 2 for x, y in zip(IMAGES, OTHER, strict=True) for t in TEXTS
    ]
    gap = lipsum.energy_gap(IMAGES, OTHER, TEXTS)
    np.testing.assert_allclose(gap, sum(gaps) / 12, rtol=1e-5)
    model = seeded_model("tiny")
    ids = jnp.asarray(seeded.token_ids(seeded.ARCHITECTURES["tiny"], 0, 4))
    texts = jax.jit(clip.text_features)(model.text, ids)
    images, other = unit_rows(3, 40, 0), unit_rows(3, 40, 1)
    frozen = lipsum.Frozen(
        lipsum.Classifier(model.vision, jnp.zeros((40, 2))),
        model.text,
        TAU,
        lipsum.Settings(num_texts=4),
        guidance_ids=ids,
    )
    pairs = zip(np.asarray(images), np.asarray(other), strict=True)
    terms = [(20 * sum(t * x) - 20 * sum(t * y)) ** 2 for x, y in pairs for t in np.asarray(texts)]
    # It draws all four texts.
    given = lipsum.Given(frozen.zero_shot, images, other, frozen, jax.random.key(0))
    loss = jax.jit(lipsum.lipsum_loss)(given)
    np.testing.assert_allclose(loss, sum(terms) / (3 * 2 * 4), rtol=1e-5)
    np.testing.assert_allclose(loss, 20**2 / 2 * lipsum.energy_gap(images, other, texts), rtol=1e-5)


def test_equation_13_by_hand() -> None:
    """The teacher comes first and has its own head.

    At a small tau: if both are sure of one class, nothing is seen.
    """
    model, tau = seeded_model("tiny"), jnp.float32(2)
    heads = unit_rows(5, 6, 3), unit_rows(5, 6, 4)
    student, teacher = (lipsum.Classifier(model.vision, head) for head in heads)
    frozen = lipsum.Frozen(teacher, model.text, tau)
    divergences = []
    for image, other in zip(np.asarray(IMAGES), np.asarray(OTHER), strict=True):
        p, zero_shot_p = (
            np.exp(2 * x @ w) / sum(np.exp(2 * x @ w))
            for x, w in zip((image, other), np.asarray(heads), strict=True)
        )
        divergences.append(sum(zero_shot_p * np.log(zero_shot_p / p)))
    assert np.mean(divergences) > 0.1
    loss = lipsum.kd_loss(lipsum.Given(student, IMAGES, OTHER, frozen, jax.random.key(0)))
    np.testing.assert_allclose(loss, np.mean(divergences), rtol=1e-5)


def test_energy_gap_by_one_matrix_and_by_every_pair() -> None:
    """Equation 6 over 10,000 random texts:

    `d^T C2 d` against all images times all texts, to 1e-5 relative.
    """
    text = seeded_model("tiny").text
    images, zero_shot = clip.normalize(jax.random.normal(jax.random.key(0), (2, 12, 40)))
    ids = lipsum.random_texts(text, 10_000, 8, jax.random.key(0))
    texts = lipsum.embed_many_texts(text, ids)
    second_moment = lipsum.text_second_moment(text, None, 8)
    expected = np.mean(
        ((np.asarray(images - zero_shot, np.float64)) @ np.asarray(texts, np.float64).T) ** 2
    )
    np.testing.assert_allclose(lipsum.energy_gap(images, zero_shot, texts), expected, rtol=1e-5)
    np.testing.assert_allclose(
        lipsum.expected_energy_gap(images, zero_shot, second_moment), expected, rtol=1e-5
    )


def test_feature_distortion_by_hand() -> None:
    images, zero_shot = jnp.array([[1.0, 0.0], [0.6, 0.8]]), jnp.array([[0.0, 1.0], [0.6, 0.8]])
    np.testing.assert_allclose(
        lipsum.feature_distortion(images, zero_shot), math.sqrt(2) / 2, rtol=1e-6
    )


@pytest.mark.parametrize("special", [(98, 99), (0, 1), (99, 98), (0, 99), (40, 3)])
def test_random_texts_are_uniform_over_the_other_tokens(special: tuple[int, int]) -> None:
    tower = eqx.tree_at(
        lambda tower: tower.token_embedding, seeded_model("tiny").text, jnp.zeros((100, 48))
    )
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
    """Linear from 0 over the first tenth, then half a cosine to 0; without a warm-up, the peak at
    once.
    """
    rate = lipsum.learning_rate(lipsum.Settings(steps=100, learning_rate=2.0))
    steps = np.arange(101)
    expected = np.where(steps < 10, steps / 10 * 2.0, 1 + np.cos(np.pi * (steps - 10) / 90))
    np.testing.assert_allclose([rate(jnp.int32(step)) for step in steps], expected, atol=1e-6)
    assert (
        lipsum.learning_rate(lipsum.Settings(steps=100, learning_rate=2.0, warmup=0.0))(
            jnp.int32(0)
        )
        == 2.0
    )


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize(("steps", "peak_at"), [(9, 0), (10, 1), (15, 1), (19, 1), (250, 25)])
def test_warm_up_is_rounded_down(steps: int, peak_at: int) -> None:
    """As in the authors' script: a tenth of 15 steps is one step."""
    rate = lipsum.learning_rate(lipsum.Settings(steps=steps, learning_rate=2.0))
    rates = [float(rate(jnp.int32(step))) for step in range(steps)]
    assert np.argmax(rates) == peak_at and max(rates) == 2.0


# ------------------------------------------------------------------------------ the authors' script

SIZES = seeded.ARCHITECTURES["tiny"] | {
    "vision_layers": 2,
    "text_width": 64,
    "text_heads": 4,
    "context_length": 77,
    "vocabulary_size": 49408,
    "embedding_size": 32,
}


@functools.cache
def original() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "original.npz") as file:
        return dict(file)


def entries(prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): array
        for name, array in original().items()
        if name.startswith(prefix)
    }


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers from a generator per name."""
    generator = np.random.default_rng([int(original()["meta/seed"]), zlib.crc32(name.encode())])
    return generator.standard_normal(shape, dtype=np.float32)


@functools.cache
def original_weights() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Zero-shot weights, and the same with a perturbed vision tower, as the recording of
    `original.npz` drew them.
    """
    skeleton = eqx.filter_eval_shape(clip.CLIP, config_of(SIZES), jax.random.key(0))
    zero_shot = {"logit_scale": np.array(np.log(100.0), np.float32)}
    for name, leaf in eqx.filter_eval_shape(clip.to_state_dict, skeleton, "hugging_face").items():
        z = draw(name, leaf.shape)
        if "norm" in name or "layrnorm" in name:
            zero_shot[name] = 1.0 + 0.1 * z if name.endswith("weight") else 0.1 * z
        elif name.endswith(".bias"):
            zero_shot[name] = 0.05 * z
        elif "embedding" in name and "patch" not in name:
            zero_shot[name] = (0.5 if "token" in name else 0.3) * z
        elif name != "logit_scale":
            zero_shot[name] = z / np.float32(np.sqrt(np.prod(leaf.shape[1:])))
    trained = dict(zero_shot)
    for name, weight in zero_shot.items():
        if name.startswith("vision_model.") or name == "visual_projection.weight":
            scale = np.float32(0.05) * np.float32(
                np.sqrt(np.mean(np.square(weight, dtype=np.float64)))
            )
            trained[name] = weight + scale * draw(f"perturb/{name}", weight.shape)
    return zero_shot, trained


def test_original_weights_are_those_recorded() -> None:
    """The sum of absolute values per part: last bits of draws depend on NumPy's version."""
    sums: Counter[str] = Counter()
    for name, weight in original_weights()[0].items():
        sums[name.partition(".")[0]] += np.abs(weight).sum(dtype=np.float64)
    assert sums == pytest.approx(
        {
            "logit_scale": 4.605170250,
            "text_model": 1270658.679164,
            "text_projection": 209.029659669,
            "vision_model": 9647.040701420,
            "visual_projection": 202.483314434,
        },
        rel=1e-9,
    )


def original_models() -> tuple[clip.CLIP, lipsum.Frozen, lipsum.Classifier]:
    """The zero-shot model, what is frozen, and the perturbed classifier that the script's step
    starts from.
    """
    values = original()
    zero_shot, trained = (
        clip.from_state_dict(weights, config_of(SIZES), "hugging_face", "original")
        for weights in original_weights()
    )
    frozen = lipsum.Frozen(
        zero_shot=lipsum.Classifier(zero_shot.vision, jnp.asarray(values["cls0"])),
        text=zero_shot.text,
        tau=jnp.exp(zero_shot.logit_scale),
        settings=lipsum.Settings(steps=20),
    )
    return zero_shot, frozen, lipsum.Classifier(trained.vision, jnp.asarray(values["cls1"]))


def original_batch() -> dict[str, jax.Array]:
    return {"image": jnp.asarray(original()["images"]), "label": jnp.asarray(original()["labels"])}


def named(zero_shot: clip.CLIP, classifier: lipsum.Classifier) -> dict[str, np.ndarray]:
    """A classifier's leaves under the script's names."""
    model = eqx.tree_at(lambda model: model.vision, zero_shot, classifier.vision)
    return {
        name: np.asarray(leaf) for name, leaf in clip.to_state_dict(model, "hugging_face").items()
    } | {"cls": np.asarray(classifier.head)}


def with_texts(frozen: lipsum.Frozen, step: int) -> lipsum.Frozen:
    """`frozen` with the script's texts of the given step as guidance: all of them are drawn."""
    texts = jnp.asarray(original()["token_ids"][step])
    return eqx.tree_at(
        lambda frozen: frozen.guidance_ids, frozen, texts, is_leaf=lambda leaf: leaf is None
    )


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
        (frozen.tau * (features @ texts.T), "lipsum_source"),
        (frozen.tau * (zero_shot_features @ texts.T), "lipsum_target"),
    ]:
        np.testing.assert_allclose(
            actual, values[name], rtol=1e-5, atol=1e-5 * np.abs(values[name]).max(), err_msg=name
        )


@pytest.mark.parametrize(("method", "prefix"), [("ft", "ft/"), ("lipsum", "")])
def test_original_losses_and_gradients(method: str, prefix: str) -> None:
    zero_shot, frozen, classifier = original_models()
    values = original()
    gradient_of = jax.jit(
        jax.value_and_grad(
            functools.partial(lipsum.objective, lipsum.METHODS[method]), has_aux=True
        )
    )
    (value, terms), gradient = gradient_of(
        classifier, with_texts(frozen, 0), original_batch(), jax.random.key(0)
    )
    np.testing.assert_allclose(value, values[f"{prefix}loss"], rtol=1e-5)
    if terms:
        np.testing.assert_allclose(
            terms["cross_entropy"], values["negative_log_likelihood"], rtol=1e-5
        )
        np.testing.assert_allclose(terms["regularizer"], values["feat_regularization"], rtol=1e-5)
    leaves, compared = named(zero_shot, gradient), 0
    for name, expected in entries(f"{prefix}grad/").items():
        # A constant added to every key changes no attention: this gradient is zero, and noise in
        # practice.
        if name != "logit_scale" and not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(
                leaves[name], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=name
            )
            compared += 1
    assert (
        compared == 9 + 2 * 15
    )  # embeddings, outer LayerNorms, projection and head; two blocks without k_proj.bias


def test_original_three_steps() -> None:
    zero_shot, frozen, classifier = original_models()
    state = lipsum.State(
        classifier, lipsum.optimizer(frozen.settings).init(classifier), jnp.int32(0)
    )
    for step in range(3):
        placed = with_texts(frozen, step)
        state, metrics = lipsum.training_step(lipsum.METHODS["lipsum"])(
            state, placed, original_batch(), jax.random.key(0)
        )
        expected = entries(f"steps/{step}/")
        for name, theirs in {
            "loss": "loss",
            "cross_entropy": "negative_log_likelihood",
            "regularizer": "feat_regularization",
            "gradient_norm": "g_norm",
            "learning_rate": "lr",
        }.items():
            np.testing.assert_allclose(
                metrics[name], expected[theirs], rtol=1e-5, err_msg=f"step {step}: {name}"
            )
    leaves, start = named(zero_shot, state.classifier), original_weights()[1]
    for name, expected in entries("after3/").items():
        if name in leaves and name != "logit_scale" and not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(leaves[name], expected, rtol=0, atol=1e-7, err_msg=name)
            if name in start:  # and the steps did move it
                assert np.abs(expected - start[name]).max() > 5e-6


# ------------------------------------------------------------------------- every method, in PyTorch

TRAINED = [name for name, method in lipsum.METHODS.items() if method.trained]


@functools.cache
def methods_reference() -> dict[str, np.ndarray]:
    with np.load(REFERENCE / "methods.npz") as file:
        return dict(file)


def nano_setup(
    dtype: type = np.float32,
) -> tuple[clip.CLIP, lipsum.Frozen, lipsum.Classifier, lipsum.Batch]:
    """The inputs of `record_reference.py methods`, with its texts as guidance."""
    inputs = seeded.fine_tuning(seeded.SEED)
    config = config_of(seeded.ARCHITECTURES["nano"])
    models = [
        clip.from_state_dict(inputs[name], config, "hugging_face", "seeded")
        for name in ("zero_shot", "trained")
    ]
    zero_shot, trained = jax.tree.map(
        lambda leaf: jnp.asarray(np.asarray(leaf).astype(dtype)), models
    )
    texts = clip.text_features(zero_shot.text, jnp.asarray(inputs["texts"]))
    frozen = lipsum.Frozen(
        zero_shot=lipsum.Classifier(
            zero_shot.vision, jnp.asarray(inputs["zero_shot_head"].astype(dtype))
        ),
        text=zero_shot.text,
        context_head=jnp.asarray(inputs["context_head"].astype(dtype)),
        tau=jnp.asarray(dtype(20)),
        settings=lipsum.Settings(
            steps=20, learning_rate=1e-3, weight=0.7, num_texts=9, temperature=2.0
        ),
        guidance_ids=jnp.asarray(inputs["texts"]),
        second_moment=texts.T @ texts / len(texts),
    )
    classifier = lipsum.Classifier(
        trained.vision, jnp.asarray(inputs["trained_head"].astype(dtype))
    )
    pixels = inputs["images"] if dtype == np.float32 else (inputs["images"] / 255.0).astype(dtype)
    return (
        zero_shot,
        frozen,
        classifier,
        {"image": jnp.asarray(pixels), "label": jnp.asarray(inputs["labels"])},
    )


@pytest.mark.parametrize(
    "method", [name for name in TRAINED if name not in ("ema", "lp-ft")]
)  # FT's loss
def test_losses_and_gradients_equal_pytorch(method: str) -> None:
    zero_shot, frozen, classifier, batch = nano_setup()
    if lipsum.METHODS[method].start == "zeros":
        classifier = lipsum.Classifier(classifier.vision, 0 * classifier.head)
    expected = methods_reference()
    frozen = dataclasses.replace(frozen, tau=jnp.asarray(expected[f"{method}/tau"]))
    (value, _), gradient = jax.jit(
        jax.value_and_grad(
            functools.partial(lipsum.objective, lipsum.METHODS[method]), has_aux=True
        )
    )(classifier, frozen, batch, jax.random.key(0))
    np.testing.assert_allclose(value, expected[f"{method}/loss"], rtol=1e-5)
    model = eqx.tree_at(lambda model: model.vision, zero_shot, gradient.vision)
    leaves = clip.to_state_dict(model, "hugging_face") | {"head": gradient.head}
    compared = 0
    for name, theirs in expected.items():
        if name.startswith(f"{method}/grad/") and (
            method == "l2sp" or not name.endswith("k_proj.bias")
        ):
            ours = leaves[name.removeprefix(f"{method}/grad/")]
            np.testing.assert_allclose(
                ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=name
            )
            compared += 1
    assert compared == 9 + 2 * (16 if method == "l2sp" else 15)


@pytest.fixture
def float64():
    """JAX in float64 throughout."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("float64")
def test_gradients_are_those_of_finite_differences() -> None:
    """In float64, along one random direction, for cross-entropy and every loss beside it."""
    _, frozen, classifier, batch = nano_setup(np.float64)
    random = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape)), classifier)
    losses = {name: method.loss for name, method in lipsum.METHODS.items() if method.loss}

    def along(t):
        moved = jax.tree.map(lambda leaf, way: leaf + t * way, classifier, direction)
        features = lipsum.embed_images(moved.vision, frozen, batch)
        zero_shot_features = lipsum.embed_images(frozen.zero_shot.vision, frozen, batch)
        fit = lipsum.cross_entropy(lipsum.logits(features, moved.head, frozen.tau), batch["label"])
        given = lipsum.Given(moved, features, zero_shot_features, frozen, jax.random.key(0))
        return jnp.stack([fit, *(loss(given) for loss in losses.values())])

    # One compilation gives both: values beside the point and the slopes in it, by the backward
    # pass.
    values, slopes = jax.jit(lambda t: (jax.vmap(along)(t), jax.jacrev(along)(t[1])))(
        jnp.array([-1e-6, 0.0, 1e-6])
    )
    for name, before, after, slope in zip(
        ["cross-entropy", *losses], values[0], values[2], slopes, strict=True
    ):
        # The absolute tolerance is the rounding of the values, over the step.
        np.testing.assert_allclose(
            slope, (after - before) / 2e-6, rtol=1e-6, atol=1e-10, err_msg=name
        )


def test_kld_tends_to_equation_21() -> None:
    v, zero_shot_v = (TAU * (features @ TEXTS.T) for features in (IMAGES, OTHER))
    difference = np.asarray(v, np.float64) - np.asarray(zero_shot_v, np.float64)
    texts = len(TEXTS)
    limit = np.mean((difference**2).sum(1) / (2 * texts) - difference.sum(1) ** 2 / (2 * texts**2))
    with jax.enable_x64(True):  # the divergence is 1e-8 of its terms there
        v, zero_shot_v = (
            jnp.asarray(np.asarray(v), jnp.float64),
            jnp.asarray(np.asarray(zero_shot_v), jnp.float64),
        )
        np.testing.assert_allclose(lipsum.kld(v, zero_shot_v, 1e4), limit, rtol=1e-3)


def test_exact_lipsum_is_the_average_over_all_texts() -> None:
    """10,000 random texts: eq. 7 on all of them at once, and their mean over batches of 80."""
    _, frozen, classifier, batch = nano_setup()
    second_moment = lipsum.text_second_moment(frozen.text, None, 8)
    ids = lipsum.random_texts(frozen.text, 10_000, 8, jax.random.key(0))
    features, zero_shot = (
        jax.jit(clip.image_features)(each.vision, batch["image"])
        for each in (classifier, frozen.zero_shot)
    )
    frozen = eqx.tree_at(lambda frozen: frozen.second_moment, frozen, second_moment)
    given = lipsum.Given(classifier, features, zero_shot, frozen, jax.random.key(0))
    exact = lipsum.lipsum_exact_loss(given)
    texts = jax.jit(clip.text_features)(frozen.text, ids)
    object.__setattr__(frozen, "settings", lipsum.Settings(num_texts=80))

    @jax.jit
    def loss(guidance_ids: jax.Array) -> jax.Array:  # draws all of the texts given
        guided = eqx.tree_at(lambda frozen: frozen.guidance_ids, frozen, guidance_ids)
        return lipsum.lipsum_loss(given._replace(frozen=guided))

    sampled = [loss(ids[start : start + 80]) for start in range(0, 10_000, 80)]
    np.testing.assert_allclose(exact, np.mean(sampled), rtol=1e-5)
    np.testing.assert_allclose(
        exact, 20**2 / 2 * lipsum.energy_gap(features, zero_shot, texts), rtol=1e-5
    )


def test_linear_probe_minimises_the_loss() -> None:
    inputs, expected = seeded.fine_tuning(seeded.SEED), methods_reference()
    features, labels = inputs["probe_features"], inputs["probe_labels"]
    for head in (
        np.zeros((8, 5), np.float32),
        inputs["zero_shot_head"],
    ):  # it is convex: the start does not matter
        probe, steps = lipsum.linear_probe(
            *map(jnp.asarray, (features, labels, head)), jnp.float32(20)
        )
        u = lipsum.logits(jnp.asarray(features), probe, jnp.float32(20))
        np.testing.assert_allclose(
            lipsum.cross_entropy(u, jnp.asarray(labels)), expected["probe/loss"], rtol=1e-5
        )
        np.testing.assert_allclose(
            jax.nn.softmax(u),
            np.asarray(jax.nn.softmax(expected["probe/logits"].astype(np.float32))),
            atol=1e-3,
        )
        assert 0 < steps < 1000


def test_average_is_equation_16_and_fixed_head_keeps_its_bits() -> None:
    _, frozen, classifier, batch = nano_setup()
    object.__setattr__(
        frozen,
        "settings",
        lipsum.Settings(steps=20, learning_rate=1e-2, warmup=0.0, decay=0.75, fixed_head=True),
    )
    state = lipsum.initial_state(lipsum.METHODS["ema"], frozen, classifier)
    average = jax.tree.map(lambda leaf: np.array(leaf, np.float64), classifier)
    for _ in range(3):
        state, _ = lipsum.training_step(lipsum.METHODS["ema"])(
            state, frozen, batch, jax.random.key(0)
        )
        average = jax.tree.map(
            lambda old, new: 0.75 * old + 0.25 * np.asarray(new, np.float64),
            average,
            state.classifier,
        )
    for ours, expected in zip(
        jax.tree.leaves(state.evaluated), jax.tree.leaves(average), strict=True
    ):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(state.classifier.head, classifier.head)
    assert not np.array_equal(
        state.classifier.vision.projection.weight, classifier.vision.projection.weight
    )


def test_guidance_draws_different_texts_of_the_users() -> None:
    _, frozen, _, _ = nano_setup()
    object.__setattr__(frozen, "settings", lipsum.Settings(num_texts=4))
    rows = {tuple(row) for row in np.asarray(frozen.guidance_ids).tolist()}
    seen = set()
    for number in range(20):
        drawn = [
            tuple(row)
            for row in np.asarray(lipsum.draw_texts(frozen, jax.random.key(number))).tolist()
        ]
        assert len(set(drawn)) == 4 and set(drawn) <= rows
        seen |= set(drawn)
    assert seen == rows


# ----------------------------------------------------------------------------------------- post-hoc


def equal_leaves(one: lipsum.Classifier, other: lipsum.Classifier) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def test_wise_with_alpha_0_and_1_returns_the_models() -> None:
    _, frozen, classifier, _ = nano_setup()
    assert equal_leaves(lipsum.wise(frozen.zero_shot, classifier, 0.0), frozen.zero_shot)
    assert equal_leaves(lipsum.wise(frozen.zero_shot, classifier, 1.0), classifier)
    half = lipsum.wise(frozen.zero_shot, classifier, 0.25).head
    np.testing.assert_allclose(
        half, 0.75 * frozen.zero_shot.head + 0.25 * classifier.head, rtol=1e-6
    )


def tuned_setup(
    norm: lipsum.Norm = "frobenius", penalty: float = 0.0, dtype: type = np.float32
) -> tuple[lipsum.Tuned, lipsum.Batch]:
    _, frozen, classifier, batch = nano_setup(dtype)
    return lipsum.Tuned(frozen.zero_shot, classifier, frozen.tau, penalty, norm), batch


def bounds(tuned: lipsum.Tuned) -> lipsum.Radii:
    return lipsum.over_rows(jnp.max, lipsum.distances(tuned))


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
def test_tpgm_projection(norm: lipsum.Norm) -> None:
    """Ends, the radius reached per layer and tensor (by NumPy), gamma's start and bounds."""
    tuned, batch = tuned_setup(norm)
    gamma, optimizer = lipsum.tpgm_start(tuned)
    bound = bounds(tuned)
    projection = jax.jit(lipsum.tpgm_projection)

    def projected(scale: float) -> lipsum.Classifier:
        return projection(tuned, jax.tree.map(lambda radius: scale * radius, bound))

    assert equal_leaves(projected(1e6), tuned.fine_tuned)
    assert equal_leaves(projected(0.0), tuned.zero_shot)

    def weight(classifier: lipsum.Classifier) -> np.ndarray:
        first, last = classifier.vision.blocks.fc1.weight, classifier.vision.last.fc1.weight
        return np.concatenate([first, np.asarray(last)[None]])

    moved = weight(tuned.fine_tuned) - weight(tuned.zero_shot)
    shift = weight(projection(tuned, gamma)) - weight(tuned.zero_shot)
    radii = weight(gamma)
    assert radii.shape == (2, 1, 1) and gamma.head.shape == (1, 1)
    for layer in range(2):
        radius = radii[layer, 0, 0]
        if norm == "frobenius":
            np.testing.assert_allclose(radius, np.linalg.norm(moved[layer]) / 2, rtol=1e-5)
            np.testing.assert_allclose(shift[layer], moved[layer] / 2, atol=1e-6)
        else:
            rows = np.abs(moved[layer]).sum(axis=1)
            np.testing.assert_allclose(radius, rows.min() / 2, rtol=1e-5)
            np.testing.assert_allclose(np.abs(shift[layer]).sum(axis=1), rows.min() / 2, rtol=1e-3)
            np.testing.assert_allclose(weight(bound)[layer, 0, 0], rows.max(), rtol=1e-5)

    for _ in range(5):
        gamma, optimizer, _ = lipsum.tpgm_step(gamma, optimizer, tuned, batch)
    for radius, most in zip(jax.tree.leaves(gamma), jax.tree.leaves(bound), strict=True):
        assert np.all(radius >= 1e-8) and np.all(radius <= np.maximum(most, 1e-8))


def compare_with_authors_class(norm: lipsum.Norm, precision: type, rtol: float) -> None:
    """Losses of 200 steps, in which radii reach their bounds, and the last radii."""
    tuned, batch = tuned_setup(norm, dtype=precision)
    prefix = f"{precision.__name__}/{norm}"
    with np.load(REFERENCE / "tpgm.npz") as file:
        expected = {name: file[name] for name in file if name.startswith(prefix)}
    gamma, optimizer = lipsum.tpgm_start(tuned)
    losses = []
    for _ in range(200):
        gamma, optimizer, loss = lipsum.tpgm_step(gamma, optimizer, tuned, batch)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, expected[f"{prefix}/losses"], rtol=rtol)
    pairs = zip(*map(jax.tree.leaves, (gamma, bounds(tuned))), strict=True)
    at_bound = [np.isclose(radius, most).ravel() for radius, most in pairs]
    assert 0 < np.mean(np.concatenate(at_bound)) < 1
    radii = {
        "head": gamma.head,
        "visual_projection.weight": gamma.vision.projection.weight,
        "vision_model.embeddings.position_embedding.weight": gamma.vision.position_embedding,
    }
    for name, radius in radii.items():
        last = expected[f"{prefix}/radii/{name}"]
        np.testing.assert_allclose(radius[0, 0], last, rtol=10 * rtol)


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
def test_tpgm_equals_its_authors_class(norm: lipsum.Norm) -> None:
    compare_with_authors_class(norm, np.float32, rtol=1e-5)


@pytest.mark.parametrize("norm", ["frobenius", "mars"])
@pytest.mark.usefixtures("float64")
def test_tpgm_equals_its_authors_class_in_float64(norm: lipsum.Norm) -> None:
    """Here the 1e-8 beside the distance shows: with `mars`, a radius leaves its bound again."""
    compare_with_authors_class(norm, np.float64, rtol=1e-7)


def test_a_radius_at_its_bound_keeps_its_gradient_below_a_quarter() -> None:
    """In float32, `0.2 + 1e-8` is more than 0.2, and `0.3 + 1e-8` is 0.3."""
    tuned, _ = tuned_setup()

    def with_head(value: float) -> lipsum.Classifier:
        head = jnp.zeros_like(tuned.zero_shot.head).at[0, 0].set(value)
        return eqx.tree_at(lambda classifier: classifier.head, tuned.zero_shot, head)

    def slope(shift: float) -> jax.Array:
        ends = {"zero_shot": with_head(0), "fine_tuned": with_head(shift)}
        given = dataclasses.replace(tuned, **ends)
        total = jax.grad(lambda gamma: jnp.sum(lipsum.tpgm_projection(given, gamma).head))
        return total(lipsum.distances(given)).head[0, 0]

    np.testing.assert_allclose(slope(0.2), 1, rtol=1e-6)
    assert slope(0.3) == 0


def test_tpgm_c_adds_the_squares_of_the_radii() -> None:
    tuned, batch = tuned_setup()
    gamma, _ = lipsum.tpgm_start(tuned)
    loss = jax.jit(lipsum.tpgm_loss)
    with_penalty = loss(gamma, dataclasses.replace(tuned, penalty=0.5), batch)
    squares = sum(np.sum(np.square(radius, dtype=np.float64)) for radius in jax.tree.leaves(gamma))
    np.testing.assert_allclose(with_penalty - loss(gamma, tuned, batch), 0.5 * squares, rtol=1e-4)


@pytest.mark.usefixtures("float64")
def test_tpgm_gradient_is_that_of_finite_differences() -> None:
    tuned, batch = tuned_setup(penalty=0.3, dtype=np.float64)
    gamma, _ = lipsum.tpgm_start(tuned)
    random = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: leaf * jnp.asarray(random.normal(size=leaf.shape)), gamma)

    def along(t):
        moved = jax.tree.map(lambda leaf, way: leaf + t * way, gamma, direction)
        return lipsum.tpgm_loss(moved, tuned, batch)

    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(along)))(jnp.array([-1e-5, 0.0, 1e-5]))
    np.testing.assert_allclose(slopes[1], (values[2] - values[0]) / 2e-5, rtol=1e-6)


def test_soup_is_the_mean() -> None:
    _, frozen, classifier, _ = nano_setup()
    third = lipsum.wise(frozen.zero_shot, classifier, 3.0)
    assert equal_leaves(lipsum.soup([classifier]), classifier)
    mixed = lipsum.soup([frozen.zero_shot, classifier, third])
    for mean, *members in zip(
        *map(jax.tree.leaves, (mixed, frozen.zero_shot, classifier, third)), strict=True
    ):
        np.testing.assert_allclose(
            mean, np.mean([np.asarray(x, np.float64) for x in members], axis=0), atol=1e-6
        )


def test_greedy_members() -> None:
    """Best first, ties in the given order, kept only if strictly better, at most as many as asked
    for.
    """
    alone = [0.5, 0.8, 0.8, 0.7]
    asked = []

    def accuracy_of(members: list[int]) -> float:
        asked.append(members)
        return {(1, 2): 0.8, (1, 3): 0.9, (1, 3, 0): 0.95}[tuple(members)]

    assert lipsum.greedy_members(alone, accuracy_of, 4) == [1, 3, 0]
    assert asked == [[1, 2], [1, 3], [1, 3, 0]]
    assert lipsum.greedy_members(alone, accuracy_of, 2) == [1, 3]
    assert lipsum.greedy_members(alone, lambda members: 0.1, 4) == [1]


# -------------------------------------------------------------------------------------------- steps


def tiny_setup() -> tuple[lipsum.Frozen, lipsum.Batch]:
    model = seeded_model("tiny")
    frozen = lipsum.Frozen(
        zero_shot=lipsum.Classifier(model.vision, unit_rows(5, 40, 0).T),
        text=model.text,
        context_head=unit_rows(2, 40, 1).T,
        tau=jnp.float32(100),
        settings=lipsum.Settings(steps=20, learning_rate=1e-4),
        second_moment=jnp.eye(40) / 40,
    )
    batch = {
        "image": jnp.asarray(seeded.images(seeded.ARCHITECTURES["tiny"], 1, 8)),
        "label": jnp.arange(8, dtype=jnp.int32) % 5,
    }
    return frozen, batch


@pytest.mark.usefixtures("small_leaves_are_split")
@pytest.mark.parametrize("method", ["ft", "lipsum"])
def test_steps_are_pure_and_compile_once(method: str) -> None:
    """Equal inputs give equal bits.

    The given state is donated, and the returned one has its shardings.
    """
    frozen, batch = tiny_setup()
    batch = {name: np.asarray(array) for name, array in batch.items()}
    mesh = scaling.mesh_of(8)
    state = devices.place(lipsum.initial_state(lipsum.METHODS[method], frozen), mesh, fsdp=True)
    step = lipsum.training_step(lipsum.METHODS[method], devices.shardings(state, mesh, fsdp=True))
    losses = []
    for _ in range(2):
        placed, compiled = devices.place(frozen, mesh, fsdp=True), step._cache_size()
        state = devices.place(lipsum.initial_state(lipsum.METHODS[method], frozen), mesh, fsdp=True)
        for _ in range(10):
            given = state
            state, metrics = step(
                given, placed, devices.shard_batch(batch, mesh), jax.random.key(0)
            )
            losses.append(float(metrics["loss"]))
        assert given.classifier.head.is_deleted()
        for old, new in zip(jax.tree.leaves(given), jax.tree.leaves(state), strict=True):
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
    assert compiled == 1 == step._cache_size()
    assert losses[:10] == losses[10:] and losses[9] < losses[1]


def test_texts_are_fresh_at_every_step_and_the_zero_shot_model_stays() -> None:
    """At rate 0 only the texts can change the regulariser; frozen weights keep their bits."""
    frozen, batch = tiny_setup()
    before = [np.array(leaf) for leaf in jax.tree.leaves(frozen)]
    state = lipsum.initial_state(lipsum.METHODS["lipsum"], frozen)
    moved = jax.tree.map(lambda leaf: leaf * jnp.float32(1.1), state.classifier)
    still = eqx.tree_at(lambda frozen: frozen.tau, frozen, jnp.float32(10))
    object.__setattr__(still, "settings", lipsum.Settings(steps=20, learning_rate=0.0))
    state = lipsum.State(moved, state.optimizer, state.step)
    seen = []
    for _ in range(3):
        state, metrics = lipsum.training_step(lipsum.METHODS["lipsum"])(
            state, still, batch, jax.random.key(0)
        )
        seen.append(float(metrics["regularizer"]))
    assert len(set(seen)) == 3
    for leaf, old in zip(jax.tree.leaves(frozen), before, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_regulariser_is_zero_at_the_start() -> None:
    frozen, batch = tiny_setup()
    method = lipsum.METHODS["lipsum"]
    _, terms = lipsum.objective(method, frozen.zero_shot, frozen, batch, jax.random.key(0))
    assert terms["regularizer"] == 0


@pytest.mark.parametrize("method", ["lipsum", "car-ft", "ema"])
def test_a_sweep_compiles_once(method: str) -> None:
    """Rate, lambda, temperature and decay are data: one program computes different results for
    different values.
    """
    frozen, batch = tiny_setup()
    step = lipsum.training_step(lipsum.METHODS[method])
    compiled = step._cache_size()
    ends = set()
    start = lipsum.Settings(steps=21, warmup=0.0, weight=1.0, decay=0.9)
    for changes in (
        {},
        {"learning_rate": 1e-3},
        {"weight": 3.0},
        {"temperature": 2.0},
        {"decay": 0.5},
    ):
        object.__setattr__(frozen, "settings", dataclasses.replace(start, **changes))
        state = lipsum.initial_state(lipsum.METHODS[method], frozen)
        for _ in range(2):
            state, metrics = step(state, frozen, batch, jax.random.key(0))
        ends.add((float(metrics["loss"]), float(jnp.sum(jnp.abs(state.evaluated.head)))))
    assert step._cache_size() == compiled + 1
    assert len(ends) == {"lipsum": 3, "car-ft": 4, "ema": 3}[method]
