"""The options of `python train.py` in groups, their defaults, and the runs that a command makes.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --help` shows them.

The group of an option decides what it may change: a run's `Sources` (what is read) and
`lipsum.Settings` (how to train) determine its numbers, so `--resume` refuses to change them. Its
`Execution` (how it is computed) may change.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import shlex
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

import clip
import lipsum
from support.errors import InputError, expanded, flag, read_lines, unknown


def help_for(metavar: str, default: str) -> Any:
    """Specifies how --help shows an option."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def usable_cpus(most: int = 16) -> int:
    """Returns how many CPUs this process may use: a job's share of its machine, or `most`."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return min(len(os.sched_getaffinity(0)), most)
    return min(os.cpu_count() or 1, most)


SelectOn = Literal["val", "test"]


@dataclass(frozen=True)
class Sources:
    """What a run reads: the model, the data, the prompts."""

    # A preset (ViT-B/16 ..., downloaded), a file or folder of OpenAI, Hugging Face or open_clip, a
    # name on the Hugging Face hub, a run's best/ folder, or tiny.
    model: Annotated[str, help_for("NAME|PATH", "tiny")] = "tiny"
    # minidomain (drawn), domainnet, imagenet (with V2, R, A, Sketch), cub or folder: see
    # docs/data.md.
    data: str = "minidomain"
    # Split to train and select on, and the first column of the table; several: a run each.
    reference: Annotated[
        str, help_for("SPLIT ...", "real; imagenet, cub, val; domainnet: none")
    ] = ""
    # Splits that are only evaluated. A run leaves its own reference out.
    shifts: Annotated[
        tuple[str, ...], help_for("SPLIT ...", "all others, but quickdraw of domainnet")
    ] = ()
    # openai (its 80 for ImageNet), a file with one prompt per line, or one prompt; {} stands for
    # the class.
    templates: Annotated[
        str | None, help_for("FILE|PROMPT", "eight on minidomain, one on folder, else openai")
    ] = None
    # Names of classes whose folders are numbers or WordNet ids: one 'FOLDER NAME' per line.
    class_names: Annotated[Path | None, help_for("FILE", "the folders' names, or OpenAI's")] = None
    # Keep underscores in class names, as the authors' script did, instead of turning them into
    # spaces.
    keep_underscores: bool = False
    # Generalised zero-shot: classes that are reported but not trained on. The head is the fixed
    # zero-shot one.
    unseen: Annotated[tuple[str, ...], help_for("CLASS ...", "none")] = ()
    # val: validation images, or a tenth of the training images, held out; test: the reported ones,
    # as in the paper.
    select_on: SelectOn = "val"


@dataclass(frozen=True)
class Places:
    """Where the data lie."""

    # Folder with the data. minidomain has none.
    data_root: Annotated[Path | None, help_for("DIR", "none")] = None
    # Folders of splits that lie elsewhere (imagenet).
    split_roots: Annotated[tuple[str, ...], help_for("NAME=DIR ...", "none")] = ()


@dataclass(frozen=True)
class Execution(lipsum.Computation, Places):
    """Where and how a run is executed. The results agree up to rounding."""

    # Type that the towers compute in; auto: bfloat16 on TPU and GPU, else float32. All else is
    # float32.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    # Spread weights, optimizer and frozen weights over the devices instead of copying them to each,
    # but for arrays of less than a million entries, such as all of the embedded model's.
    fsdp: bool = False
    # Threads that decode images. By default one per CPU that the process may use, at most 16.
    workers: int = usable_cpus()
    # Steps between checkpoints, of which the two newest are kept. Every evaluation also saves one.
    checkpoint_every: int = 1_000
    # Also write the metrics for TensorBoard (needs pip install '.[tensorboard]').
    tensorboard: bool = False
    # Write a trace of steps 11 to 20, for https://ui.perfetto.dev or XProf, to the run's profile/.
    profile: bool = False


@dataclass(frozen=True)
class Cluster:
    """Several processes that share one run. All get the same command except for --process."""

    # Address at which process 0 listens.
    coordinator: Annotated[
        str | None, help_for("HOST:PORT", "none; TPU pods and Slurm are found without")
    ] = None
    # Number of processes.
    processes: Annotated[int | None, help_for("INT", "none")] = None
    # Number of this process, from 0. Process 0 writes the files.
    process: Annotated[int | None, help_for("INT", "none")] = None


@dataclass(frozen=True)
class Command:
    """Fine-tune a zero-shot CLIP on one domain and show what that does to the others.

    Without --model and --data: the tiny CLIP and the benchmark that come with this project.
    Defaults depend on --data, and are the paper's where it gives them: --data imagenet --help shows
    those of ImageNet.
    """

    # A run each: zero-shot ft scratch-ft lp lp-ft ema l2sp kd car-ft lipsum lipsum-exact kld-random
    # mse-fixed feat-kd; all.
    method: tuple[str, ...] = ("lipsum",)
    # Seeds of the images' order, augmentation and random texts, a run each.
    seed: tuple[int, ...] = (0,)
    # --unseen from a file with one class per line.
    unseen_file: Annotated[Path | None, help_for("FILE", "none")] = None
    # paper: every setting of the paper for --data domainnet, imagenet or cub. Options beside it
    # prevail.
    protocol: Annotated[Literal["paper"] | None, help_for("{paper}", "none")] = None
    # Folder for the runs' folders, METHOD/seed-SEED.
    out: Path = Path("runs")
    # Keep finished runs under --out, and continue unfinished ones from their checkpoints, on
    # whatever devices.
    resume: bool = False
    # Replace runs that are under --out.
    overwrite: bool = False
    # What a run reads: the model, the data, the prompts. --resume refuses other values.
    sources: Sources = Sources()
    # How to train. Give an option several values to make a run per combination. --resume refuses
    # other values.
    settings: lipsum.Settings = dataclasses.field(default_factory=lipsum.Settings)
    # Where and how a run is executed. The results agree up to rounding, and --resume may change it.
    execution: Execution = Execution()
    # Several processes that share one run. All get the same command except for --process.
    cluster: Cluster = Cluster()
    # The values of options of `sources` and `settings` that have several, by name.
    sweep: tyro.conf.Suppress[dict[str, tuple]] = dataclasses.field(default_factory=dict)


DEFAULTS = {
    "minidomain": Command(
        sources=Sources(reference="real"),
        settings=lipsum.Settings(steps=250, batch_size=64, learning_rate=1e-3, augmentation="off"),
    ),
    "domainnet": Command(sources=Sources(data="domainnet", templates="openai")),
    "imagenet": Command(
        sources=Sources(data="imagenet", reference="imagenet", templates="openai"),
        settings=lipsum.Settings(steps=50_000),
    ),
    # The paper names neither prompts nor steps for CUB (B.3). It describes one way to make a
    # zero-shot head (B.1), OpenAI's.
    "cub": Command(sources=Sources(data="cub", reference="cub", templates="openai")),
    "folder": Command(
        sources=Sources(data="folder", reference="val", templates="a photo of a {}.")
    ),
}
# What --protocol paper changes in these (section 4, appendices B and C, and the authors' script,
# which has no CUB).
PAPER: dict[str, dict[str, Any]] = {
    "domainnet": {
        "reference": "real",
        "shifts": ("real", "painting", "clipart", "infograph", "sketch"),
        "keep_underscores": True,
    },
    "imagenet": {"shifts": ("imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch")},
    "cub": {},
}
PAPER_BATCH_SIZES = {"ViT-B/32": 256, "ViT-B/16": 256, "ViT-L/14": 128}


def defaults(data: str, protocol: str | None, model: str) -> Command:
    """Returns the defaults of a data set.

    Raises InputError if it is unknown or has no such protocol.
    """
    if data not in DEFAULTS:
        raise unknown("data set", data, DEFAULTS)
    command = DEFAULTS[data]
    if protocol != "paper":
        return command
    if data not in PAPER:
        known = ", ".join(PAPER)
        raise InputError(f"--protocol paper is for --data {known}, not {data}: give one of these")
    own = model if model in PAPER_BATCH_SIZES else "ViT-B/16"
    batch_size = 128 if model.startswith("ViT-L/14") else PAPER_BATCH_SIZES[own]
    return replace(
        command,
        protocol=protocol,
        sources=replace(command.sources, model=own, select_on="test", **PAPER[data]),
        settings=replace(command.settings, batch_size=batch_size),
    )


def defaults_of(command: Command) -> Command:
    """Returns the defaults that the command was parsed with."""
    return defaults(command.sources.data, command.protocol, command.sources.model)


# -------------------------------------------------------------------------------------- parsing

SWEPT = [field.name for field in dataclasses.fields(lipsum.Settings)] + ["reference"]
LISTS = {
    flag(name) for group in (Sources(), Places()) for name, v in vars(group).items() if v == ()
}
_registry = ConstructorRegistry()


@_registry.primitive_rule
def _number(info: tyro.constructors.PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Reads `lipsum.Number` as a float: arrays come from compiled steps alone."""
    if lipsum.Scalar not in typing.get_args(info.type):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: float(words[0]),
        is_instance=lambda value: value is None or isinstance(value, float),
        str_from_instance=lambda value: [str(value)],
    )


