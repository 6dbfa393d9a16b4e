"""Fine-tunes a zero-shot CLIP on one domain and shows what that does to the others.

Paper: Lipsum-FT, https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --help` lists every option.

A run has the folder OUT/METHOD/seed-SEED with config.json, metrics.jsonl, checkpoint/, best/ and results.json. If an
option has several values, the run's own follows in the folder's name.
"""

import contextlib
import functools
import importlib.metadata
import os
import shlex
import signal
import sys
import time
from typing import Any, TypedDict

from support import devices
from support.errors import InputError, exit_code, quiet_interrupts, read_json

if __name__ == "__main__":
    quiet_interrupts()

import jax
import numpy as np
from tqdm import tqdm

import data
import eval as evaluation
import lipsum
from support import disk, errors
from support.report import tables
from support.run import options
from support.run import setup as opening
from support.run.checkpoints import Checkpoints, from_names
from support.run.logs import Log, seconds_per_step
from support.run.options import Command, Run
from support.run.processes import (
    Signals,
    Stopped,
    broadcast,
    check_processes,
    connect,
    from_writer,
    keep_freed_memory,
)

# ------------------------------------------------------------------------------------------------------- runs on disk


def run_config(run: Run, setup: opening.Setup) -> dict[str, Any]:
    """The content of config.json: every option, what was read, the versions of the libraries, the devices."""
    return {
        "method": run.method,
        "seed": run.seed,
        "settings": options.flat(run.sources, run.settings),
        "execution": options.flat(run.execution),
        **setup.read,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "equinox", "optax", "grain")
        },
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def is_finished(run: Run) -> bool:
    """Whether the run has its last file."""
    return (run.folder / "results.json").exists()


def check_folders(command: Command, runs: list[Run]) -> None:
    """Raises InputError if a run is there already and neither --resume nor --overwrite is given, or if --resume asks
    for other settings than a finished run's.
    """
    for run in runs:
        if run.folder.exists() and not run.folder.is_dir():
            raise InputError(f"{run.folder} is a file: give another --out")
        if (
            run.folder.exists()
            and any(run.folder.iterdir())
            and not (command.resume or command.overwrite)
        ):
            raise InputError(
                f"{run.folder} holds a run: give --resume, --overwrite or another --out"
            )
        if command.resume and is_finished(run):
            path = run.folder / "config.json"
            options.check_unchanged(run, path, read_json(path))


class Progress(TypedDict):
    """How far a run has come, as its checkpoints store it."""

    step: int
    seconds: float
    evaluated: int  # the last step that was evaluated, -1 before
    best_accuracy: float
    best_step: int
    config: dict[str, Any]


def restore(
    run: Run,
    checkpoints: Checkpoints,
    progress: Progress,
    state: lipsum.State,
    best: lipsum.Classifier,
) -> tuple[Progress, lipsum.State, lipsum.Classifier]:
    """Restores the newest intact checkpoint as host arrays, or returns the arguments unchanged if there is none.

    Process 0 reads it for all. Raises InputError if all are damaged, or if the run has changed since.
    """
    arrays = empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), (state, best))

    def read() -> Progress:
        nonlocal arrays
        checkpoint = checkpoints.newest()
        if checkpoint is None:
            return progress
        config = checkpoint.progress["config"]
        options.check_unchanged(run, checkpoints.folder, config)
        options.check_read(checkpoints.folder, config, progress["config"])
        arrays = from_names(checkpoint.arrays, empty)
        return checkpoint.progress | {"config": progress["config"]}

    found = from_writer(read)
    if found["step"] == 0:
        return progress, state, best
    print(f"{checkpoints.folder}: going on from step {found['step']}")
    return found, *broadcast(arrays)


# ------------------------------------------------------------------------------------------------------------- one run


