"""Fine-tunes a zero-shot CLIP on one domain and shows what that does to the others.

Paper: Lipsum-FT, https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --help` lists every option.

Each run has the folder OUT/METHOD/seed-S: config.json, metrics.jsonl, checkpoint/, best/ and results.json. Where an
option has several values, the run's own follows in the folder's name.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np
import tyro
from jaxtyping import Float, Int
from tqdm import tqdm

import clip
import data
import eval as evaluation
import lipsum
from support import files, opening, pretrain, tables
from support.errors import InputError, exit_code, read_json, unknown
from support.logs import LOG_EVERY, Log, lines_up_to, seconds_per_step, tensorboard
from support.options import (
    PROFILED,
    Options,
    Plan,
    check_options,
    execution_of,
    flag,
    plans,
    read_lines,
    settings_of,
    weight_of,
    with_defaults,
)
from support.processes import (
    Signals,
    Stopped,
    broadcast,
    check_processes,
    connect,
    from_writer,
    gathered,
    keep_freed_memory,
)

# ------------------------------------------------------------------------------------------------------- runs on disk


def run_config(options: Options, plan: Plan, classes: tuple[str, ...]) -> dict[str, Any]:
    """What config.json says: every setting, how it is executed, the versions of the libraries, the devices."""
    return {
        "method": plan.method,
        "seed": plan.seed,
        "settings": settings_of(options, plan),
        "execution": execution_of(options),
        "classes": list(classes),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "equinox", "optax", "grain")},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def check_settings(path: Path, made_with: dict[str, Any], asked_for: dict[str, Any]) -> None:
    """Raises InputError naming the settings in which a run that is there differs from the one asked for."""
    changed = [name for name in made_with | asked_for if made_with.get(name) != asked_for.get(name)]
    if changed:
        told = ", ".join(f"{flag(name)} {made_with.get(name)}, now {asked_for.get(name)}" for name in changed)
        raise InputError(
            f"{path} was made with other settings ({told}): give the same ones, --overwrite or another --out"
        )


def is_finished(plan: Plan) -> bool:
    return (plan.folder / "results.json").exists()


def check_folders(options: Options, runs: list[Plan]) -> None:
    """Raises InputError where a run is there already and --resume and --overwrite are not given, or --resume asks for
    other settings than a finished run's.
    """
    for plan in runs:
        if plan.folder.exists() and not plan.folder.is_dir():
            raise InputError(f"{plan.folder} is a file: give another --out")
        if plan.folder.exists() and any(plan.folder.iterdir()) and not (options.resume or options.overwrite):
            raise InputError(f"{plan.folder} holds a run: give --resume, --overwrite or another --out")
        if options.resume and is_finished(plan):
            path = plan.folder / "config.json"
            check_settings(path, read_json(path)["settings"], settings_of(options, plan))


class Progress(TypedDict):
    """How far a run has come, as a checkpoint has it."""

    step: int
    seconds: float
    evaluated: int  # the last step that was evaluated, -1 before
    best_accuracy: float
    best_step: int
    config: dict[str, Any]


def restore(
    checkpoints: files.Checkpoints, progress: Progress, state: lipsum.State, best: lipsum.Classifier
) -> tuple[Progress, lipsum.State, lipsum.Classifier]:
    """What the newest whole checkpoint holds, as host arrays; what is given, where there is none.

    The process that writes files reads it for all. Raises InputError where all are damaged, or naming the settings
    that are not those of `progress`.
    """
    empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), (state, best))
    arrays = empty

    def read() -> Progress:
        nonlocal arrays
        checkpoint = checkpoints.newest()
        if checkpoint is None:
            return progress
        made_with, asked_for = checkpoint.progress["config"], progress["config"]
        check_settings(checkpoints.folder, made_with["settings"], asked_for["settings"])
        if made_with["classes"] != asked_for["classes"]:
            raise InputError(
                f"{checkpoints.folder} was made with other classes: restore the data, or give another --out"
            )
        arrays = files.from_names(checkpoint.arrays, empty)
        return checkpoint.progress | {"config": progress["config"]}

    found = from_writer(read)
    if found["step"] == 0:  # the state of the start
        return found, state, best
    print(f"{checkpoints.folder}: going on from step {found['step']}")
    return found, *broadcast(arrays)


# ------------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Shared:
    """What the runs of one command on one reference share."""

    options: Options
    evaluator: evaluation.Evaluator
    guidance: Int[np.ndarray, "pool tokens"] | None

    @property
    def setup(self) -> opening.Setup:
        return self.evaluator.setup

    def second_moment(self, text_length: int) -> Float[np.ndarray, "dim dim"]:
        """C2 over the user's texts or 10,000 random ones, computed once for each length."""
        if text_length not in self._second_moments:
            found = lipsum.text_second_moment(self.setup.text, self.guidance, text_length)
            self._second_moments[text_length] = data.fetch(found)
        return self._second_moments[text_length]

    @cached_property
    def _second_moments(self) -> dict[int, Float[np.ndarray, "dim dim"]]:
        return {}

    def frozen(self, plan: Plan) -> lipsum.Frozen:
        options, setup = self.options, self.setup
        names = {field.name for field in dataclasses.fields(lipsum.Settings)}
        own = vars(options) | vars(plan) | {"weight": weight_of(options, plan.method)}
        settings = lipsum.Settings(**{name: value for name, value in own.items() if name in names})
        averages = lipsum.METHODS[plan.method].texts == "averaged"
        extra = (self.guidance, self.second_moment(plan.text_length) if averages else None)
        zero_shot, text = setup.over_seen(setup.zero_shot), setup.model.text
        return lipsum.Frozen(zero_shot, text, setup.context_head, setup.tau, settings, *data.place(extra, setup.mesh))

    @cached_property
    def probe(self) -> lipsum.Classifier:
        """LP: the zero-shot tower with the head trained to convergence on its features, without augmentation."""
        setup = self.setup
        features, labels = self.evaluator.predict([setup.zero_shot], setup.data.train).features, setup.data.train.labels
        head, steps = lipsum.linear_probe(features, labels, data.fetch(setup.zero_shot.head), data.fetch(setup.tau))
        print(f"linear probe: {int(steps)} steps of L-BFGS on {len(labels)} features")
        head = data.place(np.asarray(head), setup.mesh, self.options.fsdp)
        return lipsum.Classifier(setup.zero_shot.vision, head)

    def start(self, method: str) -> lipsum.Classifier:
        """Where the method starts."""
        zero_shot, start = self.setup.over_seen(self.setup.zero_shot), lipsum.METHODS[method].start
        if start == "probe":
            return self.probe
        return lipsum.Classifier(zero_shot.vision, 0 * zero_shot.head) if start == "zeros" else zero_shot


