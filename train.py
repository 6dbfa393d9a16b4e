"""Fine-tunes a zero-shot CLIP on one domain and shows what that does to the others.

Paper: Lipsum-FT, https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --help` lists the
options.

A run has the folder OUT/METHOD/seed-SEED with config.json, metrics.jsonl, checkpoint/, best/ and
results.json. If an option has several values, the run's own follows in the folder's name.
"""

import contextlib
import importlib.metadata
import os
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

from support.errors import InputError, exit_code, quiet_interrupts, warn

if __name__ == "__main__":
    quiet_interrupts()

import jax
import numpy as np
from tqdm import tqdm

import data
import eval as evaluation
import lipsum
from support import devices, disk
from support.report import tables
from support.report.labels import describe_method
from support.run import checks, options
from support.run.checkpoints import Checkpoints, from_names
from support.run.finished import delete_run, save_classifier
from support.run.logs import Log, seconds_per_step
from support.run.options import Command, Run
from support.run.processes import (
    Signals,
    Stopped,
    broadcast,
    connect,
    failing_together,
    flush_and_exit,
    from_main_process,
    keep_freed_memory,
)
from support.run.setup import Setup, open_setups

# --------------------------------------------------------------------------- the start of a run


class Progress(TypedDict):
    """How far a run has come, as its checkpoints store it."""

    step: int
    seconds: float
    evaluated: int  # the last step that was evaluated, -1 before
    best_accuracy: float
    best_step: int


def config_of(run: Run, setup: Setup) -> dict[str, Any]:
    """The content of config.json: every option, what was read, versions, devices."""
    libraries = ("jax", "jaxlib", "equinox", "optax", "grain")
    return {
        "method": run.method,
        "seed": run.seed,
        "settings": options.to_json(run.sources, run.settings),
        "execution": options.to_json(run.execution),
        "classes": list(setup.classes),
        "content": setup.content,
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def freeze(run: Run, setup: Setup) -> lipsum.Frozen:
    """Returns what the run never changes, on the devices."""
    method = lipsum.METHODS[run.method]
    guidance_ids = second_moment = None
    if run.settings.guidance:
        guidance_ids = setup.model.read_guidance(run.settings.guidance)
    if method.guidance == "averaged" and guidance_ids is not None:
        second_moment = lipsum.text_second_moment(setup.model.text, guidance_ids, 0)
    elif method.guidance == "averaged":
        second_moment = setup.model.second_moment(run.settings.text_length)
    settings = jax.tree.map(np.float32, run.settings)
    arrays = settings, guidance_ids, devices.fetch(second_moment)
    settings, guidance_ids, second_moment = devices.place(arrays, setup.mesh)
    return lipsum.Frozen(
        zero_shot=setup.restrict_to_seen(setup.zero_shot),
        text=setup.model.clip.text,
        tau=setup.model.tau,
        settings=settings,
        computation=run.execution,
        context_head=setup.context_head if method.guidance == "fixed" else None,
        guidance_ids=guidance_ids,
        second_moment=second_moment,
    )


def train_probe(setup: Setup) -> lipsum.Classifier:
    """LP: the zero-shot tower with the head trained to convergence on its unaugmented features."""
    train = setup.data.train
    features = evaluation.predict_split(setup, [setup.zero_shot], train).features
    start, tau = devices.fetch((setup.zero_shot.head, setup.model.tau))
    head, steps = lipsum.linear_probe(features, train.labels, start, tau)
    print(f"linear probe: {int(steps)} steps of L-BFGS on {len(train)} features")
    head = devices.place(np.asarray(head), setup.mesh, setup.execution.fsdp)
    return lipsum.Classifier(setup.zero_shot.vision, head)


def starting_classifiers(
    setup: Setup, methods: Sequence[lipsum.Method]
) -> dict[str, lipsum.Classifier]:
    """Returns the classifiers at which the methods start, by `Method.start`."""
    zero_shot = setup.restrict_to_seen(setup.zero_shot)
    zeros = lipsum.Classifier(zero_shot.vision, 0 * zero_shot.head)
    starts = {"zero-shot": zero_shot, "zeros": zeros}
    if any(method.start == "probe" for method in methods):
        starts["probe"] = train_probe(setup)
    return starts


def restore(
    checkpoints: Checkpoints, progress: Progress, state: lipsum.State, best: lipsum.Classifier
) -> tuple[Progress, lipsum.State, lipsum.Classifier]:
    """Restores the newest intact checkpoint as host arrays.

    Returns the arguments if there is none. Process 0 reads it for all. Raises InputError if all
    checkpoints are damaged.
    """
    empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), (state, best))
    arrays = empty

    def read() -> Progress:
        nonlocal arrays
        checkpoint = checkpoints.newest()
        if checkpoint is None:
            return progress
        arrays = from_names(checkpoint.arrays, empty)
        return checkpoint.progress

    found = from_main_process(read)
    if found["step"] == 0:
        return progress, state, best
    print(f"{checkpoints.folder}: going on from step {found['step']}")
    return found, *broadcast(arrays)


