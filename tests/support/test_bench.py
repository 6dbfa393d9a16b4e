"""Benchmarks: they run and print their results. The tests do not check how fast anything is."""

import dataclasses
import re

import pytest
import scaling

import clip
from support import bench, errors


def test_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With --fsdp each of eight devices holds less, and with --remat computing takes less memory."""
    small = dataclasses.replace(scaling.SIZES, vision=clip.Transformer(64, 4, 4, 256))
    monkeypatch.setitem(clip.PRESETS, "small", small)
    monkeypatch.setattr(bench, "GIB", 2**10)  # in GiB, the memory of a small model would print as 0.00

    def needed(**options: bool) -> tuple[float, float]:
        bench.memory_command("small", batch_size=512, precision="float32", **options)
        found = re.search(r"\((\d+\.\d+) of weights, .*, (\d+\.\d+) to compute in\)", capsys.readouterr().out)
        return float(found[1]), float(found[2])

    held, computing = needed()
    held_with_fsdp, computing_with_remat = needed(fsdp=True, remat=True)
    assert held_with_fsdp < held / 2 and computing_with_remat < computing / 1.5
    with pytest.raises(errors.InputError, match="unknown training method 'lp'"):
        bench.memory_command(method="lp")
