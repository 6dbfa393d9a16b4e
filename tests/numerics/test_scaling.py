"""Same losses on any devices and processes, with and without --fsdp and --accumulate; precision;
remat.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scaling

import clip
import lipsum
from support import devices

pytestmark = pytest.mark.usefixtures("small_leaves_are_split")


@functools.cache
def losses_on_one_device(method: str) -> list[float]:
    losses = scaling.losses(method, scaling.mesh_of(1))
    assert losses[-1] < losses[1]
    return losses


def assert_same_losses(method: str, devices: int, **options: Any) -> None:
    losses = scaling.losses(method, scaling.mesh_of(devices), **options)
    np.testing.assert_allclose(losses, losses_on_one_device(method), rtol=1e-5)


COMBINATIONS = [
    (devices, {"fsdp": fsdp, "accumulate": parts})
    for devices in (1, 2, 8)
    for fsdp in (False, True)
    for parts in (1, 4)
] + [(8, {"fsdp": True, "accumulate": 4, "remat": True})]


@pytest.mark.parametrize("method", scaling.METHODS)
def test_losses_do_not_depend_on_devices(method: str) -> None:
    """On eight devices with --fsdp and --accumulate. FT and Lipsum-FT also without."""
    assert_same_losses(method, 8, fsdp=True, accumulate=4)
    if method in ("ft", "lipsum"):
        assert_same_losses(method, 8)


@pytest.mark.slow
@pytest.mark.parametrize("method", scaling.METHODS)
@pytest.mark.parametrize(("devices", "options"), COMBINATIONS)
def test_losses_in_every_combination(method: str, devices: int, options: dict[str, Any]) -> None:
    assert_same_losses(method, devices, **options)
    jax.clear_caches()  # hundreds of programs: see conftest.py


@pytest.mark.slow
def test_losses_on_two_processes() -> None:
    """With four devices each, both processes have the losses of one device. test_resume.py runs
    train.py on two.
    """
    script = Path(scaling.__file__)
    address = scaling.free_address()
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, address, "2", str(number), *scaling.METHODS],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        found = json.loads(output.splitlines()[-1])
        assert len(found) == 2 * len(scaling.METHODS)
        for name, losses in found.items():
            np.testing.assert_allclose(
                losses, losses_on_one_device(name.split()[0]), rtol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("method", ["ft", "ema"])
def test_fsdp_keeps_under_a_sixth_on_each_device(method: str) -> None:
    """Before and after a step. An array that does not divide evenly is copied to every device."""
    mesh = scaling.mesh_of(8)
    state, frozen, batch = scaling.start(method, mesh, fsdp=True)
    step = lipsum.training_step(lipsum.METHODS[method], devices.shardings(state, mesh, fsdp=True))
    for tree in (state, frozen, step(state, frozen, batch, jax.random.key(0))[0]):
        arrays = [leaf for leaf in jax.tree.leaves(tree) if not leaf.is_deleted()]
        if not arrays:
            continue
        held = dict.fromkeys(jax.devices(), 0)
        for array in arrays:
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
        assert max(held.values()) < sum(array.nbytes for array in arrays) / 6
    uneven = devices.place(np.zeros((3, 5)), mesh, fsdp=True)
    assert uneven.sharding.is_fully_replicated


# ---------------------------------------------------------------------------------------- precision


def test_only_the_towers_compute_in_bfloat16() -> None:
    """Features are near those of float32, but differ.

    Weights, optimizer, losses and gradients stay float32.
    """
    mesh = scaling.mesh_of(1)
    state, frozen, batch = scaling.start("lipsum", mesh, False, precision="bfloat16")
    image_features = jax.jit(clip.image_features)
    exact = image_features(frozen.zero_shot.vision, batch["image"])
    rounded = image_features(clip.compute_in(frozen.zero_shot.vision, "bfloat16"), batch["image"])
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(rounded, axis=1), 1, rtol=1e-6)
    assert 1e-4 < jnp.max(jnp.abs(rounded - exact)) < 0.05
    state, metrics = lipsum.training_step(lipsum.METHODS["lipsum"])(
        state, frozen, batch, jax.random.key(0)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((state, metrics))} == {
        jnp.dtype("float32"),
        jnp.dtype("int32"),
    }
    np.testing.assert_allclose(
        metrics["cross_entropy"], losses_on_one_device("lipsum")[0], rtol=0.02
    )


def operations(jaxpr: Any) -> list[Any]:
    """Returns every equation, including those of nested functions."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += operations(inner)
    return found


def test_layer_norms_stay_in_float32() -> None:
    """Their weights, too: rounded to bfloat16, a scale near 1 would have eight bits."""
    tower = clip.compute_in(scaling.random_model().vision, "bfloat16")
    for name, leaf in clip.named_leaves(tower).items():
        assert leaf.dtype == (jnp.float32 if "layer_norm" in name else jnp.bfloat16), name


def test_bfloat16_in_matrix_products_only() -> None:
    """Matrix products are in bfloat16; exponentials, roots and maxima are in float32."""
    tower = clip.compute_in(scaling.random_model().vision, "bfloat16")
    images = jnp.zeros((2, 16, 16, 3), jnp.uint8)
    found = operations(jax.make_jaxpr(clip.image_features)(tower, images).jaxpr)
    types = {
        kind: {
            str(x.aval.dtype)
            for equation in found
            if equation.primitive.name == kind
            for x in equation.invars
        }
        for kind in ("exp", "rsqrt", "sqrt", "reduce_max", "dot_general")
    }
    assert types["exp"] == types["rsqrt"] == types["sqrt"] == types["reduce_max"] == {"float32"}
    assert types["dot_general"] == {"bfloat16"}


def test_remat_stores_less_for_the_backward_pass() -> None:
    """Without it, the results of each block's matrix products are stored, too, but for the last,
    which none needs.
    """
    frozen, batch = scaling.inputs()
    images = jnp.asarray(batch["image"])

    def stored(recompute: bool) -> int:
        def features(vision: clip.VisionTower) -> jax.Array:
            return clip.image_features(vision, images, recompute)

        _, pull_back = jax.eval_shape(
            lambda vision: jax.vjp(features, vision), frozen.zero_shot.vision
        )
        return sum(leaf.size for leaf in jax.tree.leaves(pull_back))

    sizes, tokens = scaling.SIZES.vision, 5
    queries_to_out = (
        5 * tokens * sizes.width
    )  # query, key, value, their mixture, and its projection
    per_block = queries_to_out + sizes.heads * tokens**2 + tokens * sizes.mlp_width
    # The last block is the first of the backward pass: it stores what it needs.
    assert stored(False) - stored(True) == len(images) * (sizes.layers - 1) * per_block
