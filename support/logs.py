"""What a run tells while it trains: the bar's figures, metrics.jsonl, TensorBoard.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py` uses it.
"""

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import lipsum
from support import files
from support.errors import InputError

LOG_EVERY = 10  # steps

# ------------------------------------------------------------------------------------------------------------- figures


class Log:
    """What a run tells while it trains: the bar's figures, lines of metrics.jsonl, and with a board TensorBoard's.

    Figures are read a step late: waiting for the step just dispatched would leave the devices idle.
    """

    def __init__(self, path: Path, bar: tqdm, board: Any, batch_size: int) -> None:
        self.path, self.bar, self.board, self.batch_size = path, bar, board, batch_size
        self._pending: tuple[int, lipsum.Metrics, bool] | None = None
        self.start_clock(bar.n)

    def start_clock(self, step: int) -> None:
        """What comes before, an evaluation say, does not count as time of the steps after `step`."""
        self._timed_step, self._timed_at = step, time.perf_counter()

    def add(self, step: int, metrics: lipsum.Metrics, logged: bool) -> None:
        """A step just dispatched. Raises as `settle` does of the one before."""
        self.settle()
        self._pending = step, metrics, logged

    def settle(self) -> None:
        """Waits for the last step added, and writes its line where it is logged.

        Raises InputError naming the step where loss or gradient are not finite, or where the line cannot be written.
        """
        if self._pending is None:
            return
        (step, metrics, logged), self._pending = self._pending, None
        values = {"loss": 0.0} | {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.bar.update()
        finite = np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"])
        if logged or not finite:
            seconds = (time.perf_counter() - self._timed_at) / max(step - self._timed_step, 1)
            self._write(step, values, seconds)
            self.start_clock(step)
        if not finite:
            raise InputError(
                f"at step {step} the loss is {values['loss']}, the gradient's norm {values['gradient_norm']}: give a "
                f"lower --learning-rate and another --out; {self.path.parent} keeps what was saved before"
            )

    def _write(self, step: int, values: dict[str, float], seconds_per_step: float) -> None:
        speed = {"images_per_second": self.batch_size / seconds_per_step, "seconds_per_step": seconds_per_step}
        values = values | {name: round(value, 4) for name, value in speed.items()}
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['images_per_second']:.0f} images/s")
        with files.reported(self.path):
            with open(self.path, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **values}) + "\n")
            self.show({name: value for name, value in values.items() if name != "step"}, step)

    def show(self, values: dict[str, float], step: int) -> None:
        """On the board, where there is one."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def tensorboard(folder: Path, start: int) -> Any:
    """A writer of TensorBoard's event files; what it wrote before, of steps after `start`, is dropped."""
    from tensorboardX import SummaryWriter  # needs the extra; everything else does without

    return SummaryWriter(str(folder), purge_step=start + 1)


def lines_up_to(path: Path, last_step: int) -> list[str]:
    """The whole lines of a metrics.jsonl, where there is one, that a checkpoint of `last_step` has behind it."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a killed run may leave half a line
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
    return kept


def seconds_per_step(log_path: Path) -> float | None:
    """The median over the logged steps, without those that waited for the compiler; None where there are too few."""
    lines = [json.loads(line) for line in lines_up_to(log_path, sys.maxsize)]
    seconds = [line["seconds_per_step"] for line in lines if line["step"] > LOG_EVERY]
    return statistics.median(seconds) if seconds else None
