"""Opens what a run needs: the model, the data, the prompts; and finished runs with what they were made from.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py` and `python eval.py` use it.
"""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import clip
import data
import lipsum
from support import download, files, layouts, minidomain, weights
from support.errors import InputError, read_json, unknown

# ------------------------------------------------------------------------------------------- what runs are made from


@dataclass(frozen=True)
class Sources:
    """The options, as `train.Options` has them, that decide what is evaluated and how."""

    model: str
    data: str
    data_root: Path | None
    reference: str
    shifts: tuple[str, ...]
    templates: str | None
    keep_underscores: bool
    select_on: str
    unseen: tuple[str, ...]
    split_roots: tuple[str, ...]
    skip_broken: int
    batch_size: int
    workers: int
    precision: str = "float32"
    accumulate: int = 1
    fsdp: bool = False


# These may differ between runs that go together.
HOW_COMPUTED = ("batch_size", "workers", "precision", "accumulate", "fsdp")


@dataclass(frozen=True)
class Setup:
    """What every run of one command shares: the zero-shot model, its heads, the data, the devices.

    `classes` are all that are reported. Training and selection have those of `seen` (indices of `classes`): all of
    them, but for generalised zero-shot.
    """

    sources: Sources
    model: clip.CLIP
    tokenizer: Tokenizer
    data: data.Data
    classes: tuple[str, ...]
    seen: Int[np.ndarray, " seen"]
    zero_shot: lipsum.Classifier
    context_head: Float[Array, "dim templates"]
    tau: Float[Array, ""]
    mesh: Mesh

    def over_seen(self, classifier: lipsum.Classifier) -> lipsum.Classifier:
        """The classifier over the classes of training and selection."""
        if len(self.seen) == len(self.classes):
            return classifier
        return lipsum.Classifier(classifier.vision, classifier.head[:, self.seen])

    def over_all(self, classifier: lipsum.Classifier) -> lipsum.Classifier:
        """The classifier over all classes: where some are unseen, the head is the fixed zero-shot one."""
        if len(self.seen) == len(self.classes):
            return classifier
        return lipsum.Classifier(classifier.vision, self.zero_shot.head)

    @cached_property
    def text(self) -> clip.TextTower:
        """The text tower in the host's memory: what is computed once, one device of each process computes."""
        return data.fetch(self.model.text)


def read_templates(templates: str | None) -> list[str]:
    """OpenAI's prompts, those of a file, the one prompt given, or minidomain's.

    Raises InputError for one without `{}`.
    """
    if templates is None:
        return list(minidomain.TEMPLATES)
    if templates == "openai":
        return download.openai_prompts()[1]
    if "{}" in templates:
        return [templates]
    try:
        lines = Path(templates).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--templates {templates!r} is neither openai, a prompt with {{}} nor a readable file: {error}"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--templates {templates} is empty: write one prompt a line")
    for prompt in prompts:
        if "{}" not in prompt:
            raise InputError(f"--templates {templates}: {prompt!r} has no {{}} for the class: add it")
    return prompts


def check_text_length(length: int, config: clip.Config) -> None:
    """Raises InputError where a random text of --text-length tokens does not fit the model."""
    if length + 2 > config.context_length:
        raise InputError(
            f"--text-length {length} with start and end token is over the model's context of "
            f"{config.context_length} tokens: give at most {config.context_length - 2}"
        )


def seen_classes(classes: tuple[str, ...], unseen: tuple[str, ...]) -> Int[np.ndarray, " seen"]:
    """Indices of the classes that are not `unseen`.

    Raises InputError for an unknown class, or where fewer than two stay.
    """
    known = {name.replace("_", " "): name for name in classes}
    for name in unseen:
        if name.replace("_", " ") not in known:
            raise unknown("class", name, classes)
    held_back = {known[name.replace("_", " ")] for name in unseen}
    seen = np.array([index for index, name in enumerate(classes) if name not in held_back], np.int32)
    if len(seen) < 2:
        raise InputError(
            f"--unseen holds back {len(held_back)} of {len(classes)} classes: leave two or more to train on"
        )
    return seen