def freeze(run: Run, setup: opening.Setup) -> lipsum.Frozen:
    """What the run never changes, on the devices."""
    settings = run.settings
    texts = lipsum.METHODS[run.method].texts
    guidance = settings.guidance and opening.read_guidance(settings.guidance, setup)
    second_moment = None
    if texts == "averaged":
        second_moment = opening.second_moment(setup, settings.text_length, settings.guidance)
    zero_shot = setup.over_seen(setup.zero_shot)
    arrays = jax.tree.map(np.float32, settings), guidance, second_moment
    settings, guidance, second_moment = devices.place(arrays, setup.mesh)
    return lipsum.Frozen(
        zero_shot,
        setup.model.text,
        setup.context_head,
        setup.tau,
        settings,
        run.execution,
        guidance,
        second_moment,
    )


@functools.cache
def train_probe(evaluator: evaluation.Evaluator) -> lipsum.Classifier:
    """LP: the zero-shot tower with the head trained to convergence on its features, without augmentation."""
    setup = evaluator.setup
    features = evaluator.predict([setup.zero_shot], setup.data.train).features
    labels = setup.data.train.labels
    head, steps = lipsum.linear_probe(
        features, labels, devices.fetch(setup.zero_shot.head), devices.fetch(setup.tau)
    )
    print(f"linear probe: {int(steps)} steps of L-BFGS on {len(labels)} features")
    return lipsum.Classifier(
        setup.zero_shot.vision, devices.place(np.asarray(head), setup.mesh, setup.execution.fsdp)
    )


def begin(
    run: Run,
    evaluator: evaluation.Evaluator,
    frozen: lipsum.Frozen,
    checkpoints: Checkpoints,
    resume: bool,
) -> tuple[Progress, lipsum.State, lipsum.Classifier]:
    """The start of a run or, with `resume`, its continuation: the state on devices, the best classifier on the host.

    Raises InputError like `restore`.
    """
    setup = evaluator.setup
    method = lipsum.METHODS[run.method]
    classifier = train_probe(evaluator) if method.start == "probe" else frozen.zero_shot
    if method.start == "zeros":
        classifier = lipsum.Classifier(classifier.vision, 0 * classifier.head)
    state = lipsum.initial_state(frozen, classifier, method.averaged)
    best = devices.fetch(classifier)
    progress: Progress = {
        "step": 0, "seconds": 0.0, "evaluated": -1, "best_accuracy": -1.0, "best_step": 0,
        "config": run_config(run, setup),
    }  # fmt: skip
    if resume:
        progress, state, best = restore(run, checkpoints, progress, state, best)
    return progress, devices.place(state, setup.mesh, run.execution.fsdp), best


def _is_due(step: int, every: int, last: int) -> bool:
    return step == last or (step > 0 and step % every == 0)


