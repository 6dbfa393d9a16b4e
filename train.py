"""Fine-tunes a zero-shot CLIP on one domain and shows what that does to the others.

Paper: Lipsum-FT, https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --help` lists every option.

Each run has the folder OUT/METHOD/seed-S: config.json, metrics.jsonl, checkpoint/, best/ and results.json. Where an
option has several values, the run's own follows in the folder's name.
"""

import ctypes
import dataclasses
import importlib.metadata
import itertools
import json
import os
import shlex
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import clip
import data
import eval as evaluation
import layouts
import lipsum
import pretrain
import tables
from clip import InputError, unknown

LOG_EVERY = 10  # steps


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
    select_on: Literal["val", "test"] = "val"
    """val: the reference's validation images, where its layout has some apart from those reported, or a tenth of its
    training images (imagenet: a hundredth), held out; test: those reported, as the paper did."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints."""
    workers: int = os.cpu_count() or 1
    """Threads that decode images."""
    out: Path = Path("runs")
    """Where the runs' folders go."""
    resume: bool = False
    """Keep finished runs under --out, and continue unfinished ones from their checkpoints."""
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
    for name in ("steps", "batch_size", "num_texts", "text_length", "eval_every", "checkpoint_every", "workers"):
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
        if lipsum.METHODS[method].step is None:
            reads |= dict.fromkeys(("steps", "batch_size", "learning_rate"), False)
        reads["num_texts"] = lipsum.METHODS[method].texts == "drawn"
        reads["text_length"] = lipsum.METHODS[method].texts != "" and options.guidance is None
        values = {name: dict.fromkeys(getattr(options, name)) for name in SWEPT} | {"reference": [reference]}
        for chosen in itertools.product(*(list(values[name])[: None if reads[name] else 1] for name in SWEPT)):
            own = dict(zip(SWEPT, chosen, strict=True))
            several = [name for name in SWEPT if reads[name] and len(set(getattr(options, name))) > 1]
            suffix = "".join(f"{flag(name)[1:]}-{own[name]}" for name in several)
            folder = options.out / method
            made += [Plan(method, seed, **own, folder=folder / f"seed-{seed}{suffix}") for seed in options.seed]
    return made


def weight_of(options: Options, method: str) -> float:
    """Lambda: what was said, else the method's own."""
    return lipsum.METHODS[method].weight if options.weight is None else options.weight


def settings_of(options: Options, plan: Plan) -> dict[str, Any]:
    """Every setting of a run, as config.json has them."""
    settings = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in ("method", "seed", "unseen_file", "out", "resume", "overwrite", "workers")
    }
    settings |= {name: getattr(plan, name) for name in SWEPT} | {"weight": weight_of(options, plan.method)}
    return json.loads(json.dumps(settings, default=str))


def run_config(options: Options, plan: Plan, classes: tuple[str, ...]) -> dict[str, Any]:
    """What config.json says: every setting, the versions of the libraries, the device."""
    return {
        "method": plan.method,
        "seed": plan.seed,
        "settings": settings_of(options, plan),
        "classes": list(classes),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "equinox", "optax", "grain")},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def check_settings(path: Path, made_with: dict[str, Any], asked_for: dict[str, Any]) -> None:
    """Raises InputError naming the settings in which a run that is there differs from the one asked for."""
    changed = [name for name in made_with | asked_for if made_with.get(name) != asked_for.get(name)]
    if changed:
        raise InputError(
            f"{path} was made with other settings ({', '.join(changed)}): give the same ones, --overwrite or "
            "another --out"
        )


def is_finished(plan: Plan) -> bool:
    return (plan.folder / "results.json").exists()


def check_folders(options: Options) -> None:
    """Raises InputError where a run is there already and --resume and --overwrite are not given, or --resume asks for
    other settings than a finished run's.
    """
    for plan in plans(options):
        if plan.folder.exists() and not plan.folder.is_dir():
            raise InputError(f"{plan.folder} is a file: give another --out")
        if plan.folder.exists() and any(plan.folder.iterdir()) and not (options.resume or options.overwrite):
            raise InputError(f"{plan.folder} holds a run: give --resume, --overwrite or another --out")
        if options.resume and is_finished(plan):
            path = plan.folder / "config.json"
            check_settings(path, clip.read_json(path)["settings"], settings_of(options, plan))


def save_checkpoint(folder: Path, progress: dict[str, Any], state: lipsum.State, best: lipsum.Classifier) -> None:
    """One file, a line of JSON and then the arrays, renamed onto the last one when it is whole on disk."""
    folder.mkdir(exist_ok=True)
    with open(folder / "state.eqx.new", "wb") as file:
        file.write(json.dumps(progress).encode() + b"\n")
        eqx.tree_serialise_leaves(file, (state, best))
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "state.eqx.new", folder / "state.eqx")


