"""The options of `python train.py` in boxes, their defaults and checks, and the runs that a command makes.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --help` shows them.

A run has `Sources` (what is read), `lipsum.Settings` (how to train) and `Execution` (how it is computed). The first two
determine its numbers: `--resume` refuses to change them. The third may change.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shlex
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import tyro

import clip
import lipsum
from support.errors import InputError, expanded, flag, read_lines, unknown


def shown(metavar: str, default: str) -> Any:
    """How --help shows an option."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


SelectOn = Literal["val", "test"]


@dataclass(frozen=True)
class Sources:
    """What is read: the model, the data, the prompts."""

    model: Annotated[str | Path, shown("NAME|PATH", "tiny")] = "tiny"
    """A preset (ViT-B/16 ..., downloaded), a file or folder of OpenAI, Hugging Face or open_clip, a name on the Hugging
    Face hub, a run's best/ folder, or tiny."""
    data: str = "minidomain"
    """minidomain (drawn), domainnet, imagenet (with V2, R, A, Sketch), cub or folder: see docs/data.md."""
    shifts: Annotated[
        tuple[str, ...], shown("SPLIT ...", "all others, but quickdraw of domainnet")
    ] = ()
    """Splits that are only evaluated. With several references, a run leaves its own out."""
    templates: Annotated[
        str | Path | None, shown("FILE|PROMPT", "eight on minidomain, one on folder, else openai")
    ] = None
    """openai (its 80 for ImageNet), a file with one prompt per line, or one prompt; {} stands for the class."""
    class_names: Annotated[Path | None, shown("FILE", "the folders' names")] = None
    """Names of classes whose folders are numbers or WordNet ids: one 'FOLDER NAME' per line."""
    keep_underscores: bool = False
    """Keep underscores in class names, as the authors' script did, instead of turning them into spaces."""
    unseen: Annotated[tuple[str, ...], shown("CLASS ...", "none")] = ()
    """Generalised zero-shot: classes that are reported but not trained on. The head is the fixed zero-shot one."""
    select_on: SelectOn = "val"
    """val: validation images, or a tenth of the training images, held out; test: the reported ones, as in the paper."""
    reference: tyro.conf.Fixed[str] = ""  # one of the command's


class Sweep(lipsum.Settings):
    """How to train. Each option that takes several values makes a run per combination."""

    steps: tuple[int, ...] = eqx.field(default=(lipsum.Settings.steps,), static=True)
    batch_size: tuple[int, ...] = eqx.field(default=(lipsum.Settings.batch_size,), static=True)
    learning_rate: tuple[float, ...] = (float(lipsum.Settings.learning_rate),)
    weight: Annotated[tuple[float, ...], shown("FLOAT ...", "1; l2sp 0.1, car-ft 3")] = ()
    num_texts: tuple[int, ...] = eqx.field(default=(lipsum.Settings.num_texts,), static=True)
    text_length: tuple[int, ...] = eqx.field(default=(lipsum.Settings.text_length,), static=True)
    guidance: Annotated[Path | None, shown("FILE", "random texts")] = eqx.field(
        default=None, static=True
    )
    temperature: tuple[float, ...] = (float(lipsum.Settings.temperature),)
    decay: Annotated[tuple[float, ...], shown("FLOAT ...", "1 - 1.25 / steps")] = ()


@dataclass(frozen=True)
class Places:
    """Where the data lie."""

    data_root: Annotated[Path | None, shown("DIR", "none")] = None
    """Folder with the data. minidomain has none."""
    split_roots: Annotated[tuple[str, ...], shown("NAME=DIR ...", "none")] = ()
    """Folders of splits that lie elsewhere (imagenet)."""


@dataclass(frozen=True)
class Execution(lipsum.Computation, Places):
    """Where and how it is executed. The results are the same up to rounding, and --resume may change these options."""

    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that the towers compute in; auto: bfloat16 on TPU and GPU, else float32. All else is float32."""
    fsdp: bool = False
    """Spread weights, optimizer and frozen weights over the devices instead of copying them to each."""
    workers: int = os.cpu_count() or 1
    """Threads that decode images."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints, of which the two newest are kept. Every evaluation also saves one."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard (needs pip install '.[tensorboard]')."""
    profile: bool = False
    """Write a trace of steps 11 to 20, for https://ui.perfetto.dev or XProf, to the run's profile/."""