def fine_tune(shared: Shared, plan: Plan, signals: Signals) -> None:
    """One run from its start, or its checkpoint with --resume, to results.json.

    Raises Stopped, once the state is saved, where a signal came.
    """
    options, setup, folder = shared.options, shared.setup, plan.folder
    if data.writes_files():
        with files.reported(folder):
            if options.overwrite:
                files.delete(folder)
            folder.mkdir(parents=True, exist_ok=True)
    with files.Checkpoints(folder / "checkpoint") as checkpoints:
        progress, best = train(shared, plan, signals, checkpoints)
    splits = shared.evaluator.results([best])
    opening.save_classifier(folder / "best", setup, best)
    results = {
        "method": plan.method,
        "model": options.model,
        "data": options.data,
        "seed": plan.seed,
        "steps": progress["step"],
        "seconds": round(progress["seconds"], 2),
        "seconds_per_step": seconds_per_step(folder / "metrics.jsonl"),
        "settings": settings_of(options, plan),
        "selection": {"accuracy": progress["best_accuracy"], "step": progress["best_step"]},
        "splits": splits,
        "zero_shot": shared.evaluator.zero_shot_results,
        "skipped": sorted({path for paths in gathered(sorted(setup.data.train.skipped.paths)) for path in paths}),
    }
    if data.writes_files():
        files.write_json(folder / "results.json", results)


def begin(
    shared: Shared, plan: Plan, frozen: lipsum.Frozen, checkpoints: files.Checkpoints
) -> tuple[Progress, lipsum.State, lipsum.Classifier]:
    """Where a run begins or, with --resume, goes on: its state on the devices, its best classifier so far on the host.

    Raises InputError as `restore` does.
    """
    options, setup = shared.options, shared.setup
    classifier = shared.start(plan.method)
    state, best = lipsum.initial_state(frozen, classifier, lipsum.METHODS[plan.method].averaged), data.fetch(classifier)
    config = run_config(options, plan, setup.classes)
    progress: Progress = {
        "step": 0, "seconds": 0.0, "evaluated": -1, "best_accuracy": -1.0, "best_step": 0, "config": config,
    }  # fmt: skip
    if options.resume:
        progress, state, best = restore(checkpoints, progress, state, best)
    return progress, data.place(state, setup.mesh, options.fsdp), best