def load_checkpoint(
    folder: Path, config: dict[str, Any], state: lipsum.State, best: lipsum.Classifier
) -> tuple[dict[str, Any], lipsum.State, lipsum.Classifier]:
    """What `save_checkpoint` saved; `state` and `best` tell the shapes.

    Raises InputError where it cannot be read, or names the settings that are not those of `config`.
    """
    path = folder / "state.eqx"
    try:
        with open(path, "rb") as file:
            progress = json.loads(file.readline())
            made_with, asked_for = (
                each["settings"] | {"classes": each["classes"]} for each in (progress["config"], config)
            )
            check_settings(path, made_with, asked_for)
            state, best = eqx.tree_deserialise_leaves(file, (state, best))
    except InputError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise InputError(f"checkpoint {path} cannot be read ({error!r}): give --overwrite to start anew") from error
    return progress, state, best


# ------------------------------------------------------------------------------------------------------------- one run


def write_metrics(
    log: Any, bar: tqdm, step: int, metrics: lipsum.Metrics, seconds_per_step: float, batch_size: int
) -> None:
    """A line of metrics.jsonl, and the bar's figures. Raises InputError where the loss is not finite."""
    values = {"loss": 0.0} | {name: float(value) for name, value in metrics.items()}  # jit sorts names; loss goes first
    speed = {"images_per_second": batch_size / seconds_per_step, "seconds_per_step": seconds_per_step}
    log.write(json.dumps({"step": step, **values} | {name: round(value, 4) for name, value in speed.items()}) + "\n")
    log.flush()
    bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed['images_per_second']:.0f} images/s")
    if not np.isfinite(values["loss"]):
        raise InputError(f"the loss is {values['loss']} at step {step}: lower --learning-rate")


def lines_up_to(path: Path, last_step: int) -> list[str]:
    """The whole lines of a metrics.jsonl, where there is one, that a checkpoint of `last_step` has behind it."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("}\n")]  # a killed run may leave half a line
    return [line for line in whole if json.loads(line)["step"] <= last_step]


def seconds_per_step(log_path: Path) -> float | None:
    """The median over the logged steps, without those that waited for the compiler; None where there are too few."""
    lines = [json.loads(line) for line in lines_up_to(log_path, sys.maxsize)]
    seconds = [line["seconds_per_step"] for line in lines if line["step"] > LOG_EVERY]
    return statistics.median(seconds) if seconds else None


@dataclass(frozen=True)
class Shared:
    """What the runs of one command on one reference share."""

    options: Options
    setup: evaluation.Setup
    guidance: Int[np.ndarray, "pool tokens"] | None

    def second_moment(self, text_length: int) -> Float[Array, "dim dim"]:
        """C2 over the user's texts or 10,000 random ones, computed once for each length."""
        if text_length not in self._second_moments:
            text = self.setup.model.text
            self._second_moments[text_length] = lipsum.text_second_moment(text, self.guidance, text_length)
        return self._second_moments[text_length]

    @cached_property
    def _second_moments(self) -> dict[int, Float[Array, "dim dim"]]:
        return {}

    def frozen(self, plan: Plan) -> lipsum.Frozen:
        options, setup = self.options, self.setup
        names = {field.name for field in dataclasses.fields(lipsum.Settings)}
        own = vars(options) | vars(plan) | {"weight": weight_of(options, plan.method)}
        settings = lipsum.Settings(**{name: value for name, value in own.items() if name in names})
        averages = lipsum.METHODS[plan.method].texts == "averaged"
        extra = (self.guidance, self.second_moment(plan.text_length) if averages else None)
        texts = data.replicate((setup.model.text, *extra), setup.mesh)
        zero_shot = setup.over_seen(setup.zero_shot)
        return lipsum.Frozen(zero_shot, texts[0], setup.context_head, setup.tau, settings, *texts[1:])

    @cached_property
    def probe(self) -> lipsum.Classifier:
        """LP: the zero-shot tower with the head trained to convergence on its features, without augmentation."""
        setup = self.setup
        features, labels = setup.predict([setup.zero_shot], setup.data.train).features, setup.data.train.labels
        head, steps = lipsum.linear_probe(features, labels, setup.zero_shot.head, setup.tau)
        print(f"linear probe: {int(steps)} steps of L-BFGS on {len(labels)} features")
        return lipsum.Classifier(setup.zero_shot.vision, data.replicate(head, setup.mesh))

    def start(self, method: str) -> lipsum.Classifier:
        """Where the method starts."""
        zero_shot, start = self.setup.over_seen(self.setup.zero_shot), lipsum.METHODS[method].start
        if start == "probe":
            return self.probe
        return lipsum.Classifier(zero_shot.vision, 0 * zero_shot.head) if start == "zeros" else zero_shot


