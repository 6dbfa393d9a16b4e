"""Kills runs at random moments, continues them, and compares what they end with: `python tests/kill.py --kills 30`.

An unbroken run of `train.py` tells the right bytes. Then runs of the same options are killed by SIGKILL, each at a few
random moments, also while a checkpoint is being written, and continued by `--resume` until they end.
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

ROOT = Path(__file__).resolve().parents[1]
METHOD = "ema"  # has all that a state can hold


def start(out: Path, more: tuple[str, ...]) -> subprocess.Popen:
    command = [
        sys.executable, "train.py", "--method", METHOD, "--steps", "80", "--batch-size", "16", "--eval-every", "10",
        "--checkpoint-every", "1", "--out", str(out), *more,
    ]  # fmt: skip
    log = open(out.with_suffix(".log"), "ab")  # noqa: SIM115 (the process has it)
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def folder_of(out: Path) -> Path:
    return out / METHOD / "seed-0"


def written(path: Path) -> int:
    """When, or 0 where it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def weights_of(out: Path) -> dict[str, bytes]:
    best = folder_of(out) / "best"
    return {name: (best / name).read_bytes() for name in ("model.safetensors", "head.safetensors")}


def main(kills: int = 30, kills_per_run: int = 5, seed: int | None = None) -> None:
    """Prints a line for each kill, and at the end how many runs had the very weights of the unbroken one.

    Args:
        kills: How many, over all runs.
        kills_per_run: After these, a run ends undisturbed.
        seed: Of the moments; drawn anew, and printed, where none is given.
    """
    seed = int.from_bytes(os.urandom(2)) if seed is None else seed
    moments = random.Random(seed)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        unbroken = Path(temporary) / "unbroken"
        assert start(unbroken, ()).wait() == 0, unbroken.with_suffix(".log").read_text()  # the caches are filled
        expected = weights_of(unbroken)
        done, runs, writing, same = 0, 0, 0, 0
        while done < kills:
            out = Path(temporary) / f"run-{runs}"
            for _ in range(min(kills_per_run, kills - done)):
                before = written(folder_of(out) / "config.json")
                process = start(out, ("--resume",))
                # From the first thing that it writes on: while it loads, there is nothing to lose.
                while process.poll() is None and written(folder_of(out) / "config.json") == before:
                    time.sleep(0.01)
                time.sleep(moments.uniform(0, 10))
                while done % 2 and process.poll() is None and not list(folder_of(out).glob("checkpoint/*.new")):
                    time.sleep(0.0005)  # every other kill hits a checkpoint that is being written
                process.send_signal(signal.SIGKILL)
                if process.wait() == 0:
                    break  # it had ended already: nothing is left to kill
                assert process.returncode == -signal.SIGKILL, out.with_suffix(".log").read_text()
                names = sorted(path.name for path in folder_of(out).glob("checkpoint/*"))
                half = any(name.endswith(".new") for name in names)
                done, writing = done + 1, writing + half
                print(f"kill {done} in run {runs}: {', '.join(names) or 'no checkpoint yet'}", flush=True)
            assert start(out, ("--resume",)).wait() == 0, out.with_suffix(".log").read_text()
            assert not list(folder_of(out).rglob("*.new")), "half a file stayed"
            is_same = weights_of(out) == expected
            print(f"run {runs} ended with {'the same' if is_same else 'OTHER'} weights", flush=True)
            runs, same = runs + 1, same + is_same
    print(f"{done} kills, {writing} of them in the middle of a write; {same} of {runs} runs ended with the same bytes")
    sys.exit(same != runs)


if __name__ == "__main__":
    tyro.cli(main)
