"""The options of `python train.py`: what they are, their defaults, which of them make no sense, and the runs they make.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --help` shows them.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

import lipsum
from support import layouts
from support.errors import InputError, unknown


def _unsaid(metavar: str, default: str) -> Any:
    """How --help shows an option whose default depends on the data set."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class Options:
    """Fine-tune a zero-shot CLIP on one domain and show what that does to the others.

    Without --model and --data: the tiny CLIP and the benchmark that come with this project. Other defaults are the
    paper's for DomainNet, where it gives them.
    """

    method: tuple[str, ...] = ("lipsum",)
    """How to fine-tune, one run each, or all of them:
    ft scratch-ft lp lp-ft ema l2sp kd car-ft
    lipsum lipsum-exact kld-random mse-fixed feat-kd.
    clip, alone: pre-train a tiny CLIP on captioned images."""
    seed: tuple[int, ...] = (0,)
    """One run each: order of the images, augmentation, random texts."""
    model: str = "tiny"
    """OpenAI's .pt file, a Hugging Face folder, a run's best/ folder, a preset (ViT-B/16 ..., downloaded), or tiny."""
    data: str = "minidomain"
    """minidomain (drawn), domainnet (DOMAIN/CLASS/FILE, DOMAIN_train.txt, ...), imagenet (and V2, R, A, Sketch), cub
    (images.txt, ...), folder (train/CLASS/FILE, val/CLASS/FILE, SHIFT/CLASS/FILE), npy (SPLIT/test_images.npy, ...), or
    for clip captions (captions.tsv). The README has each layout."""
    data_root: Annotated[Path | None, _unsaid("DIR", "none")] = None
    """The folder that holds the data; minidomain has none."""
    split_roots: tuple[str, ...] = ()
    """NAME=DIR ...: folders of splits that lie elsewhere (imagenet)."""
    skip_broken: int = 0
    """So many broken images at most, over all splits, do not stop a run: the next of its class stands in for each, and
    results.json lists them."""
    reference: Annotated[
        tuple[str, ...] | None, _unsaid("SPLIT ...", "real on minidomain, imagenet, cub, val of folder")
    ] = None
    """The split to train and select on, and the first column of the table; several: one run each."""
    shifts: Annotated[tuple[str, ...], _unsaid("SPLIT ...", "all others, but quickdraw of domainnet")] = ()
    """The splits that are only evaluated; of several references, a run leaves its own out."""
    templates: Annotated[
        str | None, _unsaid("FILE|PROMPT", "eight on minidomain, openai on imagenet, else 'a photo of a {}.'")
    ] = None
    """openai (its 80 for ImageNet), a file with one prompt a line, or one prompt; {} stands for the class."""
    keep_underscores: bool = False
    """Keep underscores in class names, as the authors' script did, instead of turning them into spaces."""
    augmentation: Annotated[Literal["crop", "off"] | None, _unsaid("{crop,off}", "off on minidomain, else crop")] = None
    """crop: random resized crops and mirroring."""
    steps: Annotated[tuple[int, ...] | None, _unsaid("INT ...", "250 on minidomain, 50000 on imagenet, else 5000")] = (
        None
    )
    """Updates to make; several: one run each."""
    batch_size: Annotated[
        tuple[int, ...] | None, _unsaid("INT ...", "64 on minidomain, else 256; clip has its own")
    ] = None
    """Images per update, over all devices; several: one run each."""
    learning_rate: Annotated[
        tuple[float, ...] | None, _unsaid("FLOAT ...", "1e-3 on minidomain, else 1e-5; clip has its own")
    ] = None
    """Peak rate of Adam; several: one run each."""
    warmup: float = 0.1
    """Fraction of the steps over which the rate rises from 0; it falls to 0 as a half cosine."""
    weight: Annotated[float | None, _unsaid("FLOAT", "1; l2sp 0.1, car-ft 3")] = None
    """Lambda, the weight of the regulariser, for the methods that have one."""
    num_texts: tuple[int, ...] = (80,)
    """M, texts per step (lipsum, kld-random); several: one run each."""
    text_length: tuple[int, ...] = (8,)
    """L, random tokens per text (lipsum, lipsum-exact, kld-random); several: one run each."""
    guidance: Annotated[Path | None, _unsaid("FILE", "random texts")] = None
    """A file with one text a line, to draw the M texts from (lipsum, kld-random), or to average over (lipsum-exact)."""
    temperature: float = 1.0
    """T of equation 20 (car-ft, kld-random)."""
    decay: float = 0.995
    """d of equation 16, the share of the old average (ema)."""
    fixed_head: bool = False
    """Keep the head as it is at the start."""
    unseen: Annotated[tuple[str, ...], _unsaid("CLASS ...", "none")] = ()
    """Generalised zero-shot: classes that are not trained on, but reported. The head is the fixed zero-shot one."""
    unseen_file: Annotated[Path | None, _unsaid("FILE", "none")] = None
    """The same, from a file with one class a line."""
    eval_every: int = 1_000
    """Steps between evaluations on the selection data; the most accurate model is kept. Always at the end."""
    precision: Annotated[
        Literal["float32", "bfloat16"] | None, _unsaid("{float32,bfloat16}", "bfloat16 on TPU and GPU, else float32")
    ] = None
    """What the towers compute in; weights, optimiser, LayerNorm, softmax and losses are float32."""
    accumulate: int = 1
    """Parts that a batch is split into, one after the other, to fit into memory: the same gradient."""
    remat: bool = False
    """Compute each block again in the backward pass instead of keeping its values: less memory, more time."""
    fsdp: bool = False
    """Spread weights, optimiser and frozen weights over the devices instead of copying them to each."""
    coordinator: Annotated[str | None, _unsaid("HOST:PORT", "none; TPU pods and Slurm are found without")] = None
    """Several processes, one run: where process 0 listens. All get the same command but for --process."""
    processes: Annotated[int | None, _unsaid("INT", "none")] = None
    """How many processes there are."""
    process: Annotated[int | None, _unsaid("INT", "none")] = None
    """The number of this one, from 0, which writes the files."""
    select_on: Literal["val", "test"] = "val"
    """val: the reference's validation images, where its layout has some apart from those reported, or a tenth of its
    training images (imagenet: a hundredth), held out; test: those reported, as the paper did."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints, of which the two newest are kept; there is one at every evaluation, too."""
    workers: int = os.cpu_count() or 1
    """Threads that decode images."""
    out: Path = Path("runs")
    """Where the runs' folders go."""
    tensorboard: bool = False
    """Write the figures of metrics.jsonl for TensorBoard, too (needs pip install '.[tensorboard]')."""
    profile: bool = False
    """Write a trace of steps 11 to 20, for https://ui.perfetto.dev or XProf, to the run's profile/."""
    resume: bool = False
    """Keep finished runs under --out, and continue unfinished ones from their checkpoints, on whatever devices."""
    overwrite: bool = False
    """Replace runs that are under --out already."""