def train(
    shared: Shared, plan: Plan, signals: Signals, checkpoints: files.Checkpoints
) -> tuple[Progress, lipsum.Classifier]:
    """The steps of a run, with its evaluations: how far it came, and the selected classifier, over all classes.

    Raises Stopped, once the state is saved, where a signal came, and InputError where loss or gradient are not finite.
    """
    options, setup, mesh, folder = shared.options, shared.setup, shared.setup.mesh, plan.folder
    method, frozen, writes = lipsum.METHODS[plan.method], shared.frozen(plan), data.writes_files()
    last = plan.steps if method.loss else 0
    progress, state, best = begin(shared, plan, frozen, checkpoints)
    start, earlier_seconds = progress["step"], progress["seconds"]

    log_path = folder / "metrics.jsonl" if writes else Path(os.devnull)
    if writes:
        files.write_json(folder / "config.json", progress["config"])
        lines = lines_up_to(log_path, start)
        files.write_whole(log_path, lambda new: new.write_text("".join(lines), encoding="utf-8"))
    profiles = options.profile and writes
    key = jax.random.key(plan.seed)
    batches = data.training_batches(
        setup.data.train, frozen.zero_shot.vision.image_size, plan.batch_size, plan.seed, options.workers, start,
        options.augmentation, data.own_part(),
    )  # fmt: skip
    update = method.loss and lipsum.training_step(method.loss, data.shardings(state, mesh, options.fsdp))
    bar = tqdm(total=last, initial=start, desc=f"{plan.method} {folder.name}", unit="step", disable=not writes)

    def save(snapshot: lipsum.State) -> None:
        if writes:
            checkpoints.save(progress, files.by_name((snapshot, best)))

    shown = tensorboard(folder / "tensorboard", start) if options.tensorboard and writes else contextlib.nullcontext()
    with bar, shown as board, signals.deferred():
        began = time.perf_counter()
        log = Log(log_path, bar, board, plan.batch_size)
        for step in range(start, last + 1):
            evaluates = step > progress["evaluated"] and is_due(step, options.eval_every, last)
            saves = evaluates or (step > start and is_due(step, options.checkpoint_every, last))
            if step > start:
                if profiles and step - start == PROFILED[0]:
                    log.settle()
                    jax.profiler.start_trace(folder / "profile", create_perfetto_trace=True)
                batch, dispatched = data.shard_batch(next(batches), mesh), time.perf_counter()
                state, metrics = update(state, frozen, batch, key)
                if step == start + 1:  # the first call returns when the step is compiled
                    tqdm.write(describe_execution(shared, plan, time.perf_counter() - dispatched))
                log.add(step, metrics, saves or step == 1 or step % LOG_EVERY == 0)
                if profiles and step - start == PROFILED[-1]:
                    log.settle()
                    jax.profiler.stop_trace()
                checkpoints.check()
            received = signals.received(mesh, waits=saves)
            if not (saves or received):
                continue

            log.settle()  # a state that is not finite is not saved
            snapshot = data.fetch(state)
            progress |= {"step": step, "seconds": earlier_seconds + time.perf_counter() - began}
            save(snapshot)
            if received:
                raise Stopped(received)
            if evaluates:  # it may take minutes: what was saved just before is not lost by a signal
                with signals.deferred(False):
                    accuracy = shared.evaluator.selection_accuracy([state.evaluated])
                log.show({"selection_accuracy": accuracy}, step)
                progress |= {"evaluated": step}
                if accuracy > progress["best_accuracy"]:
                    progress |= {"best_accuracy": accuracy, "best_step": step}
                    best = snapshot.evaluated
                save(snapshot)
            log.start_clock(step)
    return progress, setup.over_all(data.place(best, mesh, options.fsdp))


def is_due(step: int, every: int, last: int) -> bool:
    return step == last or (step > 0 and step % every == 0)


def describe_execution(shared: Shared, plan: Plan, compile_seconds: float) -> str:
    """A line: where and how the steps of a run are computed."""
    options, setup = shared.options, shared.setup
    parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.zero_shot))
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s) of {jax.process_count()} process(es)"
    spread = "spread over them" if options.fsdp else "copied to each"
    parts = f" in {options.accumulate} parts" if options.accumulate > 1 else ""
    return (
        f"{plan.method} {plan.folder.name}: {devices}, mesh data={setup.mesh.size}, {options.precision}, "
        f"{parameters / 1e6:.1f} M parameters {spread}, {plan.batch_size // jax.device_count()} images a device"
        f"{parts}, compiled in {compile_seconds:.1f} s"
    )


# -------------------------------------------------------------------------------------------------------- command line


