"""Kills runs at random moments, resumes them, and compares their final weights with those of an undisturbed run.

    python tests/kill.py --kills 30

Runs of `train.py` are killed by SIGKILL a few times each, every other time while a checkpoint is being written, and
resumed with `--resume` until they end. They must end with the same bytes.
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
METHOD = "ema"  # its state has every field


def start(out: Path, more: tuple[str, ...]) -> subprocess.Popen:
    command = [
        sys.executable,
        "train.py",
        "--method",
        METHOD,
        "--steps",
        "80",
        "--batch-size",
        "16",
        "--eval-every",
        "10",
        "--checkpoint-every",
        "1",
        "--out",
        str(out),
        *more,
    ]
    log = open(out.with_suffix(".log"), "ab")  # noqa: SIM115 (the process keeps it open)
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def run_folder(out: Path) -> Path:
    return out / METHOD / "seed-0"


def modified_at(path: Path) -> int:
    """Returns the time of the last change in nanoseconds, or 0 if the file does not exist."""
    return path.stat().st_mtime_ns if path.exists() else 0


def final_weights(out: Path) -> dict[str, bytes]:
    best = run_folder(out) / "best"
    return {name: (best / name).read_bytes() for name in ("model.safetensors", "head.safetensors")}


def main(kills: int = 30, kills_per_run: int = 5, seed: int | None = None) -> None:
    """Print one line per kill, and at the end the number of runs with the same weights as the undisturbed run.

    Args:
        kills: Number of kills over all runs.
        kills_per_run: Number of kills after which a run is left to end.
        seed: Seed of the random moments. Without it, a random one, which is printed.
    """
    seed = int.from_bytes(os.urandom(2)) if seed is None else seed
    moments = random.Random(seed)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        unbroken = Path(temporary) / "unbroken"
        assert start(unbroken, ()).wait() == 0, unbroken.with_suffix(
            ".log"
        ).read_text()  # it also fills the caches
        expected = final_weights(unbroken)
        done = runs = writing = same = 0
        while done < kills:
            out = Path(temporary) / f"run-{runs}"
            folder = run_folder(out)
            for _ in range(min(kills_per_run, kills - done)):
                before = modified_at(folder / "config.json")
                process = start(out, ("--resume",))
                # Wait until it writes its first file: there is nothing to lose before.
                while process.poll() is None and modified_at(folder / "config.json") == before:
                    time.sleep(0.01)
                time.sleep(moments.uniform(0, 10))
                while (
                    done % 2
                    and process.poll() is None
                    and not list(folder.glob("checkpoint/*.new"))
                ):
                    time.sleep(
                        0.0005
                    )  # every other kill happens while a checkpoint is being written
                process.send_signal(signal.SIGKILL)
                if process.wait() == 0:
                    break  # it ended before the signal
                assert process.returncode == -signal.SIGKILL, out.with_suffix(".log").read_text()
                names = sorted(path.name for path in folder.glob("checkpoint/*"))
                done += 1
                writing += any(name.endswith(".new") for name in names)
                print(
                    f"kill {done} in run {runs}: {', '.join(names) or 'no checkpoint yet'}",
                    flush=True,
                )
            assert start(out, ("--resume",)).wait() == 0, out.with_suffix(".log").read_text()
            assert not list(folder.rglob("*.new")), "an incomplete file is left"
            is_same = final_weights(out) == expected
            print(f"run {runs} ended with {'the same' if is_same else 'OTHER'} weights", flush=True)
            runs += 1
            same += is_same
    print(
        f"{done} kills, {writing} of them during a write; {same} of {runs} runs ended with the same bytes"
    )
    sys.exit(same != runs)


if __name__ == "__main__":
    tyro.cli(main)