# The paper's for DomainNet; on ImageNet it makes 50,000 steps.
PAPER = {"augmentation": "crop", "steps": (5_000,), "batch_size": (256,), "learning_rate": (1e-5,)}
PROMPT = "a photo of a {}."
DEFAULTS: dict[str, dict[str, Any]] = {
    "minidomain": {
        "reference": ("real",), "augmentation": "off", "steps": (250,), "batch_size": (64,), "learning_rate": (1e-3,),
    },
    "domainnet": {"reference": ("",), "templates": PROMPT, **PAPER},
    "imagenet": {"reference": ("imagenet",), "templates": "openai", **PAPER, "steps": (50_000,)},
    "cub": {"reference": ("cub",), "templates": "a photo of a {}, a type of bird.", **PAPER},
    "folder": {"reference": ("val",), "templates": PROMPT, **PAPER},
    "npy": {"reference": ("",), "templates": PROMPT, **PAPER},
}  # fmt: skip


PROFILED = range(11, 21)  # steps from the start: the first ones wait for the compiler


def with_defaults(options: Options) -> Options:
    """The options with `all` and --unseen-file spelt out, and with the data set's defaults where nothing was said.

    Raises InputError for an unknown data set or a file that cannot be read.
    """
    if options.data not in layouts.DATASETS:
        raise unknown("data set", options.data, layouts.DATASETS)
    unsaid = {name: value for name, value in DEFAULTS[options.data].items() if getattr(options, name) is None}
    named = [name for said in options.method for name in (lipsum.METHODS if said == "all" else [said])]
    unseen = options.unseen
    if options.unseen_file:
        unseen += tuple(line for line in read_lines("--unseen-file", options.unseen_file) if line.strip())
    fixed_head = options.fixed_head or bool(unseen)
    if options.precision is None:
        unsaid["precision"] = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    changes = {"method": tuple(dict.fromkeys(named)), "unseen": unseen, "unseen_file": None, "fixed_head": fixed_head}
    return dataclasses.replace(options, **unsaid, **changes)


