"""Finished runs: what `python train.py` writes at the end of a run, and `python eval.py` reads.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import clip
import lipsum
from support import devices, disk, weights
from support.errors import InputError, flag, read_json
from support.run.options import (
    Execution,
    Places,
    SelectOn,
    Sources,
    absolute,
    as_arguments,
    from_json,
    to_json,
)
from support.run.setup import Images, Setup, open_setups

# The options whose content counts, not the path that it was read from.
CONTENT = {"model": "weights or image preparation", "templates": "prompts"}
CONTENT |= {"class_names": "classes"}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run: its folder, `config.json`, `results.json`, and its selected classifier."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    classifier: lipsum.Classifier

    @property
    def sources(self) -> Sources:
        """The model and data that it was made from."""
        return from_json(Sources, self.config["settings"])


def save_classifier(folder: Path, setup: Setup, classifier: lipsum.Classifier) -> None:
    """Writes a Hugging Face CLIP folder, with the head and the names of its columns.

    Process 0 writes.
    """
    trained = eqx.tree_at(lambda model: model.vision, setup.model.clip, classifier.vision)
    model, head = devices.fetch((trained, classifier.head))
    if not devices.is_main_process():
        return

    def write(new: Path) -> None:
        weights.save(new, model, setup.model.tokenizer)
        save_file({"head": np.asarray(head, order="C")}, new / "head.safetensors")
        disk.write_json(new / "classes.json", setup.classes)

    disk.write_whole(folder, write)


def require_files(folder: Path, names: Sequence[str]) -> None:
    """Raises InputError if the folder lacks one of the files."""
    for name in names:
        if not (folder / name).exists():
            advice = "give the folder of a finished run, such as runs/lipsum/seed-0"
            raise InputError(f"{folder} has no {name}: {advice}")


def read_classifier(best: Path) -> tuple[lipsum.Classifier, clip.CLIP]:
    """Reads what `save_classifier` wrote. Raises InputError if something is missing or damaged."""
    require_files(best, ("head.safetensors", "classes.json"))
    model, _ = weights.load(str(best))
    path = best / "head.safetensors"
    try:
        head = load_file(path)["head"]
    except Exception as error:  # a damaged file may raise anything
        advice = "restore it or train again"
        raise InputError(f"{path} cannot be read ({error}): {advice}") from error
    classes = read_json(best / "classes.json")
    expected = (model.config.embedding_size, len(classes))
    if head.shape != expected:
        problem = f"{path} has shape {head.shape}, the model and classes.json need {expected}"
        raise InputError(f"{problem}: restore the run's own files")
    return lipsum.Classifier(model.vision, jnp.asarray(head)), model


def read_run(folder: Path) -> FinishedRun:
    """Reads a run. Raises InputError if the folder is no finished run with one classifier."""
    require_files(folder, ("config.json", "results.json", "best/head.safetensors"))
    classifier, _ = read_classifier(folder / "best")
    config, results = (read_json(folder / name) for name in ("config.json", "results.json"))
    return FinishedRun(folder, config, results, classifier)


def open_runs(
    folders: Sequence[Path],
    moved: Places,
    select_on: SelectOn | None = None,
    read: Callable[[FinishedRun], Images] | None = None,
) -> tuple[list[FinishedRun], Setup]:
    """Reads runs, and opens the setup that they share, whose data may have moved.

    `read` returns other data, for the first run. Raises InputError if the runs do not share a
    setup, or if its files have changed since.
    """
    if not folders:
        raise InputError("no run is given: give folders of runs, such as runs/lipsum/seed-0")
    opened = [read_run(folder) for folder in folders]
    first = opened[0]
    for run in opened[1:]:
        other = to_json(run.sources)
        for name, value in to_json(first.sources).items():
            contents = [each.config["content"].get(name) for each in (first, run)]
            is_same = contents[0] == contents[1] if name in CONTENT else other[name] == value
            if not is_same:  # the same weights under two paths are one model
                what = CONTENT.get(name, name)
                problem = f"{run.folder} was made with other {what} than {first.folder}"
                values = f"{flag(name)} {as_arguments(other[name])} and {as_arguments(value)}"
                raise InputError(f"{problem} ({values}): give runs of the same one")
    sources = dataclasses.replace(first.sources, select_on=select_on or first.sources.select_on)
    execution = from_json(Execution, first.config["execution"])
    places = {name: value for name, value in vars(absolute(moved)).items() if value}
    execution = dataclasses.replace(execution, workers=Execution.workers, **places)
    batch_size = first.config["settings"]["batch_size"]
    (setup,) = open_setups([sources], execution, batch_size, [read(first)] if read else ())
    for run in opened:
        check_content(run.folder, run.config, setup)
    return opened, setup


def check_content(path: Path, config: dict[str, Any], setup: Setup) -> None:
    """Raises InputError if the files by which a run was made have other content now."""
    for name, kind in CONTENT.items():
        if config["content"][name] != setup.content[name]:
            advice = "restore them, or train again with another --out"
            raise InputError(f"{path} was made with other {kind}: {advice}")


def new_folder(runs: Sequence[FinishedRun], method: str, overwrite: bool) -> Path:
    """Returns the folder OUT/METHOD/NAME beside the first run, with its name.

    If that would be above the root of a mount, or at that of all, OUT is the folder below. Raises
    InputError if the folder is taken.
    """
    first = out = Path(os.path.abspath(runs[0].folder))
    for climbs in (True, first.parent.name == runs[0].results["method"]):
        if climbs and not os.path.ismount(out) and out.parent.name:
            out = out.parent
    folder = out / method / first.name
    check_free(folder, overwrite)
    return folder


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises InputError if there is something that may not be overwritten."""
    if run_files(folder) and not overwrite:
        raise InputError(f"{folder} exists: give --overwrite to replace it")


# results.json comes first: without it, a run is not finished.
_FILES = ["results.json", "config.json", "metrics.jsonl", "checkpoint/step-*.safetensors"]
_FILES += ["tensorboard/events.out.tfevents.*", "profile/plugins/profile/*/*"]
_BEST = ["model.safetensors", "head.safetensors", "classes.json", "config.json", "tokenizer.json"]
_BEST += ["tokenizer_config.json", "preprocessor_config.json"]
_FILES += [f"{best}/{name}" for best in ("best", "best.new", "best/member-*") for name in _BEST]


def run_files(folder: Path) -> list[Path]:
    """Returns the files in a folder that a run wrote, or began to write; others may have theirs."""
    patterns = [pattern + suffix for pattern in _FILES for suffix in ("", ".new")]
    return [path for pattern in patterns for path in folder.glob(pattern) if not path.is_dir()]


def delete_run(folder: Path) -> None:
    """Deletes the files of a run, and folders that are then empty. May raise InputError."""
    with disk.reported(folder):
        for path in run_files(folder):
            path.unlink()
            with contextlib.suppress(OSError):  # ends at a folder that is not empty
                for parent in path.relative_to(folder).parents:
                    (folder / parent).rmdir()
