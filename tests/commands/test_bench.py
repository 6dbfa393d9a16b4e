"""Benchmarks: they run, count and print. The tests do not check how fast anything is."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
import scaling

import clip
import lipsum
from support import devices, errors
from tools import bench
from tools.bench import Case

SMALL = dataclasses.replace(scaling.SIZES, vision=clip.Transformer(256, 4, 4, 1024))


def test_flops_of_matrix_products() -> None:
    """2 m k n per product, once per iteration of a scan, and in the backward pass."""

    def layers(x: jax.Array, weights: jax.Array) -> jax.Array:
        last, _ = jax.lax.scan(lambda x, weight: (jax.jit(jnp.matmul)(x, weight), None), x, weights)
        return jnp.sum(last)

    x = jnp.ones((5, 8))
    weights = jnp.ones((3, 8, 8))
    assert bench.matmul_flops(jax.make_jaxpr(layers)(x, weights).jaxpr) == 3 * 2 * 5 * 8 * 8
    # The gradient with respect to weights and inputs is one product each.
    both = jax.make_jaxpr(jax.grad(layers, argnums=(0, 1)))(x, weights)
    assert bench.matmul_flops(both.jaxpr) == 3 * (3 * 2 * 5 * 8 * 8)


def test_reading_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    torch = all(importlib.util.find_spec(name) for name in ("torch", "torchvision"))
    bench.decode_command(
        workers=1, batch_size=4, batches=2, rounds=1, vs="torch" if torch else None
    )
    assert re.search(r"this project +[\d.]+ images/s", capsys.readouterr().out)


def test_step_is_timed() -> None:
    """The embedded model's step, beside PyTorch's if that is installed: equal first losses."""
    torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    found = bench.time_step(Case("tiny", "ft", 4), steps=2, vs_torch=torch)
    ours = found["this project"]
    assert ours["images/s"] == pytest.approx(4 / ours["s/step"])
    assert 0 < ours["share of matmul peak"] < 1
    assert 0.1 < ours["peak GiB"] < 10
    assert ours["first step, s"] > ours["s/step"]
    if torch:
        theirs = found["PyTorch"]
        assert theirs["first loss"] == pytest.approx(ours["first loss"], rel=1e-4)
        assert found["ratio"]["s/step"] == pytest.approx(ours["s/step"] / theirs["s/step"])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(method="lp"), "unknown training method 'lp'"),
        (Case(model="ViT-B16"), "unknown model preset 'ViT-B16': did you mean ViT-B/16"),
    ],
)
def test_bad_cases(case: Case, message: str) -> None:
    for command in (bench.step_command, bench.compile_command):
        with pytest.raises(errors.InputError, match=message):
            command(case)


def test_a_topology_needs_libtpu_and_a_known_name() -> None:
    message = r"--topology v5e:no is not known here .*pip install 'jax\[tpu\]=="
    with pytest.raises(errors.InputError, match=message):
        bench.compile_command(Case("tiny", batch_size=8), "v5e:no")


def test_bytes_of_collectives() -> None:
    """One of several parts counts once; the result of a fused all-reduce is what a device keeps.

    Two fused ones count twice, though the compiler gives them one channel.
    """
    program = """
%all-reduce-scatter.1 (input: f32[8,3]) -> (f32[1,3], bf16[2]) {
  %all-reduce.1 = (f32[8,3]{1,0:T(8,128)}, bf16[16]{0}) all-reduce(%a, %b), channel_id=1
}
%all-reduce-scatter.2 (input: f32[8,3]) -> f32[1,3] {
  %all-reduce.3 = f32[8,3]{1,0:T(8,128)} all-reduce(%a), channel_id=1
}
%fused_computation.2 (param: bf16[1,2]) -> bf16[1,16] {
  %all-gather.1 = bf16[1,16]{1,0:T(2,128)(2,1)S(1)} all-gather(%param), channel_id=1, dimensions={1}
}
%async_collective_fusion.3 (param: bf16[1,2]) -> bf16[1,16] {
  %all-gather.2 = bf16[1,16]{1,0:T(2,128)(2,1)S(1)} all-gather(%param), channel_id=1, dimensions={1}
}
ENTRY %main (x: f32[4]) -> f32[] {
  %all-reduce.2 = (f32[]{:T(128)}, pred[5], /*index=2*/s32[2,3]) all-reduce(%x), channel_id=2
  %permute-start = (f32[4]{0}, f32[4]{0}, u32[]) collective-permute-start(%x), channel_id=3
  %permute-done = f32[4]{0} collective-permute-done(%permute-start), metadata={op_name="all-gather"}
}
"""
    assert bench.collectives(program) == {
        "all-reduce-scatter": [1 * 3 * 4 + 2 * 2, 1 * 3 * 4],
        "all-gather": [16 * 2],
        "all-reduce": [4 + 5 + 2 * 3 * 4],
        "collective-permute": [4 * 4],
    }


@pytest.mark.tpu_compile
# Two methods may share a program, which JAX cannot load for absent devices and compiles again.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("method", [name for name, each in lipsum.METHODS.items() if each.trained])
def test_every_method_compiles_for_eight_tpu_cores(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("libtpu")
    monkeypatch.setitem(clip.PRESETS, "small", SMALL)
    case = Case("small", method, 64, "bfloat16")
    bench.compile_command(case, "v5e:2x4")
    output = capsys.readouterr().out
    assert "fits: 0.0" in output and "all-reduce" in output


@pytest.mark.tpu_compile
@pytest.mark.parametrize("topology", ["v3:2x2", "v5e:2x4"])
def test_fsdp_moves_weights_and_gradients_alone(
    topology: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No image's activations go to another core.

    Three loops gather the six matrices of a layer: the frozen vision tower's, and the trained one's
    forward and backward. The last block of each tower is outside its loop, and is gathered once:
    the backward pass follows at once. That is 3 x 6 + 2 x 6.
    """
    pytest.importorskip("libtpu")
    monkeypatch.setitem(clip.PRESETS, "small", SMALL)
    monkeypatch.setattr(devices, "SMALLEST_SPLIT", 2**16)  # matrices of blocks alone
    bench.compile_command(Case("small", "lipsum", 64, "bfloat16", fsdp=True), topology)
    output = capsys.readouterr().out
    assert " 30 all-gather" in output and "all-reduce" in output
    assert "all-to-all" not in output and "collective-permute" not in output
