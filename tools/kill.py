"""Kills runs at random moments, resumes them, and compares the bytes of their final weights.

    python -m tools.kill --kills 30

Runs of `train.py` are killed by SIGKILL a few times each, every other time while a checkpoint is
being written, and resumed with `--resume` until they end. They must end with the bytes of an
undisturbed run.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
METHOD = "ema"  # its state has every field
OPTIONS = f"--method {METHOD} --steps 80 --batch-size 16 --eval-every 10 --checkpoint-every 1"


def start(out: Path, *more: str) -> subprocess.Popen:
    """Starts a run that writes its output to OUT.log."""
    command = [sys.executable, "train.py", *OPTIONS.split(), "--out", str(out), *more]
    with open(out.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish(out: Path, *more: str) -> dict[str, bytes]:
    """Lets a run end. Returns its final weights."""
    assert start(out, *more).wait() == 0, out.with_suffix(".log").read_text()
    assert not list(out.rglob("*.new")), "an incomplete file is left"
    best = out / METHOD / "seed-0" / "best"
    return {name: (best / name).read_bytes() for name in ("model.safetensors", "head.safetensors")}


def modified_at(path: Path) -> int:
    """Returns the time of the last change in nanoseconds, or 0 if the file does not exist."""
    return path.stat().st_mtime_ns if path.exists() else 0


def kill_once(out: Path, seconds: float, during_a_write: bool) -> list[str]:
    """Resumes a run and kills it `seconds` after its first file.

    Returns the names of its checkpoint's files then, or none if the run ended before.
    """
    folder = out / METHOD / "seed-0"
    before = modified_at(folder / "config.json")
    process = start(out, "--resume")
    # Until it writes its first file, there is nothing to lose.
    while process.poll() is None and modified_at(folder / "config.json") == before:
        time.sleep(0.01)
    time.sleep(seconds)
    while during_a_write and process.poll() is None and not list(folder.glob("checkpoint/*.new")):
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    if process.wait() == 0:
        return []
    assert process.returncode == -signal.SIGKILL, out.with_suffix(".log").read_text()
    return sorted(path.name for path in folder.glob("checkpoint/*")) or ["no checkpoint yet"]


def main(kills: int = 30, kills_per_run: int = 5, seed: int | None = None) -> int:
    """Print a line per kill and the number of runs that end with the undisturbed run's weights.

    Args:
        kills: Number of kills over all runs.
        kills_per_run: Number of kills after which a run is left to end.
        seed: Seed of the random moments. Without it, a random one, which is printed.
    """
    seed = int.from_bytes(os.urandom(2)) if seed is None else seed
    moments = random.Random(seed)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        expected = finish(Path(temporary) / "unbroken")  # it also fills the caches
        done = 0
        writing = 0
        ends: list[bool] = []
        while done < kills:
            out = Path(temporary) / f"run-{len(ends)}"
            for _ in range(min(kills_per_run, kills - done)):
                names = kill_once(out, moments.uniform(0, 10), during_a_write=done % 2 == 1)
                if not names:
                    break
                done += 1
                writing += any(name.endswith(".new") for name in names)
                print(f"kill {done} in run {len(ends)}: {', '.join(names)}", flush=True)
            same = finish(out, "--resume") == expected
            print(f"run {len(ends)} ended with {'the same' if same else 'OTHER'} weights")
            ends.append(same)
    print(f"{done} kills, {writing} of them during a write")
    print(f"{sum(ends)} of {len(ends)} runs ended with the same bytes")
    return 0 if all(ends) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m tools.kill"))