def fine_tune(shared: Shared, plan: Plan) -> None:
    """One run from its start, or its checkpoint with --resume, to results.json."""
    options, setup, frozen, folder = shared.options, shared.setup, shared.frozen(plan), plan.folder
    method = lipsum.METHODS[plan.method]
    config = run_config(options, plan, setup.classes)
    if options.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)

    last = plan.steps if method.step else 0
    best = shared.start(plan.method)
    state = data.replicate(lipsum.initial_state(frozen, best, method.averaged), setup.mesh)
    progress = {"step": 0, "seconds": 0.0, "best_accuracy": -1.0, "best_step": 0, "config": config}
    if options.resume and (folder / "checkpoint" / "state.eqx").exists():
        progress, state, best = load_checkpoint(folder / "checkpoint", config, state, best)
        state, best = data.replicate((state, best), setup.mesh)
    evaluation.write_json(folder / "config.json", config)

    start, earlier_seconds = progress["step"], progress["seconds"]
    log_path = folder / "metrics.jsonl"
    log_path.write_text("".join(lines_up_to(log_path, start)), encoding="utf-8")

    key = jax.random.key(plan.seed)
    batches = data.training_batches(
        setup.data.train,
        frozen.zero_shot.vision.image_size,
        plan.batch_size,
        plan.seed,
        options.workers,
        start,
        options.augmentation,
    )
    began = time.perf_counter()
    timed_step, timed_at = start, began
    with (
        open(log_path, "a", encoding="utf-8") as log,
        tqdm(total=last, initial=start, desc=f"{plan.method} {folder.name}", unit="step") as bar,
    ):
        for step in range(start + 1, last + 1):
            previous = metrics if step > start + 1 else None
            state, metrics = method.step(state, frozen, data.shard_batch(next(batches), setup.mesh), key)
            jax.block_until_ready(previous)  # one step behind: waiting for this one would leave the device idle
            bar.update()
            evaluates = step % options.eval_every == 0 or step == last
            saves = evaluates or step % options.checkpoint_every == 0
            if step % LOG_EVERY == 0 or step == 1 or saves:
                jax.block_until_ready(metrics)
                now = time.perf_counter()
                write_metrics(log, bar, step, metrics, (now - timed_at) / (step - timed_step), plan.batch_size)
                timed_step, timed_at = step, now
            if evaluates:
                accuracy = setup.selection_accuracy([state.evaluated])
                if accuracy > progress["best_accuracy"]:
                    progress |= {"best_accuracy": accuracy, "best_step": step}
                    best = jax.tree.map(jnp.copy, state.evaluated)
            if saves:
                progress |= {"step": step, "seconds": earlier_seconds + time.perf_counter() - began}
                save_checkpoint(folder / "checkpoint", progress, state, best)
                timed_at = time.perf_counter()

    if last == 0:
        progress["best_accuracy"] = setup.selection_accuracy([best])
    best = setup.over_all(best)
    splits = setup.results([best])
    evaluation.save_classifier(folder / "best", setup, best)
    evaluation.write_json(
        folder / "results.json",
        {
            "method": plan.method,
            "model": options.model,
            "data": options.data,
            "seed": plan.seed,
            "steps": last,
            "seconds": round(progress["seconds"], 2),
            "seconds_per_step": seconds_per_step(log_path),
            "settings": config["settings"],
            "selection": {"accuracy": progress["best_accuracy"], "step": progress["best_step"]},
            "splits": splits,
            "zero_shot": setup.zero_shot_results,
            "skipped": sorted(setup.data.train.skipped.paths),
        },
    )


# -------------------------------------------------------------------------------------------------------- command line


def read_guidance(path: Path, setup: evaluation.Setup, at_least: int) -> Int[np.ndarray, "pool tokens"]:
    """The texts of a file, one a line, tokenized and cut to the longest.

    Raises InputError naming the line that is empty or too long, or where the texts are fewer than `at_least`.
    """
    lines = read_lines("--guidance", path)
    for number, line in enumerate(lines, start=1):
        if not clip.clean_text(line):
            raise InputError(f"--guidance {path} line {number} is empty: write a text or delete the line")
        try:
            clip.tokenize(setup.tokenizer, [line], setup.model.config)
        except InputError as error:
            raise InputError(f"--guidance {path} line {number}: {error}") from error
    if len(lines) < at_least:
        raise InputError(f"--guidance {path} has {len(lines)} texts: give at least --num-texts {at_least} or lower it")
    ids = clip.tokenize(setup.tokenizer, lines, setup.model.config)
    return ids[:, : 1 + np.max(np.argmax(ids == setup.model.config.end_token, axis=1))]