# ------------------------------------------------------------------------------------- one run


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something happens after a step that happens after `every` steps and the last."""
    return step == last or (step > 0 and step % every == 0)


def train(
    run: Run,
    setup: Setup,
    start: lipsum.Classifier,
    signals: Signals,
    checkpoints: Checkpoints,
    resume: bool,
) -> tuple[Progress, lipsum.Classifier]:
    """The steps of a run, with evaluations and checkpoints.

    Returns the selected classifier, over all classes. Raises Stopped, once the state is saved, if a
    signal came, and InputError if loss or gradient are not finite.
    """
    settings, execution = run.settings, run.execution
    method = lipsum.METHODS[run.method]
    frozen = freeze(run, setup)
    state = lipsum.initial_state(method, frozen, start)
    best = devices.fetch(start)
    progress = Progress(step=0, seconds=0.0, evaluated=-1, best_accuracy=-1.0, best_step=0)
    if resume:
        progress, state, best = restore(checkpoints, progress, state, best)
    if devices.is_main_process():
        disk.write_json(run.folder / "config.json", config_of(run, setup))
    state = devices.place(state, setup.mesh, execution.fsdp)
    first, earlier_seconds = progress["step"], progress["seconds"]
    last = settings.steps if method.trained else 0
    key = jax.random.key(run.seed)
    update = lipsum.training_step(method, devices.shardings(state, setup.mesh, execution.fsdp))
    batches = data.training_batches(
        setup.data.train,
        setup.zero_shot.vision.preparation,
        settings.batch_size,
        run.seed,
        execution.workers,
        first,
        settings.augmentation,
        devices.own_part(),
    )

    def advance(step: int) -> lipsum.State:
        """Makes one step, which is number `step`, and returns the new state."""
        batch = devices.shard_batch(next(batches), setup.mesh)
        started = time.perf_counter()
        new_state, metrics = update(state, frozen, batch, key)
        if step == first + 1:  # this call compiles the step
            jax.block_until_ready(new_state)
            tqdm.write(describe_execution(run, setup, time.perf_counter() - started))
        log.add(step, metrics)
        checkpoints.check()
        return new_state

    def save(step: int) -> None:
        """Saves the state after `step` steps, and the best classifier so far."""
        progress["step"], progress["seconds"] = step, earlier_seconds + log.seconds()
        checkpoints.save(progress, (snapshot, best))

    with open_log(run, first, last) as log, signals.deferred():
        for step in range(first, last + 1):
            evaluates = step > progress["evaluated"] and is_due(step, settings.eval_every, last)
            is_saved = step > first and is_due(step, execution.checkpoint_every, last)
            saves = evaluates or is_saved
            received = signals.received(setup.mesh, waits=saves)
            if saves or received:
                log.settle(written=saves)  # a state that is not finite is not saved
                snapshot = devices.fetch(state)
                # Before the evaluation, too: it may take minutes, in which a signal loses nothing.
                save(step)
                if received:
                    raise Stopped(received)
                if evaluates:
                    with signals.deferred(False):
                        accuracy = evaluation.selection_accuracy(setup, [state.evaluated])
                    log.show(step, {"selection_accuracy": accuracy})
                    progress["evaluated"] = step
                    if accuracy > progress["best_accuracy"]:
                        progress["best_accuracy"], progress["best_step"] = accuracy, step
                        best = snapshot.evaluated
                    save(step)
                log.start_clock(step)
            if step < last:
                state = advance(step + 1)
    return progress, setup.extend_to_all(devices.place(best, setup.mesh, execution.fsdp))


def open_log(run: Run, first: int, last: int) -> Log:
    """Opens the log of a run, which process 0 shows and writes."""
    is_main = devices.is_main_process()
    return Log(
        f"{run.method} {run.folder.name}",
        first,
        last,
        run.settings.batch_size,
        folder=run.folder if is_main else None,
        shown=is_main,
        tensorboard=run.execution.tensorboard,
        profile=run.execution.profile,
    )


def fine_tune(
    run: Run,
    setup: Setup,
    start: lipsum.Classifier,
    zero_shot: Mapping[str, evaluation.Predictions],
    signals: Signals,
    resume: bool,
) -> None:
    """One run from its start, or with `resume` from its checkpoint, to results.json.

    Raises like `train`.
    """
    if devices.is_main_process() and not resume:
        delete_run(run.folder)
    with Checkpoints(run.folder / "checkpoint", devices.is_main_process()) as checkpoints:
        progress, best = train(run, setup, start, signals, checkpoints, resume)
    found = evaluation.predict_reports(setup, [best])
    save_classifier(run.folder / "best", setup, best)
    content = dict(setup.content)
    if guidance := run.settings.guidance:
        content["guidance"] = zlib.crc32(setup.model.read_guidance(guidance).tobytes())
    results = {
        "method": run.method,
        **describe_method(run.method),
        "model": run.sources.model,
        "data": run.sources.data,
        "seed": run.seed,
        "steps": progress["step"],
        "seconds": round(progress["seconds"], 2),
        "seconds_per_step": seconds_per_step(run.folder / "metrics.jsonl"),
        "settings": options.read_settings(run),
        "content": content,
        "selection": {"accuracy": progress["best_accuracy"], "step": progress["best_step"]},
        "splits": evaluation.results_of(setup, zero_shot, found),
        "zero_shot": evaluation.results_of(setup, zero_shot, zero_shot),
    }
    if devices.is_main_process():
        disk.write_json(run.folder / "results.json", results)


# -------------------------------------------------------------------------------- command line


def describe_setup(setup: Setup) -> str:
    """Returns a line on the data."""
    sources, images = setup.sources, setup.data
    reports = ", ".join(f"{len(split)} {name}" for name, split in images.reports.items())
    seen = f" ({len(setup.seen)} seen)" if sources.unseen else ""
    return (
        f"{sources.model} on {sources.data}: {len(setup.classes)} classes{seen}, "
        f"{len(images.train)} images to train on, {len(images.selection)} to select on, "
        f"to report on: {reports}"
    )


def describe_execution(run: Run, setup: Setup, first_seconds: float) -> str:
    """Returns a line on where and how the steps of a run are computed."""
    execution = run.execution
    leaves = jax.tree.leaves(setup.zero_shot)
    millions = sum(leaf.size for leaf in leaves) / 1e6
    kind = jax.devices()[0].device_kind
    whole = all(leaf.sharding.is_fully_replicated for leaf in leaves)  # --fsdp splits large ones
    spread = "copied to each" if whole else "spread over them"
    parts = f" in {execution.accumulate} parts" if execution.accumulate > 1 else ""
    return (
        f"{run.method} {run.folder.name}: {jax.device_count()} {kind} device(s) of "
        f"{jax.process_count()} process(es), mesh data={setup.mesh.size}, {execution.precision}, "
        f"{millions:.1f} M parameters {spread}, "
        f"{run.settings.batch_size // jax.device_count()} images a device{parts}, "
        f"first step in {first_seconds:.1f} s"
    )


MINIDOMAIN = """\
minidomain: 20 classes drawn in five domains, to see what fine-tuning costs and what Lipsum-FT saves
real data: python train.py --model ViT-B/16 --data domainnet --data-root DIR --reference real"""


def main(command: Command) -> None:
    """Fine-tunes by every method on every seed and prints the table.

    Raises InputError, and Stopped after a signal.
    """
    signals = Signals()
    with (
        failing_together(),
        lack_of_memory_named(command),
        signals.heard(),
        contextlib.ExitStack() as locks,
    ):
        command = options.resolved(command)
        runs = options.runs(command)
        checks.check_options(command, runs)

        def claim_folders() -> None:
            checks.check_folders(command, runs)
            for run in runs:
                locks.enter_context(disk.locked(run.folder))

        from_main_process(claim_folders)
        if command.protocol:
            print(options.describe_protocol(command))
        if command.sources.data == "minidomain":
            print(MINIDOMAIN)
        groups = [
            (setup, [run for run in runs if run.sources == setup.sources])
            for setup in open_setups(
                list(dict.fromkeys(run.sources for run in runs)),
                command.execution,
                max(run.settings.batch_size for run in runs),
            )
        ]
        for setup, own in groups:
            checks.check_setup(setup, own, command.resume)
        for line in checks.warnings_for_options(command, runs):
            warn(line)
        for setup, own in groups:
            fine_tune_all(own, setup, signals, command.resume)
    if devices.is_main_process():  # the table is read from files
        for _, own in groups:
            tables.print_accuracies(tables.read_results([run.folder for run in own]))


@contextlib.contextmanager
def lack_of_memory_named(command: Command) -> Iterator[None]:
    """Turns a lack of memory in the block into an InputError, with the options that may help."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        execution = command.execution
        unused = {
            f"--batch-size below {command.settings.batch_size}": command.settings.batch_size > 1,
            "--accumulate": execution.accumulate == 1,
            "--remat": not execution.remat,
            "--fsdp": not execution.fsdp and jax.device_count() > 1,
            "--precision bfloat16": execution.precision != "bfloat16",
        }
        advice = ", ".join(option for option, helps in unused.items() if helps)
        peak = f"a peak of {devices.peak_memory() / 2**30:.1f} GiB"
        raise InputError(f"out of memory after {peak}: try {advice}") from error


