"""Opens the model, the data and the prompts of a run, and finished runs.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py` and `python eval.py` use it.
"""

import dataclasses
import functools
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import clip
import data
import lipsum
from support import devices, disk, layouts, weights
from support.errors import InputError, read_json, read_lines, unknown
from support.layouts import minidomain
from support.report import tables
from support.run.options import (
    Execution,
    Places,
    Run,
    SelectOn,
    Sources,
    absolute,
    check_read,
    flat,
    restored,
)


@dataclass(frozen=True, eq=False)
class Setup:
    """What all runs on one reference share: the zero-shot model, its heads, the data, the devices.

    Training and selection have the classes `seen`, indices into `classes`: all, except in generalised zero-shot.
    """

    sources: Sources
    execution: Execution
    batch_size: int  # the largest that is trained with
    model: clip.CLIP
    checksum: int  # of the weights and prompts: files may change under their names
    tokenizer: Tokenizer
    templates: tuple[str, ...]
    data: data.Data
    classes: tuple[str, ...]
    seen: Int[np.ndarray, " seen"]
    zero_shot: lipsum.Classifier
    context_head: Float[Array, "dim templates"]
    tau: Float[Array, ""]
    mesh: Mesh

    @property
    def read(self) -> dict[str, Any]:
        """What config.json keeps of the content of the files."""
        return {"classes": list(self.classes), "checksum": self.checksum}

    def over_seen(self, classifier: lipsum.Classifier) -> lipsum.Classifier:
        """The classifier over the classes of training and selection."""
        if len(self.seen) == len(self.classes):
            return classifier
        return lipsum.Classifier(classifier.vision, classifier.head[:, self.seen])

    def over_all(self, classifier: lipsum.Classifier) -> lipsum.Classifier:
        """The classifier over all classes: if some are unseen, its head is the fixed zero-shot one."""
        if len(self.seen) == len(self.classes):
            return classifier
        return lipsum.Classifier(classifier.vision, self.zero_shot.head)

    @cached_property
    def text(self) -> clip.TextTower:
        """The text tower in host memory, for what one device of each process computes once."""
        return devices.fetch(self.model.text)


def prepare(sources: Sources, execution: Execution, batch_size: int) -> Setup:
    """Loads and checks the model and the data. Raises InputError before any long work."""
    mesh = devices.device_mesh(devices.evaluation_batch_size(batch_size, execution.accumulate))
    images = layouts.read(
        sources.data,
        execution.data_root,
        sources.reference,
        sources.shifts,
        sources.select_on,
        execution.split_roots,
        sources.class_names,
        sources.keep_underscores,
    )
    templates = read_templates(sources.templates)
    # This may download, so it comes after the data, whose root may be wrong.
    model, tokenizer = weights.load(str(sources.model))
    classes = images.train.classes
    seen = seen_classes(classes, sources.unseen)
    if sources.unseen:
        train, selection = (
            data.of_classes(split, seen) for split in (images.train, images.selection)
        )
        images = data.Data(train, selection, images.reports)
    data.check_images([images.train, images.selection, *images.reports.values()], execution.workers)
    checksum = zlib.crc32(repr(templates).encode())
    for leaf in jax.tree.leaves(model):
        checksum = zlib.crc32(np.asarray(leaf).data, checksum)
    features = clip.prompt_features(model, tokenizer, classes, templates)
    head = clip.zero_shot_head(features)
    context_head = clip.context_head(features[:, seen])  # training knows no unseen class
    tau = jnp.exp(model.logit_scale)
    model, head, context_head, tau = devices.place(
        (model, head, context_head, tau), mesh, execution.fsdp
    )
    zero_shot = lipsum.Classifier(model.vision, head)
    return Setup(
        sources, execution, batch_size, model, checksum, tokenizer, tuple(templates), images, classes, seen, zero_shot,
        context_head, tau, mesh,
    )  # fmt: skip


# OpenAI's prompts for ImageNet, from notebooks/Prompt_Engineering_for_ImageNet.ipynb of openai/CLIP (MIT licence).
OPENAI_PROMPTS = Path(__file__).parents[2] / "assets" / "openai-prompts.txt"


def read_templates(templates: str | Path | None) -> list[str]:
    """OpenAI's prompts, those of a file, the given prompt, or minidomain's. Raises InputError for one without `{}`."""
    if templates is None:
        return list(minidomain.TEMPLATES)
    if templates == "openai":
        return read_lines(OPENAI_PROMPTS)
    if "{}" in str(templates):
        return [str(templates)]
    name = f"--templates {templates!r} is neither openai nor a prompt with {{}}, and as a file it"
    prompts = [
        line
        for line in map(str.strip, read_lines(Path(templates), name, "give one of the three"))
        if line
    ]
    if not prompts:
        raise InputError(f"--templates {templates} is empty: write one prompt per line")
    for prompt in prompts:
        if prompt[0] in "'\"[" and prompt.rstrip(",")[-1] in "'\"]":
            raise InputError(
                f"--templates {templates}: {prompt} is Python source: write the prompt alone, without quotes"
            )
        if "{}" not in prompt:
            raise InputError(
                f"--templates {templates}: {prompt!r} has no {{}} for the class: add it"
            )
    return prompts