def parse(arguments: Sequence[str]) -> Command:
    """Returns the command of a command line, with the defaults of its data set.

    Raises InputError for an unknown data set, and for a list without a value.
    """
    arguments = expanded(arguments)
    for word, following in itertools.pairwise([*arguments, "--"]):
        if word in LISTS and following.startswith("--"):  # () would mean the default
            raise InputError(f"{word} has no value: give one or more, or leave it out")
    single, several = separate_sweep(arguments)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in {"data": "minidomain", "protocol": None, "model": ""}.items():
        finder.add_argument(flag(name), default=default)
    default = defaults(**vars(finder.parse_known_args(single)[0]))

    def parsed(words: Sequence[str]) -> Command:
        config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
        with _registry:
            return tyro.cli(
                Command, prog="python train.py", args=words, default=default, config=config
            )

    def value_of(name: str, value: str) -> Any:
        command = parsed([*single, flag(name), value])
        return (vars(command.sources) | vars(command.settings))[name]

    sweep = {name: tuple(value_of(name, each) for each in words) for name, words in several.items()}
    return replace(parsed(single), sweep=sweep)


def separate_sweep(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separates options with several values, which tyro does not know.

    Returns the arguments with the first value of each option of `SWEPT`, and all values of those
    that have several.
    """
    single: list[str] = []
    values: dict[str, list[str]] = {}
    name = ""
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            values[name] = []
        else:
            values.setdefault(name, []).append(word)
        if name not in SWEPT or len(values[name]) <= 1:
            single.append(word)
    return single, {name: values[name] for name in SWEPT if len(values.get(name, [])) > 1}


def as_arguments(value: Any) -> str:
    """Returns a value as a command line has it."""
    return shlex.join(map(str, value if isinstance(value, tuple | list) else (value,)))


def describe_protocol(command: Command) -> str:
    """Returns the options that --protocol paper set and, in a second line, those given instead."""
    default = defaults_of(command)
    if "reference" not in command.sweep:  # a run leaves its own reference out of the shifts
        reference = command.sources.reference
        shifts = with_reference(default.sources, reference).shifts
        default = replace(default, sources=replace(default.sources, shifts=shifts))
        command = replace(command, sources=with_reference(command.sources, reference))
    given = vars(command.sources) | vars(command.settings) | command.sweep
    kept, instead = [], []
    for name, value in (vars(default.sources) | vars(default.settings)).items():
        if given[name] != value:
            words = f"{as_arguments(given[name])} instead of {as_arguments(value) or 'none'}"
            instead.append(f"{flag(name)} {words}")
        elif value:
            kept.append(flag(name) if value is True else f"{flag(name)} {as_arguments(value)}")
    lines = [f"protocol paper: {' '.join(kept)}"]
    return "\n".join(lines + [f"not the paper's: {', '.join(instead)}"] * bool(instead))


# ----------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One run of a command: one method, seed and reference, one value of every setting."""

    method: str
    seed: int
    folder: Path
    sources: Sources
    settings: lipsum.Settings
    execution: Execution

    @property
    def is_finished(self) -> bool:
        """Whether the run has its last file."""
        return (self.folder / "results.json").exists()


def to_json(*groups: Any) -> dict[str, Any]:
    """Returns the options of the groups by name, with values as JSON has them."""
    options = {name: value for group in groups for name, value in vars(group).items()}
    return json.loads(json.dumps(options, default=str))


def from_json(group: type, saved: dict[str, Any]) -> Any:
    """Returns the group whose options `to_json` returned; others are ignored."""
    hints = typing.get_type_hints(group)

    def value(name: str) -> Any:
        if isinstance(saved[name], list):
            return tuple(saved[name])
        return Path(saved[name]) if saved[name] and hints[name] == Path | None else saved[name]

    names = [field.name for field in dataclasses.fields(group) if field.name in saved]
    return group(**{name: value(name) for name in names})


def absolute(group: Any) -> Any:
    """Returns the group with absolute paths, so that a run is opened from any working folder.

    `openai` and the names of models mean the same whatever lies in the working folder.
    """
    names = ("tiny", "openai", *clip.PRESETS)

    def resolved(name: str, value: Any) -> Any:
        if name == "split_roots":
            return tuple(re.sub("=(.+)", lambda r: f"={os.path.abspath(r[1])}", x) for x in value)
        is_file = name in ("model", "templates") and value not in names and value is not None
        if isinstance(value, Path) or (is_file and os.path.exists(value)):
            return type(value)(os.path.abspath(value))
        return value

    return replace(group, **{name: resolved(name, value) for name, value in vars(group).items()})


def resolved(command: Command) -> Command:
    """Returns the command with `all`, --unseen-file, the precision and paths spelt out.

    Raises InputError for an unreadable file.
    """
    methods = [
        name for given in command.method for name in (lipsum.METHODS if given == "all" else [given])
    ]
    unseen = command.sources.unseen
    if path := command.unseen_file:
        lines = read_lines(path, f"--unseen-file {path}", "give one class per line")
        unseen += tuple(line for line in map(str.strip, lines) if line)
    execution = command.execution
    if execution.precision == "auto":
        on_cpu = jax.default_backend() == "cpu"
        execution = replace(execution, precision="float32" if on_cpu else "bfloat16")
    fixed_head = command.settings.fixed_head or bool(unseen)
    return replace(
        command,
        method=tuple(dict.fromkeys(methods)),
        unseen_file=None,
        sources=replace(absolute(command.sources), unseen=unseen),
        settings=replace(absolute(command.settings), fixed_head=fixed_head),
        execution=absolute(execution),
    )


def with_reference(sources: Sources, reference: str) -> Sources:
    """Returns the sources with another reference, which is left out of the shifts."""
    others = tuple(shift for shift in sources.shifts if shift != reference)
    return replace(sources, reference=reference, shifts=others or sources.shifts)


def unread_settings(method: lipsum.Method, guidance: Path | None) -> set[str]:
    """Returns the names of the settings that the method does not read."""
    reads_texts = method.guidance in ("random", "averaged")
    trained = ("steps", "batch_size", "learning_rate", "warmup", "fixed_head", "augmentation")
    reads = dict.fromkeys((*trained, "eval_every"), method.trained) | {
        "weight": method.loss is not None,
        "num_texts": method.guidance == "random",
        "text_length": reads_texts and guidance is None,
        "guidance": reads_texts,
        "temperature": method.tempered,
        "decay": method.averaged,
    }
    return {name for name, is_read in reads.items() if not is_read}


def read_settings(run: Run) -> dict[str, Any]:
    """Returns the options of a run that determine its numbers."""
    unread = unread_settings(lipsum.METHODS[run.method], run.settings.guidance)
    options = to_json(run.sources, run.settings)
    return {name: value for name, value in options.items() if name not in unread}


def runs(command: Command) -> list[Run]:
    """Returns every run of the command. Raises InputError for an unknown method.

    A method is not repeated for values of a setting, or for seeds, that it does not read.
    """
    found = []
    distinct = {name: tuple(dict.fromkeys(values)) for name, values in command.sweep.items()}
    sweep = {name: values for name, values in distinct.items() if len(values) > 1}
    references = sweep.pop("reference", (command.sources.reference,))
    for reference, name in itertools.product(references, command.method):
        if name not in lipsum.METHODS:
            raise unknown("method", name, [*lipsum.METHODS, "all"])
        method = lipsum.METHODS[name]
        sources = with_reference(command.sources, reference)
        unread = unread_settings(method, command.settings.guidance)
        swept = {name: values for name, values in sweep.items() if name not in unread}
        seeds = command.seed if method.trained else command.seed[:1]
        for values in itertools.product(*swept.values()):
            varied = dict(zip(swept, values, strict=True))
            settings = replace(command.settings, **varied)
            weight = lipsum.loss_weight(method, settings)
            settings = replace(settings, weight=weight, decay=lipsum.average_decay(settings))
            varied |= {"reference": reference} if len(references) > 1 else {}
            suffix = "".join(f"{flag(name)[1:]}-{value}" for name, value in varied.items())
            for seed in dict.fromkeys(seeds):
                folder = command.out / name / f"seed-{seed}{suffix}"
                found.append(Run(name, seed, folder, sources, settings, command.execution))
    return found