def train(
    run: Run,
    evaluator: evaluation.Evaluator,
    signals: Signals,
    checkpoints: Checkpoints,
    resume: bool,
) -> tuple[Progress, lipsum.Classifier]:
    """The steps of a run, with evaluations and checkpoints. Returns the selected classifier, over all classes.

    Raises Stopped, once the state is saved, if a signal came, and InputError if loss or gradient are not finite.
    """
    setup = evaluator.setup
    settings = run.settings
    method = lipsum.METHODS[run.method]
    frozen = freeze(run, setup)
    progress, state, best = begin(run, evaluator, frozen, checkpoints, resume)
    first = progress["step"]
    last = settings.steps if method.trained else 0
    earlier_seconds = progress["seconds"]
    if devices.is_main_process():
        disk.write_json(run.folder / "config.json", progress["config"])
    key = jax.random.key(run.seed)
    update = lipsum.training_step(
        method.loss, devices.shardings(state, setup.mesh, run.execution.fsdp)
    )
    batches = data.training_batches(
        setup.data.train, setup.zero_shot.vision.image_size, settings.batch_size, run.seed, run.execution.workers,
        first, settings.augmentation, devices.own_part(),
    )  # fmt: skip

    with open_log(run, first, last) as log, signals.deferred():
        for step in range(first, last + 1):
            evaluates = step > progress["evaluated"] and _is_due(step, settings.eval_every, last)
            saves = evaluates or (
                step > first and _is_due(step, run.execution.checkpoint_every, last)
            )
            if step > first:
                batch = devices.shard_batch(next(batches), setup.mesh)
                dispatched = time.perf_counter()
                state, metrics = update(state, frozen, batch, key)
                if step == first + 1:  # the first call returns when the step is compiled
                    tqdm.write(describe_execution(run, setup, time.perf_counter() - dispatched))
                log.add(step, metrics, written=saves)
                checkpoints.check()
            received = signals.received(setup.mesh, waits=saves)
            if not (saves or received):
                continue

            log.settle()  # a state that is not finite is not saved
            snapshot = devices.fetch(state)
            progress["step"], progress["seconds"] = step, earlier_seconds + log.seconds()
            checkpoints.save(progress, (snapshot, best))
            if received:
                raise Stopped(received)
            if (
                evaluates
            ):  # it may take minutes: a signal in it loses nothing of what was just saved
                with signals.deferred(False):
                    accuracy = evaluator.selection_accuracy([state.evaluated])
                log.show(step, {"selection_accuracy": accuracy})
                progress["evaluated"] = step
                if accuracy > progress["best_accuracy"]:
                    progress["best_accuracy"], progress["best_step"] = accuracy, step
                    best = snapshot.evaluated
                checkpoints.save(progress, (snapshot, best))
            log.start_clock(step)
    return progress, setup.over_all(devices.place(best, setup.mesh, run.execution.fsdp))


def open_log(run: Run, first: int, last: int) -> Log:
    """The log of a run, which process 0 shows and writes."""
    writes = devices.is_main_process()
    return Log(
        f"{run.method} {run.folder.name}", first, last, run.settings.batch_size, run.folder if writes else None, writes,
        run.execution.tensorboard, run.execution.profile,
    )  # fmt: skip


def fine_tune(run: Run, evaluator: evaluation.Evaluator, signals: Signals, resume: bool) -> None:
    """One run from its start, or with `resume` from its checkpoint, to results.json. Raises like `train`."""
    setup = evaluator.setup
    if devices.is_main_process():
        with disk.reported(run.folder):
            if not resume:
                disk.delete(run.folder)
            run.folder.mkdir(parents=True, exist_ok=True)
    with Checkpoints(run.folder / "checkpoint", devices.is_main_process()) as checkpoints:
        progress, best = train(run, evaluator, signals, checkpoints, resume)
    splits = evaluator.results([best])
    opening.save_classifier(run.folder / "best", setup, best)
    results = {
        "method": run.method,
        **tables.names(run.method),
        "model": run.sources.model,
        "data": run.sources.data,
        "seed": run.seed,
        "steps": progress["step"],
        "seconds": round(progress["seconds"], 2),
        "seconds_per_step": seconds_per_step(run.folder / "metrics.jsonl"),
        "settings": options.read_settings(run),
        "selection": {"accuracy": progress["best_accuracy"], "step": progress["best_step"]},
        "splits": splits,
        "zero_shot": evaluator.zero_shot_results,
    }
    if devices.is_main_process():
        disk.write_json(run.folder / "results.json", results)


# -------------------------------------------------------------------------------------------------------- command line


def describe(setup: opening.Setup) -> str:
    """A line on the data."""
    sources = setup.sources
    images = setup.data
    reports = ", ".join(f"{len(split)} {name}" for name, split in images.reports.items())
    seen = f" ({len(setup.seen)} seen)" if sources.unseen else ""
    return (
        f"{sources.model} on {sources.data}: {len(setup.classes)} classes{seen}, {len(images.train)} images to train "
        f"on, {len(images.selection)} to select on, to report on: {reports}"
    )