@dataclass(frozen=True)
class Cluster:
    """Several processes that share one run. All get the same command except for --process."""

    coordinator: Annotated[
        str | None, shown("HOST:PORT", "none; TPU pods and Slurm are found without")
    ] = None
    """Address at which process 0 listens."""
    processes: Annotated[int | None, shown("INT", "none")] = None
    """Number of processes."""
    process: Annotated[int | None, shown("INT", "none")] = None
    """Number of this process, from 0. Process 0 writes the files."""


@dataclass(frozen=True)
class Command:
    """Fine-tune a zero-shot CLIP on one domain and show what that does to the others.

    Without --model and --data: the tiny CLIP and the benchmark that come with this project. Defaults depend on --data,
    and are the paper's where it gives them: --data imagenet --help shows those of ImageNet.
    """

    method: tuple[str, ...] = ("lipsum",)
    """A run each: ft scratch-ft lp lp-ft ema l2sp kd car-ft lipsum lipsum-exact kld-random mse-fixed feat-kd; all."""
    seed: tuple[int, ...] = (0,)
    """Seeds of the images' order, augmentation and random texts, a run each."""
    reference: Annotated[
        tuple[str, ...], shown("SPLIT ...", "real, imagenet, cub, val; domainnet needs one")
    ] = ()
    """Split to train and select on, and the first column of the table; several: a run each."""
    unseen_file: Annotated[Path | None, shown("FILE", "none")] = None
    """--unseen from a file with one class per line."""
    protocol: Annotated[Literal["paper"] | None, shown("{paper}", "none")] = None
    """paper: every setting of the paper for --data domainnet, imagenet or cub. Options beside it prevail."""
    out: Path = Path("runs")
    """Folder for the runs' folders, METHOD/seed-SEED."""
    resume: bool = False
    """Keep finished runs under --out, and continue unfinished ones from their checkpoints, on whatever devices."""
    overwrite: bool = False
    """Replace runs that are under --out."""
    sources: Sources = Sources()
    settings: Sweep = field(default_factory=Sweep)
    execution: Execution = Execution()
    cluster: Cluster = Cluster()


DEFAULTS = {
    "minidomain": Command(
        reference=("real",),
        settings=Sweep(steps=(250,), batch_size=(64,), learning_rate=(1e-3,), augmentation="off"),
    ),
    "domainnet": Command(sources=Sources(data="domainnet", templates="openai")),
    "imagenet": Command(
        reference=("imagenet",),
        sources=Sources(data="imagenet", templates="openai"),
        settings=Sweep(steps=(50_000,)),
    ),
    # The paper names no prompts for CUB (B.3). It describes one way to make a zero-shot head (B.1), OpenAI's.
    "cub": Command(reference=("cub",), sources=Sources(data="cub", templates="openai")),
    "folder": Command(
        reference=("val",), sources=Sources(data="folder", templates="a photo of a {}.")
    ),
}
# What --protocol paper changes in these (section 5, appendix B and the authors' script, which has no CUB).
PAPER: dict[str, dict[str, Any]] = {
    "domainnet": {
        "shifts": ("painting", "clipart", "infograph", "sketch"),
        "keep_underscores": True,
    },
    "imagenet": {"shifts": ("imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch")},
    "cub": {},
}


def defaults(data: str, protocol: str | None, model: str) -> Command:
    """The defaults of a data set. Raises InputError if it is unknown or has no such protocol."""
    if data not in DEFAULTS:
        raise unknown("data set", data, DEFAULTS)
    command = DEFAULTS[data]
    if protocol != "paper":
        return command
    if data not in PAPER:
        raise InputError(
            f"--protocol paper is for --data {', '.join(PAPER)}, not {data}: give one of these"
        )
    own = model if model in ("ViT-B/32", "ViT-B/16", "ViT-L/14") else "ViT-B/16"
    sources = dataclasses.replace(command.sources, model=own, select_on="test", **PAPER[data])
    batch_size = 128 if model.startswith("ViT-L/14") else 256
    settings = dataclasses.replace(command.settings, batch_size=(batch_size,))
    reference = command.reference or ("real",)
    return dataclasses.replace(
        command, protocol=protocol, reference=reference, sources=sources, settings=settings
    )


