"""Lipsum-FT: robust fine-tuning of zero-shot models using random text guidance. One function per equation.

Paper: Nam et al., ICLR 2024, https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --method lipsum` uses it.

Equations stand in the paper's order under the paper's numbers; equation 1's zero-shot head is `clip.zero_shot_head`.
Images are [B, H, W, 3], features [B, D] and [M, D] of unit norm, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

import clip


@dataclass(frozen=True)
class Settings:
    """What a training step is told; the defaults are the paper's for DomainNet (section 5 and the authors' script)."""

    steps: int = 5_000
    learning_rate: float = 1e-5  # the peak
    warmup: float = 0.1  # fraction of the steps
    weight: float = 1.0  # lambda
    num_texts: int = 80  # M
    text_length: int = 8  # L, without start and end token


class Classifier(eqx.Module):
    """What fine-tuning trains: `theta`, the vision tower with its projection, and the head `W`."""

    vision: clip.VisionTower
    head: Float[Array, "dim classes"]


class Frozen(eqx.Module):
    """What fine-tuning never changes: `theta_0` with its head, `phi`, the context head, and `tau`."""

    zero_shot: Classifier
    text: clip.TextTower
    context_head: Float[Array, "dim templates"]
    tau: Float[Array, ""]
    settings: Settings = eqx.field(static=True)


class State(eqx.Module):
    """What one step maps to its successor."""

    classifier: Classifier
    optimizer: optax.OptState
    step: Int[Array, ""]


Batch = dict[str, UInt8[Array, "batch height width 3"] | Float[Array, "batch height width 3"] | Int[Array, " batch"]]
Metrics = dict[str, Float[Array, ""]]

# ----------------------------------------------------------------------------------------- zero-shot models, section 2


def logits(
    features: Float[Array, "batch dim"], head: Float[Array, "dim classes"], tau: Float[Array, ""]
) -> Float[Array, "batch classes"]:
    """Equation 1: `u(x) = tau F_theta(x) W`."""
    return tau * (features @ head)


def class_probabilities(u: Float[Array, "batch classes"]) -> Float[Array, "batch classes"]:
    """Equation 2: `p(y = k | x)`."""
    return jax.nn.softmax(u)


def cross_entropy(u: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, ""]:
    """Equation 3: the mean of `-log p(y | x)`, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(u, labels))


# ----------------------------------------------------------------------------------------- the energy gap, section 4.1


def text_probabilities(
    images: Float[Array, "batch dim"], texts: Float[Array, "texts dim"]
) -> Float[Array, "batch texts"]:
    """Equation 4: the discriminative model `p(t | x)` over the given texts."""
    return jax.nn.softmax(-energy(images, texts))


def energy(images: Float[Array, "batch dim"], texts: Float[Array, "texts dim"]) -> Float[Array, "batch texts"]:
    """Equation 5: `E(x, t) = -<F_theta(x), G_phi(t)>`."""
    return -images @ texts.T


def energy_gap(
    images: Float[Array, "batch dim"], zero_shot_images: Float[Array, "batch dim"], texts: Float[Array, "texts dim"]
) -> Float[Array, ""]:
    """Equation 6: the mean square difference of the energies of two models, over images and texts."""
    return jnp.mean((energy(images, texts) - energy(zero_shot_images, texts)) ** 2)


# --------------------------------------------------------------------------------------------- Lipsum-FT, section 4.2


def lipsum_regularizer(v: Float[Array, "batch texts"], zero_shot_v: Float[Array, "batch texts"]) -> Float[Array, ""]:
    """Equation 7: `R(theta) = |v_theta(x) - v_theta0(x)|^2 / 2M`, the mean over the batch."""
    return jnp.mean(jnp.sum((v - zero_shot_v) ** 2, axis=1)) / (2 * v.shape[1])


def text_energies(
    images: Float[Array, "batch dim"], texts: Float[Array, "texts dim"], tau: Float[Array, ""]
) -> Float[Array, "batch texts"]:
    """Equation 8: `v_theta(x)_m = tau <F_theta(x), G_phi(t_m)>`."""
    return tau * (images @ texts.T)