def describe_execution(run: Run, setup: opening.Setup, compile_seconds: float) -> str:
    """A line on where and how the steps of a run are computed."""
    execution = run.execution
    parameters = sum(leaf.size for leaf in jax.tree.leaves(setup.zero_shot))
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind} device(s) of {jax.process_count()} process(es)"
    spread = "spread over them" if execution.fsdp else "copied to each"
    parts = f" in {execution.accumulate} parts" if execution.accumulate > 1 else ""
    return (
        f"{run.method} {run.folder.name}: {devices}, mesh data={setup.mesh.size}, {execution.precision}, "
        f"{parameters / 1e6:.1f} M parameters {spread}, {run.settings.batch_size // jax.device_count()} images a device"
        f"{parts}, compiled in {compile_seconds:.1f} s"
    )


def open_evaluator(command: Command, runs: list[Run]) -> evaluation.Evaluator:
    """Loads and checks what runs on one reference share. Raises InputError before any long work."""
    for size in command.settings.batch_size:
        devices.device_mesh(size, command.execution.accumulate)
    setup = opening.prepare(runs[0].sources, command.execution, max(command.settings.batch_size))
    for run in runs:
        opening.check_texts(run, setup)
    return evaluation.Evaluator(setup)


def main(command: Command) -> None:
    """Fine-tunes by every method on every seed and prints the table. Raises InputError, and Stopped after a signal."""
    signals = Signals()
    with signals.heard(), contextlib.ExitStack() as locks:
        command = options.resolved(command)
        options.check(command)
        runs = list(options.runs(command))
        check_processes(command)

        def enter_folders() -> list[bool]:
            """Whether each run is finished."""
            check_folders(command, runs)
            for run in runs:
                locks.enter_context(disk.locked(run.folder))
            return [command.resume and is_finished(run) for run in runs]

        finished = dict(zip([run.folder for run in runs], from_writer(enter_folders), strict=True))
        if command.protocol:
            print(options.protocol_lines(command))
        if command.sources.data == "minidomain":
            print(
                "minidomain: 20 classes drawn in five domains, to see what fine-tuning costs and what Lipsum-FT saves\n"
                "real data: python train.py --model ViT-B/16 --data domainnet --data-root DIR --reference real"
            )
        groups: dict[str, list[Run]] = {}
        for run in runs:
            groups.setdefault(run.sources.reference, []).append(run)
        evaluators = {
            reference: open_evaluator(command, group) for reference, group in groups.items()
        }
        for line in options.doubts(command):
            errors.warn(line)
        for reference, group in groups.items():
            setup = evaluators[reference].setup
            print(describe(setup))
            for line in opening.doubts(setup, group):
                errors.warn(line)
            for run in group:
                if finished[run.folder]:
                    print(f"{run.folder} is finished: kept")
                else:
                    fine_tune(run, evaluators[reference], signals, command.resume)
    if devices.is_main_process():  # the table is read from files
        for group in groups.values():
            tables.print_accuracies(tables.read_results([run.folder for run in group]))


def exit_code_of(command: Command) -> int:
    """Runs `main`. Returns 0, or 2 for bad input, or 128 and the signal's number."""
    try:
        return exit_code(lambda: main(command))
    except Stopped as stopped:
        words = [word for word in sys.argv if word not in ("--overwrite", "--resume")]
        again = shlex.join(["python", *words, "--resume"])
        print(f"stopped by {signal.Signals(stopped.number).name}; to go on:\n  {again}")
        return 128 + stopped.number


def command_line(arguments: list[str]) -> int:
    """Joins the processes of the run, and runs the command. Returns the exit code."""
    commands: list[Command] = []

    def start() -> None:
        commands.append(options.parse(arguments))
        keep_freed_memory()
        if (
            "JAX_COMPILATION_CACHE_DIR" not in os.environ
        ):  # the next run of the same sizes starts at once
            jax.config.update("jax_compilation_cache_dir", str(disk.cache_folder() / "jax"))
        connect(commands[0].cluster)

    return exit_code(start) or exit_code_of(commands[0])


if __name__ == "__main__":
    code = command_line(sys.argv[1:])
    if code and jax.distributed.is_initialized():  # the usual way out waits for the other processes
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
