"""The benchmarks run and print what they say; how fast they are is no test."""

import os
import re

import pytest

import bench
import clip


def test_decode(capsys: pytest.CaptureFixture[str]) -> None:
    bench.decode_command(count=32, rounds=1)
    output = capsys.readouterr().out
    assert re.search(r"1 thread / bare Pillow: \d\.\d\d", output) and re.search(
        r"2 threads / 1 thread: \d\.\d\d", output
    )
    with pytest.raises(clip.InputError, match=r"--count is 33 .*multiple of 32"):
        bench.decode_command(count=33)


def test_index(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPSUM_CACHE", os.environ.get("LIPSUM_CACHE", ""))  # restored afterwards
    monkeypatch.setattr(bench.layouts, "CACHED_FROM", 20)
    bench.index_command(images=40, classes=3)
    output = capsys.readouterr().out
    assert "40 images listed: " in output and "40 images from the cache: " in output