def fine_tune_all(runs: Sequence[Run], setup: Setup, signals: Signals, resume: bool) -> None:
    """Makes the runs on one reference; with `resume` only those that are not finished."""
    print(describe_setup(setup))
    for line in checks.warnings_for_setup(setup, runs):
        warn(line)
    finished = from_main_process(lambda: [resume and run.is_finished for run in runs])
    unfinished = [run for run, ended in zip(runs, finished, strict=True) if not ended]
    for run in runs:
        if run not in unfinished:
            print(f"{run.folder} is finished: kept")
    if unfinished:
        zero_shot = evaluation.predict_reports(setup, [setup.zero_shot])
        starts = starting_classifiers(setup, [lipsum.METHODS[run.method] for run in unfinished])
        for run in unfinished:
            start = starts[lipsum.METHODS[run.method].start]
            fine_tune(run, setup, start, zero_shot, signals, resume)


def exit_code_of(command: Command) -> int:
    """Runs `main`. Returns 0, or 2 for bad input, or 128 and the signal's number."""
    try:
        return exit_code(lambda: main(command), logs=True)
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
        # The next run of the same sizes starts at once.
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            jax.config.update("jax_compilation_cache_dir", str(disk.cache_folder() / "jax"))
        connect(commands[0].cluster)

    return exit_code(start, logs=True) or exit_code_of(commands[0])


if __name__ == "__main__":
    code = command_line(sys.argv[1:])
    if code and jax.distributed.is_initialized():
        flush_and_exit(code)
    sys.exit(code)