def defaults_of(command: Command) -> Command:
    """The defaults that the command was parsed with."""
    return defaults(command.sources.data, command.protocol, str(command.sources.model))


def parse(arguments: Sequence[str]) -> Command:
    """The command line, with the defaults of its data set. Raises InputError for an unknown data set or no value."""
    arguments = expanded(arguments)
    boxes = (*dataclasses.fields(Sources), *dataclasses.fields(Places))
    lists = [flag(field.name) for field in boxes if field.default == ()]
    for word, following in itertools.pairwise([*arguments, "--"]):
        if word in lists and following.startswith("--"):
            raise InputError(
                f"{word} has no value: give one or more, or leave it out"
            )  # () would mean the default
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, default in {"data": "minidomain", "protocol": None, "model": ""}.items():
        finder.add_argument(flag(name), default=default)
    first_look = vars(finder.parse_known_args(arguments)[0])
    return tyro.cli(
        Command, prog="python train.py", args=arguments, default=defaults(**first_look),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed),
    )  # fmt: skip


def words(value: Any) -> str:
    """A value as a command line has it."""
    return shlex.join(map(str, value if isinstance(value, tuple) else (value,)))


def protocol_lines(command: Command) -> str:
    """The options that --protocol paper set and, in a second line, those that were given instead."""

    def options(command: Command) -> dict[str, Any]:
        return vars(command.sources) | vars(command.settings) | {"reference": command.reference}

    given = options(command)
    kept, instead = [], []
    for name, value in options(defaults_of(command)).items():
        if given[name] == value:
            kept += (
                [flag(name) if value is True else f"{flag(name)} {words(value)}"] if value else []
            )
        else:
            instead.append(f"{flag(name)} {words(given[name])} instead of {words(value) or 'none'}")
    return f"protocol paper: {' '.join(kept)}" + (
        f"\nnot the paper's: {', '.join(instead)}" if instead else ""
    )


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """One run of a command: one method, seed and reference, one value of every setting."""

    method: str
    seed: int
    folder: Path
    sources: Sources
    settings: lipsum.Settings
    execution: Execution


def flat(*boxes: Any) -> dict[str, Any]:
    """The options of the boxes by name, as JSON has them."""
    return json.loads(
        json.dumps({name: value for box in boxes for name, value in vars(box).items()}, default=str)
    )


def restored(box: type, saved: dict[str, Any]) -> Any:
    """A box from what `flat` made of it. Options that the file lacks have their defaults."""
    hints = typing.get_type_hints(box)

    def value(name: str) -> Any:
        if isinstance(saved[name], list):
            return tuple(saved[name])
        is_path = {Path, str} & set(typing.get_args(hints[name])) == {Path}
        return Path(saved[name]) if saved[name] and is_path else saved[name]

    return box(
        **{
            field.name: value(field.name)
            for field in dataclasses.fields(box)
            if field.name in saved
        }
    )


def absolute(box: Any) -> Any:
    """The box with its paths absolute, so that a run is opened from any working folder.

    `openai` and the names of models mean the same whatever lies in that folder.
    """
    hints = typing.get_type_hints(type(box))

    def value(name: str, given: Any) -> Any:
        if name == "split_roots":
            return tuple(
                re.sub("=(.+)", lambda root: f"={os.path.abspath(root[1])}", each) for each in given
            )
        is_name = isinstance(given, str) and (
            given in ("tiny", "openai", *clip.PRESETS) or not os.path.exists(given)
        )
        if given is None or is_name or Path not in typing.get_args(hints[name]):
            return given
        return type(given)(os.path.abspath(given))

    return dataclasses.replace(
        box, **{name: value(name, given) for name, given in vars(box).items()}
    )


def check_unchanged(run: Run, path: Path, config: dict[str, Any]) -> None:
    """Raises InputError if the settings of a config.json, by which `path` was made, are not those of `run`."""
    before = flat(
        restored(Sources, config["settings"]), restored(lipsum.Settings, config["settings"])
    )
    now = read_settings(run)
    for name, value in now.items():  # a file may have moved
        if isinstance(value, str) and os.path.isabs(value) and before[name]:
            before[name], now[name] = os.path.basename(before[name]), os.path.basename(value)
    if changed := [
        f"{flag(name)} {before[name]}, now {now[name]}" for name in now if before[name] != now[name]
    ]:
        problem = f"{path} was made with other settings ({', '.join(changed)})"
        raise InputError(f"{problem}: give the same ones, --overwrite or another --out")