def read_guidance(path: Path, setup: opening.Setup, at_least: int) -> Int[np.ndarray, "pool tokens"]:
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
    for size in options.batch_size:
        data.device_mesh(size, options.accumulate)
    names = [field.name for field in dataclasses.fields(opening.Sources)]
    shifts = options.shifts
    if len(set(options.reference)) > 1:
        shifts = tuple(shift for shift in shifts if shift != reference)
    own = {"reference": reference, "shifts": shifts, "batch_size": max(options.batch_size)}
    sources = {name: getattr(options, name) for name in names} | own
    setup = opening.prepare(opening.Sources(**sources))
    config = setup.model.config
    for length in options.text_length:
        opening.check_text_length(length, config)
    draws = any(lipsum.METHODS[method].texts == "drawn" for method in options.method)
    at_least = max(options.num_texts) if draws else 1
    guidance = options.guidance and read_guidance(options.guidance, setup, at_least)
    return Shared(options, evaluation.Evaluator(setup), guidance)


def pretrain_options(options: Options) -> pretrain.Options:
    """What `--method clip` reads of the options. Raises InputError where it is not asked for alone."""
    if options.method != ("clip",) or len(options.seed) != 1:
        raise InputError("--method clip trains one model: give it alone, with one --seed")
    if jax.process_count() > 1:
        raise InputError("--method clip trains a tiny model in one process: start it once")
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


def describe(shared: Shared) -> str:
    """A line on the data."""
    options, setup, images = shared.options, shared.setup, shared.setup.data
    reports = ", ".join(f"{len(split)} {name}" for name, split in images.reports.items())
    seen = f" ({len(setup.seen)} seen)" if options.unseen else ""
    return (
        f"{options.model} on {options.data}: {len(setup.classes)} classes{seen}, {len(images.train)} images to train "
        f"on, {len(images.selection)} to select on, to report on: {reports}"
    )


def main(options: Options) -> None:
    """Pre-trains, or fine-tunes by every method on every seed and prints the table.

    Raises InputError, and Stopped where a signal came.
    """
    signals = Signals()
    with signals.heard():
        if "clip" in options.method:
            pretrain.main(pretrain_options(options), shlex.join(["python", *sys.argv]))
        else:
            fine_tune_all(options, signals)


def fine_tune_all(options: Options, signals: Signals) -> None:
    """What `main` does but for `--method clip`."""
    options = with_defaults(options)
    check_options(options)
    runs = plans(options)
    check_processes(options, runs)
    with contextlib.ExitStack() as locks:

        def enter_folders() -> list[bool]:
            """Whether each run is finished."""
            check_folders(options, runs)
            for plan in runs:
                locks.enter_context(files.locked(plan.folder))
            return [options.resume and is_finished(plan) for plan in runs]

        finished = dict(zip(runs, from_writer(enter_folders), strict=True))
        if options.data == "minidomain":
            print(
                "minidomain: 20 classes drawn in five domains, to see what fine-tuning costs and what Lipsum-FT saves\n"
                "real data: python train.py --model ViT-B/16 --data domainnet --data-root DIR --reference real"
            )
        prepared = {reference: prepare(options, reference) for reference in dict.fromkeys(options.reference)}
        for reference, shared in prepared.items():
            print(describe(shared))
            for plan in runs:
                if plan.reference == reference and finished[plan]:
                    print(f"{plan.folder} is finished: kept")
                elif plan.reference == reference:
                    fine_tune(shared, plan, signals)
    if not data.writes_files():
        return  # the table is read from files
    for reference in prepared:
        folders = [plan.folder for plan in runs if plan.reference == reference]
        evaluation.print_table(tables.read_results(folders))


def continuing_command(options: Options) -> str:
    """The command line that goes on where this one was stopped."""
    words = [word for word in sys.argv if word not in ("--overwrite", "--resume")]
    return shlex.join(["python", *words, *([] if "clip" in options.method else ["--resume"])])


def run(options: Options) -> int:
    """Of `main`: 0, or 2 for bad input, or 128 and the signal's number."""
    try:
        return exit_code(lambda: main(options))
    except Stopped as stopped:
        print(f"stopped by {signal.Signals(stopped.number).name}; to go on:\n  {continuing_command(options)}")
        return 128 + stopped.number


if __name__ == "__main__":
    arguments = tyro.cli(Options, prog="python train.py", config=(tyro.conf.FlagCreatePairsOff,))
    keep_freed_memory()
    if not jax.config.jax_compilation_cache_dir:  # the next run of the same sizes starts at once
        jax.config.update("jax_compilation_cache_dir", str(files.cache_folder() / "jax"))
    code = exit_code(lambda: connect(arguments)) or run(arguments)
    if code and jax.distributed.is_initialized():  # the usual way out waits for the other processes
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