@functools.cache
def read_guidance(path: Path, setup: Setup) -> Int[np.ndarray, "pool tokens"]:
    """The texts of a file, one per line, tokenized and cut to the longest.

    Raises InputError naming a line that is empty or too long.
    """
    rows = []
    for number, line in enumerate(
        read_lines(path, f"--guidance {path}", "give one text per line"), start=1
    ):
        if not clip.clean_text(line):
            raise InputError(
                f"--guidance {path} line {number} is empty: write a text or delete the line"
            )
        try:
            rows.append(clip.tokenize(setup.tokenizer, [line], setup.model.config))
        except InputError as error:
            raise InputError(f"--guidance {path} line {number}: {error}") from error
    return clip.without_padding(np.concatenate(rows), setup.model.config)


@functools.cache
def second_moment(
    setup: Setup, length: int, guidance: Path | None = None
) -> Float[np.ndarray, "dim dim"]:
    """C2 over 10,000 random texts of `length` tokens, or over the texts of a file."""
    ids = None if guidance is None else read_guidance(guidance, setup)
    return devices.fetch(lipsum.text_second_moment(setup.text, ids, length))


def check_texts(run: Run, setup: Setup) -> None:
    """Raises InputError if the prompts, the guidance file or the model lack the texts that the run's method needs."""
    method = lipsum.METHODS[run.method]
    guidance = run.settings.guidance
    if method.texts == "templates" and method.tempered and prompts_per_class(setup) == 1:
        problem = f"{run.method} compares prompts with each other, --templates has one"
        raise InputError(
            f"{problem}: give --templates openai or a file of several, or leave {run.method} out"
        )
    if method.texts not in ("drawn", "averaged"):
        return
    if guidance is None:
        check_text_length(run.settings.text_length, setup.model.config)
        return
    texts = read_guidance(guidance, setup)
    if method.texts == "drawn" and len(texts) < run.settings.num_texts:
        wanted = f"give at least --num-texts {run.settings.num_texts} or lower it"
        raise InputError(f"--guidance {guidance} has {len(texts)} texts: {wanted}")
    if len(texts) > 1 and len(np.unique(texts, axis=0)) == 1:
        raise InputError(
            f"--guidance {guidance} has one text {len(texts)} times: give different ones"
        )


def repeated(texts: Sequence[str]) -> list[str]:
    """The texts that the tokenizer cannot tell from an earlier one."""
    cleaned = [clip.clean_text(text) for text in texts]
    return [text for index, text in enumerate(texts) if cleaned.index(cleaned[index]) < index]


def prompts_per_class(setup: Setup) -> int:
    """How many different prompts each class has."""
    return len(setup.templates) - len(repeated(setup.templates))


def doubts(setup: Setup, runs: Sequence[Run]) -> Iterator[str]:
    """A line for all in the data and the prompts that makes a result mean less than it seems to."""
    if classes := repeated(setup.classes):
        yield f"classes with the prompts of an earlier class are never predicted zero-shot: {', '.join(classes)}"
    if ids := [name for name in setup.classes if re.fullmatch(r"n\d{8}|\d+", name)]:
        yield f"class names such as {ids[0]!r} mean nothing to a text tower: give --class-names FILE"
    if templates := repeated(setup.templates):
        yield f"--templates {setup.sources.templates} repeats prompts, which count as often: {', '.join(templates)}"
    if (
        any(lipsum.METHODS[run.method].texts == "templates" for run in runs)
        and prompts_per_class(setup) == 1
    ):
        yield "mse-fixed with one prompt holds one direction of the features: give --templates openai or several"
    unseen = np.setdiff1d(np.arange(len(setup.classes)), setup.seen)
    for name, split in setup.data.reports.items():
        if missing := len(np.setdiff1d(unseen, split.labels)):
            lack = "all" if missing == len(unseen) else f"{missing} of the"
            yield f"{name} lacks {lack} {len(unseen)} unseen classes: its unseen accuracy is over those that it has"


def check_text_length(length: int, config: clip.Config) -> None:
    """Raises InputError if a random text of --text-length tokens does not fit the model."""
    if length + 2 > config.context_length:
        raise InputError(
            f"--text-length {length} with start and end token is over the model's context of "
            f"{config.context_length} tokens: give at most {config.context_length - 2}"
        )


