"""What a training loop tells where no bar can be shown."""

import jax.numpy as jnp
import pytest

from support.run import logs


@pytest.mark.parametrize(("every", "steps"), [(1e9, [1, 35]), (0.0, [1, 10, 20, 30, 35])])
def test_a_log_file_gets_lines_now_and_then(
    every: float,
    steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first step, the last, and one every so many seconds, without carriage returns."""
    monkeypatch.setattr(logs, "TELL_EVERY", every)
    with logs.Log("lipsum seed-0", 0, 35, 8) as log:
        for step in range(1, 36):
            log.add(step, {"loss": jnp.float32(0.5), "gradient_norm": jnp.float32(1)})
        log.settle(written=True)
    told = capsys.readouterr().err
    assert "\r" not in told
    assert [line.split(",")[0] for line in told.splitlines()] == [
        f"lipsum seed-0: step {step} of 35" for step in steps
    ]


def test_a_loop_that_is_not_shown_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.Log("lipsum seed-0", 0, 1, 8, shown=False) as log:
        log.add(1, {"loss": jnp.float32(0.5), "gradient_norm": jnp.float32(1)})
        log.settle()
    assert capsys.readouterr() == ("", "")