def prepare(options: Options, reference: str) -> Shared:
    """Loads everything that the runs on a reference share. Raises InputError before any long work."""
    names = [field.name for field in dataclasses.fields(evaluation.Sources)]
    shifts = options.shifts
    if len(set(options.reference)) > 1:
        shifts = tuple(shift for shift in shifts if shift != reference)
    own = {"reference": reference, "shifts": shifts, "batch_size": max(options.batch_size)}
    sources = {name: getattr(options, name) for name in names} | own
    setup = evaluation.prepare(evaluation.Sources(**sources))
    config = setup.model.config
    for length in options.text_length:
        evaluation.check_text_length(length, config)
    for size in options.batch_size:
        data.device_mesh(size)
    draws = any(lipsum.METHODS[method].texts == "drawn" for method in options.method)
    at_least = max(options.num_texts) if draws else 1
    return Shared(options, setup, options.guidance and read_guidance(options.guidance, setup, at_least))


def pretrain_options(options: Options) -> pretrain.Options:
    """What `--method clip` reads of the options. Raises InputError where it is not asked for alone."""
    if options.method != ("clip",) or len(options.seed) != 1:
        raise InputError("--method clip trains one model: give it alone, with one --seed")
    said = {
        name: getattr(options, name)[0]
        for name in ("steps", "batch_size", "learning_rate")
        if getattr(options, name) is not None
    }
    for name in said:
        if len(getattr(options, name)) > 1:
            raise InputError(f"--method clip trains one model: give {flag(name)} one value")
    if options.data not in ("minidomain", "captions"):
        raise unknown("captioned data set", options.data, ("minidomain", "captions"))
    return pretrain.Options(
        options.out, options.data, options.data_root, seed=options.seed[0], overwrite=options.overwrite, **said
    )


def keep_freed_memory() -> None:
    """Has glibc, where there is one, keep what XLA frees: on CPU, mapping the pages anew takes a quarter of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_arena_max, 1)


def describe(shared: Shared) -> str:
    """Two lines: the model on its devices, and the data."""
    options, setup, images = shared.options, shared.setup, shared.setup.data
    parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.zero_shot))
    reports = ", ".join(f"{len(split)} {name}" for name, split in images.reports.items())
    seen = f" ({len(setup.seen)} seen)" if options.unseen else ""
    return (
        f"{options.model}: {parameters / 1e6:.1f} M trained parameters on {jax.device_count()} "
        f"{jax.devices()[0].device_kind} device(s)\n"
        f"{options.data}: {len(setup.classes)} classes{seen}, {len(images.train)} images to train on, "
        f"{len(images.selection)} to select on, to report on: {reports}"
    )


def main(options: Options) -> None:
    """Every method on every seed, then the table."""
    if "clip" in options.method:
        return pretrain.main(pretrain_options(options), shlex.join(["python", *sys.argv]))
    options = with_defaults(options)
    check_options(options)
    check_folders(options)
    if options.data == "minidomain":
        print(
            "minidomain: 20 classes drawn in five domains, to see what fine-tuning costs and what Lipsum-FT saves\n"
            "real data: python train.py --model ViT-B/16 --data domainnet --data-root DIR --reference real"
        )
    runs = plans(options)
    prepared = {reference: prepare(options, reference) for reference in dict.fromkeys(options.reference)}
    for shared in prepared.values():
        print(describe(shared))
        own = [plan for plan in runs if plan.reference == shared.setup.sources.reference]
        for plan in own:
            if options.resume and is_finished(plan):
                print(f"{plan.folder} is finished: kept")
            else:
                fine_tune(shared, plan)
    for reference in prepared:
        folders = [plan.folder for plan in runs if plan.reference == reference]
        evaluation.print_table(tables.read_results(folders))


if __name__ == "__main__":
    arguments = tyro.cli(Options, prog="python train.py", config=(tyro.conf.FlagCreatePairsOff,))
    keep_freed_memory()
    if not jax.config.jax_compilation_cache_dir:  # the next run of the same sizes starts at once
        jax.config.update("jax_compilation_cache_dir", str(clip.cache_folder() / "jax"))
    sys.exit(evaluation.exit_code(lambda: main(arguments)))