def seen_classes(classes: tuple[str, ...], unseen: tuple[str, ...]) -> Int[np.ndarray, " seen"]:
    """Indices of the classes that are not `unseen`. Raises InputError for an unknown one, or if fewer than two stay."""
    known = {name.replace("_", " "): name for name in classes}
    for name in unseen:
        if name.replace("_", " ") not in known:
            raise unknown("class", name, classes)
    held_back = {known[name.replace("_", " ")] for name in unseen}
    seen = np.array(
        [index for index, name in enumerate(classes) if name not in held_back], np.int32
    )
    if len(classes) < 2:
        raise InputError(
            f"the data have one class, {classes[0]}: give two or more, perhaps the folder above is meant"
        )
    if len(seen) < 2:
        raise InputError(
            f"--unseen holds back {len(held_back)} of {len(classes)} classes: leave two or more to train on"
        )
    return seen


# ----------------------------------------------------------------------------------------------------- finished runs


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
        return restored(Sources, self.config["settings"])


def save_classifier(folder: Path, setup: Setup, classifier: lipsum.Classifier) -> None:
    """Writes a Hugging Face CLIP folder, with the head and the names of its columns. Process 0 writes."""
    trained = eqx.tree_at(lambda model: model.vision, setup.model, classifier.vision)
    model, head = devices.fetch((trained, classifier.head))
    if not devices.is_main_process():
        return

    def write(new: Path) -> None:
        weights.save(new, model, setup.tokenizer)
        save_file({"head": np.asarray(head, order="C")}, new / "head.safetensors")
        disk.write_json(new / "classes.json", setup.classes)

    disk.write_whole(folder, write)


def needs(folder: Path, names: Sequence[str]) -> None:
    """Raises InputError if the folder lacks one of the files."""
    for name in names:
        if not (folder / name).exists():
            raise InputError(
                f"{folder} has no {name}: give the folder of a finished run, such as runs/lipsum/seed-0"
            )


def read_classifier(best: Path) -> tuple[lipsum.Classifier, clip.CLIP]:
    """Reads what `save_classifier` wrote. Raises InputError if something is missing or damaged."""
    needs(best, ("head.safetensors", "classes.json"))
    model, _ = weights.load(str(best))
    try:
        head = load_file(best / "head.safetensors")["head"]
    except Exception as error:  # a damaged file may raise anything
        raise InputError(
            f"{best / 'head.safetensors'} cannot be read ({error}): restore it or train again"
        ) from error
    classes = read_json(best / "classes.json")
    if head.shape != (model.config.embedding_size, len(classes)):
        raise InputError(
            f"{best / 'head.safetensors'} has shape {head.shape}, the model {model.config.embedding_size} features and "
            f"classes.json {len(classes)} names: restore the run's own files"
        )
    return lipsum.Classifier(model.vision, jnp.asarray(head)), model


def read_run(folder: Path) -> FinishedRun:
    """Reads a run. Raises InputError if the folder is no finished run with one classifier."""
    needs(folder, ("config.json", "results.json", "best/head.safetensors"))
    classifier, _ = read_classifier(folder / "best")
    results = tables.with_names(read_json(folder / "results.json"))
    return FinishedRun(folder, read_json(folder / "config.json"), results, classifier)


@dataclass(frozen=True)
class Runs:
    """The runs of a command, and where their data lie if they moved."""

    folders: tables.Paths = ()
    """Folders of finished runs, such as runs/lipsum/seed-0; for figures, also folders that hold some."""
    moved: Places = dataclasses.field(default_factory=Places)


def open_runs(given: Runs, select_on: SelectOn | None = None) -> tuple[list[FinishedRun], Setup]:
    """Reads runs, and opens the setup that they share. Raises InputError if they do not share one."""
    if not given.folders:
        raise InputError(
            "no run is given: give the folders of finished runs, such as runs/lipsum/seed-0"
        )
    runs = [read_run(folder) for folder in given.folders]
    first = runs[0]
    for run in runs[1:]:
        if run.config["classes"] != first.config["classes"]:
            raise InputError(
                f"{first.folder} and {run.folder} have different classes: give runs of the same data"
            )
        for name, value in flat(first.sources).items():
            if (other := flat(run.sources)[name]) != value:
                raise InputError(
                    f"{first.folder} has {name} {value!r}, {run.folder} has {other!r}: give runs of the same one"
                )
    sources = dataclasses.replace(first.sources, select_on=select_on or first.sources.select_on)
    settings = first.config["settings"]
    # Earlier runs have --precision and --data-root among their settings.
    execution = restored(Execution, settings | first.config.get("execution", {}))
    moved = {name: value for name, value in vars(absolute(given.moved)).items() if value}
    execution = dataclasses.replace(execution, workers=Execution.workers, **moved)
    setup = prepare(sources, execution, settings["batch_size"])
    for run in runs:
        check_read(run.folder, run.config, setup.read)
    return runs, setup


def new_folder(runs: Sequence[FinishedRun], method: str, overwrite: bool) -> Path:
    """The folder OUT/METHOD/seed-SEED beside the runs, with the first run's seed. Raises InputError if it is taken."""
    first = runs[0].folder.resolve()
    folder = first.parents[2] / method / first.name
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists: give --overwrite to replace it")
    return folder