def random_texts(text: clip.TextTower, num_texts: int, length: int, key: PRNGKeyArray) -> Int[Array, "texts tokens"]:
    """The texts of equation 8: start token, `length` ids uniform over the rest of the vocabulary, end token."""
    ids = jax.random.randint(key, (num_texts, length), 0, text.token_embedding.shape[0] - 2)
    for token in sorted((text.start_token, text.end_token)):
        ids = ids + (ids >= token).astype(ids.dtype)  # step over the two ids that are left out
    return jnp.pad(ids, ((0, 0), (1, 1)), constant_values=((0, 0), (text.start_token, text.end_token)))


# ---------------------------------------------------------------------------------------------------------- the update


def learning_rate(settings: Settings) -> optax.Schedule:
    """The rate of equation 9: linear from 0 to the peak over the warm-up, then a half cosine to 0."""
    warmup_steps = round(settings.warmup * settings.steps)
    if warmup_steps == 0:
        return optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    return optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, warmup_steps, settings.steps)


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Equation 9 in practice: Adam with betas 0.9 and 0.999, epsilon 1e-8, no weight decay."""
    return optax.adam(learning_rate(settings), b1=0.9, b2=0.999, eps=1e-8)


def initial_state(frozen: Frozen) -> State:
    """Fine-tuning starts at the zero-shot classifier. A copy: steps donate their state."""
    classifier = jax.tree.map(jnp.copy, frozen.zero_shot)
    return State(classifier, optimizer(frozen.settings).init(classifier), jnp.int32(0))


Loss = Callable[[Classifier, Frozen, Batch, PRNGKeyArray], tuple[Float[Array, ""], Metrics]]
Step = Callable[[State, Frozen, Batch, PRNGKeyArray], tuple[State, Metrics]]


def training_step(loss: Loss) -> Step:
    """The jitted step of the method that minimises `loss`: gradient, Adam, update. Donates its state.

    `key` is the run's; the step's own is folded from it, so that a resumed run draws what an unbroken one would.
    """

    @partial(jax.jit, donate_argnums=0)
    def step(state: State, frozen: Frozen, batch: Batch, key: PRNGKeyArray) -> tuple[State, Metrics]:
        step_key = jax.random.fold_in(key, state.step)
        (value, terms), gradient = jax.value_and_grad(loss, has_aux=True)(state.classifier, frozen, batch, step_key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer count with floats
            updates, optimizer_state = optimizer(frozen.settings).update(gradient, state.optimizer, state.classifier)
            rate = learning_rate(frozen.settings)(state.step)
        metrics = {"loss": value, **terms, "learning_rate": rate, "gradient_norm": optax.tree.norm(gradient)}
        return State(optax.apply_updates(state.classifier, updates), optimizer_state, state.step + 1), metrics

    return step


# --------------------------------------------------------------------------------------------------------- the methods


def ft_loss(
    classifier: Classifier, frozen: Frozen, batch: Batch, key: PRNGKeyArray
) -> tuple[Float[Array, ""], Metrics]:
    """FT: cross-entropy alone (equation 3)."""
    features = clip.image_features(classifier.vision, batch["image"])
    return cross_entropy(logits(features, classifier.head, frozen.tau), batch["label"]), {}


def lipsum_loss(
    classifier: Classifier, frozen: Frozen, batch: Batch, key: PRNGKeyArray
) -> tuple[Float[Array, ""], Metrics]:
    """Lipsum-FT: cross-entropy plus lambda times equation 7, on random texts drawn afresh and shared by the batch."""
    settings = frozen.settings
    features = clip.image_features(classifier.vision, batch["image"])
    zero_shot_features = clip.image_features(frozen.zero_shot.vision, batch["image"])
    ids = random_texts(frozen.text, settings.num_texts, settings.text_length, key)
    texts = clip.text_features(frozen.text, ids)
    fit = cross_entropy(logits(features, classifier.head, frozen.tau), batch["label"])
    regularizer = lipsum_regularizer(
        text_energies(features, texts, frozen.tau), text_energies(zero_shot_features, texts, frozen.tau)
    )
    return fit + settings.weight * regularizer, {"cross_entropy": fit, "regularizer": regularizer}


ft_step = training_step(ft_loss)
lipsum_step = training_step(lipsum_loss)


class Method(NamedTuple):
    """A way to fine-tune: its name in tables and its step."""

    label: str
    step: Step


METHODS = {
    "ft": Method("FT", ft_step),
    "lipsum": Method("Lipsum-FT", lipsum_step),
}