def check_read(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises InputError if the files by which `path` was made have other content now, under the same names.

    Both are contents of a config.json. Earlier ones have no checksum.
    """
    for name, what in (("classes", "classes"), ("checksum", "weights or prompts")):
        if before.get(name, now[name]) != now[name]:
            raise InputError(
                f"{path} was made with other {what}: restore them, or train again with another --out"
            )


def resolved(command: Command) -> Command:
    """The command with `all`, --unseen-file and the precision spelt out. Raises InputError for an unreadable file."""
    methods = [
        name for given in command.method for name in (lipsum.METHODS if given == "all" else [given])
    ]
    unseen = command.sources.unseen
    if command.unseen_file:
        lines = read_lines(
            command.unseen_file, f"--unseen-file {command.unseen_file}", "give one class per line"
        )
        unseen += tuple(line for line in map(str.strip, lines) if line)
    precision = command.execution.precision
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(
        command,
        method=tuple(dict.fromkeys(methods)),
        unseen_file=None,
        sources=dataclasses.replace(absolute(command.sources), unseen=unseen),
        settings=dataclasses.replace(
            absolute(command.settings), fixed_head=command.settings.fixed_head or bool(unseen)
        ),
        execution=dataclasses.replace(absolute(command.execution), precision=precision),
    )


def unread_settings(method: lipsum.Method, guidance: Path | None) -> set[str]:
    """The settings that the method does not read."""
    reads_texts = method.texts in ("drawn", "averaged")
    reads = {
        **dict.fromkeys(
            ("steps", "batch_size", "learning_rate", "warmup", "fixed_head"), method.trained
        ),
        **dict.fromkeys(("augmentation", "eval_every"), method.trained),
        "weight": method.loss is not None,
        "num_texts": method.texts == "drawn",
        "text_length": reads_texts and guidance is None,
        "guidance": reads_texts,
        "temperature": method.tempered,
        "decay": method.averaged,
    }
    return {name for name, is_read in reads.items() if not is_read}


def read_settings(run: Run) -> dict[str, Any]:
    """The options of a run that determine its numbers."""
    unread = unread_settings(lipsum.METHODS[run.method], run.settings.guidance)
    return {
        name: value for name, value in flat(run.sources, run.settings).items() if name not in unread
    }


# Fraction of the steps that EMA averages over unless --decay is given, so that runs of any length weight theirs alike.
AVERAGED = 0.8


def runs(command: Command) -> Iterator[Run]:
    """Every run of the command. A method is not repeated for values of a setting that it does not read."""
    swept = {
        name: value for name, value in vars(command.settings).items() if isinstance(value, tuple)
    }
    references = dict.fromkeys(command.reference or ("",))
    shifts = command.sources.shifts
    for reference, method in itertools.product(references, command.method):
        own_shifts = (
            tuple(shift for shift in shifts if shift != reference)
            if len(references) > 1
            else shifts
        )
        sources = dataclasses.replace(command.sources, reference=reference, shifts=own_shifts)
        unread = unread_settings(lipsum.METHODS[method], command.settings.guidance)
        values = {name: list(dict.fromkeys(given)) for name, given in swept.items()}
        values["weight"] = values["weight"] or [lipsum.METHODS[method].weight]
        for chosen in itertools.product(
            *(values[name][: 1 if name in unread else None] or [None] for name in swept)
        ):
            own = dict(zip(swept, chosen, strict=True))
            if own["decay"] is None:
                own["decay"] = max(0.0, 1 - 1 / (AVERAGED * own["steps"]))
            settings = lipsum.Settings(**vars(command.settings) | own)
            varied = {
                name: own[name] for name in swept if name not in unread and len(values[name]) > 1
            }
            varied |= {"reference": reference} if len(references) > 1 else {}
            suffix = "".join(f"{flag(name)[1:]}-{value}" for name, value in varied.items())
            for seed in dict.fromkeys(command.seed):
                folder = command.out / method / f"seed-{seed}{suffix}"
                yield Run(method, seed, folder, sources, settings, command.execution)


# -------------------------------------------------------------------------------------------------------------- checks

PROFILED = range(11, 21)  # steps from the start: the first ones wait for the compiler
COUNTS = [
    "steps",
    "batch_size",
    "num_texts",
    "text_length",
    "eval_every",
    "accumulate",
    "workers",
    "checkpoint_every",
]
VALID = {
    **dict.fromkeys(COUNTS, (lambda value: value >= 1, "give at least 1")),
    **dict.fromkeys(
        ("learning_rate", "weight"), (lambda value: 0 <= value < float("inf"), "give at least 0")
    ),
    "warmup": (lambda value: 0 <= value <= 1, "give a fraction of the steps, from 0 to 1"),
    "temperature": (lambda value: 0 < value < float("inf"), "give a number above 0"),
    "decay": (lambda value: 0 <= value < 1, "give a number from 0 up to, but not including, 1"),
}


def check(command: Command) -> None:
    """Raises InputError for a value that makes no sense."""
    for method in command.method:
        if method not in lipsum.METHODS:
            raise unknown("method", method, [*lipsum.METHODS, "all"])
        of_method = lipsum.METHODS[method]
        if command.sources.unseen and of_method.start != "zero-shot":
            raise InputError(
                f"--unseen keeps the zero-shot head, {method} starts from another: leave {method} out"
            )
        if command.settings.fixed_head and of_method.start == "zeros":
            raise InputError(
                f"--fixed-head keeps the head of {method} at zeros, so nothing is learnt: leave one out"
            )
        if of_method.tempered and of_method.texts == "drawn" and 1 in command.settings.num_texts:
            raise InputError(
                f"{method} compares texts with each other, --num-texts is 1: give at least 2"
            )
    if command.sources.data not in DEFAULTS:
        raise unknown("data set", command.sources.data, DEFAULTS)
    if (
        not command.method
        or not command.seed
        or min(command.seed) < 0
        or max(command.seed) >= 2**32
    ):
        raise InputError("--method and --seed need at least one value, seeds from 0 to 2**32 - 1")
    for name, value in vars(command.settings).items():
        if value == () and name not in ("weight", "decay"):
            raise InputError(f"{flag(name)} has no value: give one or more")
    options = vars(command.settings) | vars(command.execution)
    for name, (is_valid, advice) in VALID.items():
        for value in options[name] if isinstance(options[name], tuple) else (options[name],):
            if not is_valid(value):
                raise InputError(f"{flag(name)} is {value}: {advice}")
    steps = min(command.settings.steps)
    if command.execution.profile and steps < max(PROFILED):
        raise InputError(
            f"--profile traces up to step {max(PROFILED)}, --steps is {steps}: give more"
        )
    if command.execution.tensorboard and not importlib.util.find_spec("tensorboardX"):
        raise InputError("--tensorboard needs tensorboardX: pip install '.[tensorboard]'")
    if command.resume and command.overwrite:
        raise InputError("--resume keeps what --overwrite deletes: give one of them")


def doubts(command: Command) -> list[str]:
    """A line for every option that has no effect, and for every method that its settings make another one."""
    methods = [lipsum.METHODS[name] for name in command.method]
    unread = set.intersection(
        *(unread_settings(method, command.settings.guidance) for method in methods)
    )
    unread -= {
        "batch_size",
        "fixed_head" if command.sources.unseen else "",
    }  # the evaluation and --unseen set these
    default = vars(defaults_of(command).settings)
    given = [
        (name, value) for name, value in vars(command.settings).items() if value != default[name]
    ]
    lines = [
        f"{flag(name)} {words(value)} has no effect on {' '.join(command.method)}"
        for name, value in given
        if name in unread
    ]
    for run in runs(command):
        method = lipsum.METHODS[run.method]
        settings = run.settings
        if method.loss and settings.weight == 0:
            lines.append(f"{run.method} with --weight 0 is ft")
        if method.trained and settings.learning_rate == 0:
            lines.append(f"{run.method} with --learning-rate 0 stays as it starts")
        if method.averaged and settings.decay == 0:
            lines.append(f"{run.method} with --decay 0 is ft")
        if method.averaged and (kept := settings.decay**settings.steps) > 0.9:
            of_run = f"{run.method} with --decay {settings.decay} and --steps {settings.steps}"
            lines.append(
                f"{of_run} averages {100 * kept:.0f}% of the zero-shot model: give a smaller decay"
            )
    return list(dict.fromkeys(lines))