def read_lines(option: str, path: Path) -> list[str]:
    """The lines of an option's file. Raises InputError naming both where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path} cannot be read ({error}): give a UTF-8 file, one entry a line") from error


def check_options(options: Options) -> None:
    """Raises InputError for a value that makes no sense."""
    for method in options.method:
        if method not in lipsum.METHODS:
            raise unknown("method", method, [*lipsum.METHODS, "all", "clip"])
    for name in SWEPT:
        if not getattr(options, name):
            raise InputError(f"{flag(name)} has no value: give one or more")
    for name in (
        "steps", "batch_size", "num_texts", "text_length", "eval_every", "checkpoint_every", "workers", "accumulate",
    ):  # fmt: skip
        value = getattr(options, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each < 1:
                raise InputError(f"{flag(name)} is {each}: give at least 1")
    for name in ("learning_rate", "weight", "temperature"):
        value = getattr(options, name)
        for each in value if isinstance(value, tuple) else (value,):
            if each is not None and not 0 <= each < float("inf"):
                raise InputError(f"{flag(name)} is {each}: give a number, at least 0")
    if options.skip_broken < 0:
        raise InputError(f"--skip-broken is {options.skip_broken}: give at least 0")
    if options.temperature == 0:
        raise InputError("--temperature is 0: give a number above 0")
    if not 0 <= options.decay < 1:
        raise InputError(f"--decay is {options.decay}: give a number from 0 up to, but not including, 1")
    if options.profile and min(options.steps) < max(PROFILED):
        raise InputError(f"--profile traces up to step {max(PROFILED)}, --steps is {min(options.steps)}: give more")
    if options.tensorboard and not importlib.util.find_spec("tensorboardX"):
        raise InputError("--tensorboard needs tensorboardX: pip install '.[tensorboard]'")
    if options.resume and options.overwrite:
        raise InputError("--resume keeps what --overwrite deletes: give one of them")
    if not 0 <= options.warmup <= 1:
        raise InputError(f"--warmup is {options.warmup}: give a fraction of the steps, from 0 to 1")
    if not options.method or not options.seed or min(options.seed) < 0 or max(options.seed) >= 2**32:
        raise InputError("--method and --seed need at least one value, seeds from 0 to 2**32 - 1")
    for method in options.method if options.unseen else ():
        if lipsum.METHODS[method].start != "zero-shot":
            raise InputError(f"--unseen keeps the zero-shot head, {method} starts from another: leave {method} out")


# ------------------------------------------------------------------------------------------------- runs and their files

# What takes several values, a run each, in the order in which they stand in folder names.
SWEPT = ("steps", "batch_size", "learning_rate", "num_texts", "text_length", "reference")
# What tells one process of a run from the others.
PROCESSES = ("coordinator", "processes", "process")
# What tells a run from others, or one call of the command from another.
PLACE = ("method", "seed", "unseen_file", "out", "resume", "overwrite", *PROCESSES)
# How the same numbers, but for rounding, come about.
EXECUTION = ("accumulate", "remat", "fsdp", "checkpoint_every", "workers", "tensorboard", "profile")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Plan:
    """One run of the command, with its own value of each option that takes several."""

    method: str
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    num_texts: int
    text_length: int
    reference: str
    folder: Path


def plans(options: Options) -> list[Plan]:
    """Every run of the command. A method that does not read an option is not repeated for its values."""
    made = []
    for reference, method in itertools.product(dict.fromkeys(options.reference), options.method):
        reads = dict.fromkeys(SWEPT, True)
        if lipsum.METHODS[method].loss is None:
            reads |= dict.fromkeys(("steps", "batch_size", "learning_rate"), False)
        reads["num_texts"] = lipsum.METHODS[method].texts == "drawn"
        reads["text_length"] = lipsum.METHODS[method].texts != "" and options.guidance is None
        values = {name: dict.fromkeys(getattr(options, name)) for name in SWEPT} | {"reference": [reference]}
        for chosen in itertools.product(*(list(values[name])[: None if reads[name] else 1] for name in SWEPT)):
            own = dict(zip(SWEPT, chosen, strict=True))
            several = [name for name in SWEPT if reads[name] and len(set(getattr(options, name))) > 1]
            suffix = "".join(f"{flag(name)[1:]}-{own[name]}" for name in several)
            folder = options.out / method
            made += [
                Plan(method, seed, **own, folder=folder / f"seed-{seed}{suffix}")
                for seed in dict.fromkeys(options.seed)
            ]
    return made


def weight_of(options: Options, method: str) -> float:
    """Lambda: what was said, else the method's own."""
    return lipsum.METHODS[method].weight if options.weight is None else options.weight


def settings_of(options: Options, plan: Plan) -> dict[str, Any]:
    """Every setting that a run's numbers depend on, as config.json has them."""
    settings = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in (*PLACE, *EXECUTION)
    }
    settings |= {name: getattr(plan, name) for name in SWEPT} | {"weight": weight_of(options, plan.method)}
    return json.loads(json.dumps(settings, default=str))


def execution_of(options: Options) -> dict[str, Any]:
    """How a run is executed, as config.json has it: what may change when it is resumed."""
    return {name: getattr(options, name) for name in EXECUTION}
