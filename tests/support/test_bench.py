"""The benchmarks run and print what they say; how fast they are is no test."""

import dataclasses
import re

import pytest
import scaling

import clip
from support import bench, errors


def test_decode(capsys: pytest.CaptureFixture[str]) -> None:
    bench.decode_command(count=32, rounds=1)
    output = capsys.readouterr().out
    assert re.search(r"1 thread / bare Pillow: \d\.\d\d", output) and re.search(
        r"2 threads / 1 thread: \d\.\d\d", output
    )
    with pytest.raises(errors.InputError, match=r"--count is 33 .*multiple of 32"):
        bench.decode_command(count=33)


def test_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread over eight devices, weights and optimiser take less of each; recomputed blocks take less to compute in."""
    monkeypatch.setitem(
        clip.PRESETS, "small", dataclasses.replace(scaling.SIZES, vision=clip.Transformer(64, 4, 4, 256))
    )

    def needed(**how: bool) -> tuple[float, float]:
        bench.memory_command("small", batch_size=512, precision="float32", **how)
        found = re.search(r"\((\d+\.\d+) of weights, .*, (\d+\.\d+) to compute in\)", capsys.readouterr().out)
        return float(found[1]), float(found[2])

    monkeypatch.setattr(bench, "GIB", 2**10)  # small figures would be rounded to nothing
    copied, changed = needed(), needed(fsdp=True, remat=True)
    assert changed[0] < copied[0] / 2 and changed[1] < copied[1] / 1.5
    with pytest.raises(errors.InputError, match="unknown training method 'lp'"):
        bench.memory_command(method="lp")
