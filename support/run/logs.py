"""Progress of a training loop: its bar, metrics.jsonl, TensorBoard, a profile.

`python train.py --tensorboard --profile` uses it all.
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
from jaxtyping import Array
from tqdm import tqdm

from support import disk
from support.errors import InputError

LOG_EVERY = 10  # steps
TELL_EVERY = 30.0  # seconds, where no bar is shown
PROFILED = range(11, 21)  # steps from the start: the first ones wait for the compiler


class Log:
    """Shows each step of a loop and writes some to `folder`.

    Metrics are read one step late: waiting for the step just dispatched would leave the devices
    idle. Raises InputError if loss or gradient are not finite.
    """

    def __init__(
        self,
        label: str,
        first: int,
        last: int,
        batch_size: int,
        folder: Path | None = None,
        shown: bool = True,
        tensorboard: bool = False,
        profile: bool = False,
    ) -> None:
        self.first = first
        self.batch_size = batch_size
        self.folder = folder
        self.profile = folder / "profile" if folder and profile else None
        self.board = open_board(folder / "tensorboard", first) if tensorboard and folder else None
        # disable=None: a bar on a terminal alone. Elsewhere a line is printed now and then.
        hidden = None if shown else True
        self.bar = tqdm(total=last, initial=first, desc=label, unit="step", disable=hidden)
        self.label = label if shown and self.bar.disable else ""
        self._told_at = time.perf_counter() - TELL_EVERY
        self._pending: tuple[int, dict[str, Array]] | None = None
        self._began = time.perf_counter()
        if folder:
            kept = "".join(lines_up_to(folder / "metrics.jsonl", first))
            path = folder / "metrics.jsonl"
            disk.write_whole(path, lambda new: new.write_text(kept, encoding="utf-8"))
        self.start_clock(first)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        if self.board:
            self.board.close()

    def seconds(self) -> float:
        """Returns the time since the loop began."""
        return time.perf_counter() - self._began

    def start_clock(self, step: int) -> None:
        """Excludes what came before, such as an evaluation, from the time of later steps."""
        self._timed_step = step
        self._timed_at = time.perf_counter()

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Adds the metrics of a step just dispatched, and settles the step before."""
        self.settle()
        self._pending = step, metrics
        if self.profile and step - self.first == PROFILED[0] - 1:
            self.settle()
            jax.profiler.start_trace(self.profile, create_perfetto_trace=True)
        if self.profile and step - self.first == PROFILED[-1]:
            self.settle()
            jax.profiler.stop_trace()

    def settle(self, written: bool = False) -> None:
        """Waits for the last added step, and writes its metrics at every tenth or if `written`.

        Raises InputError naming the step if loss or gradient are not finite, or if the line cannot
        be written.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        fetched = {name: float(value) for name, value in jax.device_get(metrics).items()}
        values = {"loss": 0.0} | fetched  # loss first
        loss, norm = values["loss"], values["gradient_norm"]
        is_finite = np.isfinite(loss) and np.isfinite(norm)
        self.bar.update()
        if written or step == 1 or step % LOG_EVERY == 0 or not is_finite:
            seconds = (time.perf_counter() - self._timed_at) / max(step - self._timed_step, 1)
            speed = self.batch_size / seconds
            values |= {"images_per_second": round(speed, 4), "seconds_per_step": round(seconds, 4)}
            self._tell(step, f"loss {loss:.3f}, {speed:.0f} images/s")
            self._write(step, values)
            self.start_clock(step)
        if not is_finite:
            kept = f"; {self.folder} keeps what was saved before" if self.folder else ""
            raise InputError(
                f"at step {step} the loss is {loss}, the gradient's norm {norm}: give a lower "
                f"--learning-rate and another --out{kept}"
            )

    def _tell(self, step: int, state: str) -> None:
        self.bar.set_postfix_str(state)
        is_due = step == self.bar.total or time.perf_counter() - self._told_at >= TELL_EVERY
        if self.label and is_due:
            print(f"{self.label}: step {step} of {self.bar.total}, {state}", file=sys.stderr)
            self._told_at = time.perf_counter()

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.folder:
            path = self.folder / "metrics.jsonl"
            with disk.reported(path), open(path, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **values}) + "\n")
            self.show(step, values)

    def show(self, step: int, values: dict[str, float]) -> None:
        """Writes values for TensorBoard, if it is wanted."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def open_board(folder: Path, first: int) -> Any:
    """Opens a writer of TensorBoard's event files. It drops events of steps after `first`."""
    from tensorboardX import SummaryWriter  # needs the extra; everything else does without

    return SummaryWriter(str(folder), purge_step=first + 1)


def lines_up_to(path: Path, last: int) -> list[str]:
    """Returns the whole lines of a metrics.jsonl, if there is one, of steps up to `last`."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # a killed run may leave half a line
            if json.loads(line)["step"] <= last:
                kept.append(line + "\n")
    return kept


def seconds_per_step(path: Path) -> float | None:
    """Returns the median over the lines of a metrics.jsonl.

    It ignores the first ten steps, which waited for the compiler.
    """
    lines = [json.loads(line) for line in lines_up_to(path, sys.maxsize)]
    seconds = [line["seconds_per_step"] for line in lines if line["step"] > LOG_EVERY]
    return statistics.median(seconds) if seconds else None