def prepare(sources: Sources) -> Setup:
    """Loads and checks the model and the data. Raises InputError before any long work."""
    mesh = data.device_mesh(data.evaluation_batch_size(sources.batch_size, sources.accumulate))
    images = layouts.read(
        sources.data, sources.data_root, sources.reference, sources.shifts, sources.select_on,
        sources.keep_underscores, sources.split_roots,
    )  # fmt: skip
    images = data.with_skipped(images, sources.skip_broken)
    # After the data, whose root may be wrong: these two may download.
    templates = read_templates(sources.templates)
    model, tokenizer = weights.load(sources.model)
    classes = images.train.classes
    seen = seen_classes(classes, sources.unseen)
    if sources.unseen:
        train, selection = (data.of_classes(split, seen) for split in (images.train, images.selection))
        images = data.Data(train, selection, images.reports)
    data.check_images([images.train, images.selection, *images.reports.values()], sources.workers)
    features = clip.prompt_features(model, tokenizer, classes, templates)
    head, context_head, tau = (
        clip.zero_shot_head(features),
        clip.context_head(features[:, seen]),  # training knows no unseen class
        jnp.exp(model.logit_scale),
    )
    model, head, context_head, tau = data.place((model, head, context_head, tau), mesh, sources.fsdp)
    zero_shot = lipsum.Classifier(model.vision, head)
    return Setup(sources, model, tokenizer, images, classes, seen, zero_shot, context_head, tau, mesh)


def save_classifier(folder: Path, setup: Setup, classifier: lipsum.Classifier) -> None:
    """A classifier as a Hugging Face CLIP folder, with the head and the names of its columns. By one process."""
    trained = eqx.tree_at(lambda model: model.vision, setup.model, classifier.vision)
    model, head = data.fetch((trained, classifier.head))
    if not data.writes_files():
        return

    def write(new: Path) -> None:
        weights.save(new, model, setup.tokenizer)
        save_file({"head": np.asarray(head, order="C")}, new / "head.safetensors")
        files.write_json(new / "classes.json", setup.classes)

    files.write_whole(folder, write)


# ----------------------------------------------------------------------------------------------------- finished runs


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what `config.json` and `results.json` say, and its selected classifier."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    classifier: lipsum.Classifier


def needs(folder: Path, names: Sequence[str]) -> None:
    """Raises InputError where the folder lacks one of the files."""
    for name in names:
        if not (folder / name).exists():
            raise InputError(f"{folder} has no {name}: give the folder of a finished run, such as runs/lipsum/seed-0")


def read_classifier(best: Path) -> tuple[lipsum.Classifier, clip.CLIP]:
    """What `save_classifier` saved. Raises InputError where something is missing or damaged."""
    needs(best, ("head.safetensors", "classes.json"))
    model, _ = weights.load(str(best))
    try:
        head = load_file(best / "head.safetensors")["head"]
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"{best / 'head.safetensors'} cannot be read ({error}): restore it or train again") from error
    classes = read_json(best / "classes.json")
    if head.shape != (model.config.embedding_size, len(classes)):
        raise InputError(
            f"{best / 'head.safetensors'} has shape {head.shape}, the model {model.config.embedding_size} features and "
            f"classes.json {len(classes)} names: restore the run's own files"
        )
    return lipsum.Classifier(model.vision, jnp.asarray(head)), model


def read_run(folder: Path) -> Run:
    """Raises InputError where the folder is no finished run with one classifier."""
    needs(folder, ("config.json", "results.json", "best/head.safetensors"))
    classifier, _ = read_classifier(folder / "best")
    return Run(folder, read_json(folder / "config.json"), read_json(folder / "results.json"), classifier)


def open_runs(folders: Sequence[Path], select_on: str | None) -> tuple[list[Run], Setup]:
    """The runs, and the setup that all of them share. Raises InputError where they do not share one."""
    if not folders:
        raise InputError("no run is given: give the folders of finished runs, such as runs/lipsum/seed-0")
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    shared = [field.name for field in dataclasses.fields(Sources) if field.name not in HOW_COMPUTED]
    for run in runs[1:]:
        if run.config["classes"] != first.config["classes"]:
            raise InputError(f"{first.folder} and {run.folder} have different classes: give runs of the same data")
        for name in shared:
            one, other = first.config["settings"][name], run.config["settings"][name]
            if one != other:
                raise InputError(
                    f"{first.folder} has {name} {one!r}, {run.folder} has {other!r}: give runs of the same one"
                )
    settings = first.config["settings"]
    recorded = settings | first.config.get("execution", {}) | {"workers": os.cpu_count() or 1}
    said = {name: recorded[name] for name in (*shared, *HOW_COMPUTED) if name in recorded}
    said |= {"data_root": settings["data_root"] and Path(settings["data_root"])}
    said |= {name: tuple(settings[name]) for name in ("shifts", "unseen", "split_roots")}
    if select_on:
        said["select_on"] = select_on
    setup = prepare(Sources(**said))
    if list(setup.classes) != first.config["classes"]:
        raise InputError(f"the data of {first.folder} have other classes now: restore {settings['data_root']}")
    return runs, setup
