"""Fine-tunes a zero-shot CLIP on one domain and shows what that does to the others.

Paper: Lipsum-FT, https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --help` lists every option.

Each run has the folder OUT/METHOD/seed-S: config.json, metrics.jsonl, checkpoint/, best/ and results.json. Where an
option has several values, the run's own follows in the folder's name.
"""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

import clip
import data
import eval as evaluation
import files
import lipsum
import pretrain
import tables
from clip import InputError, unknown
from options import (
    PROCESSES,
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

LOG_EVERY = 10  # steps

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
            check_settings(path, clip.read_json(path)["settings"], settings_of(options, plan))


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

    found = data.from_writer(read)
    if found["step"] == 0:  # the state of the start
        return found, state, best
    print(f"{checkpoints.folder}: going on from step {found['step']}")
    return found, *data.broadcast(arrays)


# ------------------------------------------------------------------------------------------------------------- signals


class Stopped(Exception):
    """The run ends because of the signal `number`; what `--resume` needs is on the disk."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Signals:
    """SIGTERM and SIGINT. They raise `Stopped` at once but where they are deferred, and there the second one does."""

    def __init__(self) -> None:
        self._received = 0
        self._deferred = False
        self._of_all: Int[Array, ""] | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block, they come here."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self._received or not self._deferred:
            raise Stopped(number)
        self._received = number

    @contextlib.contextmanager
    def deferred(self, deferred: bool = True) -> Iterator[None]:
        """Within the block, signals wait to be asked for, or with False do not."""
        before, self._deferred = self._deferred, deferred
        try:
            if self._received and not deferred:
                raise Stopped(self._received)
            yield
        finally:
            self._deferred = before

    def received(self, mesh: Mesh, waits: bool) -> int:
        """The signal that came to any process, or 0. Asked by all after each step, it answers all the same.

        Of several processes the answer is a step old unless it `waits` for the devices.
        """
        if jax.process_count() == 1:
            return self._received
        before, self._of_all = self._of_all, data.largest_anywhere(self._received, mesh)
        answer = self._of_all if waits else before
        return 0 if answer is None else int(answer)


# ------------------------------------------------------------------------------------------------------------- figures


class Log:
    """What a run tells while it trains: the bar's figures, lines of metrics.jsonl, and with a board TensorBoard's.

    Figures are read a step late: waiting for the step just dispatched would leave the devices idle.
    """

    def __init__(self, path: Path, bar: tqdm, board: Any, batch_size: int) -> None:
        self.path, self.bar, self.board, self.batch_size = path, bar, board, batch_size
        self._pending: tuple[int, lipsum.Metrics, bool] | None = None
        self.start_clock(bar.n)

    def start_clock(self, step: int) -> None:
        """What comes before, an evaluation say, does not count as time of the steps after `step`."""
        self._timed_step, self._timed_at = step, time.perf_counter()

    def add(self, step: int, metrics: lipsum.Metrics, logged: bool) -> None:
        """A step just dispatched. Raises as `settle` does of the one before."""
        self.settle()
        self._pending = step, metrics, logged

    def settle(self) -> None:
        """Waits for the last step added, and writes its line where it is logged.

        Raises InputError naming the step where loss or gradient are not finite, or where the line cannot be written.
        """
        if self._pending is None:
            return
        (step, metrics, logged), self._pending = self._pending, None
        values = {"loss": 0.0} | {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.bar.update()
        finite = np.isfinite(values["loss"]) and np.isfinite(values["gradient_norm"])
        if logged or not finite:
            seconds = (time.perf_counter() - self._timed_at) / max(step - self._timed_step, 1)
            self._write(step, values, seconds)
            self.start_clock(step)
        if not finite:
            raise InputError(
                f"at step {step} the loss is {values['loss']}, the gradient's norm {values['gradient_norm']}: give a "
                f"lower --learning-rate and another --out; {self.path.parent} keeps what was saved before"
            )

    def _write(self, step: int, values: dict[str, float], seconds_per_step: float) -> None:
        speed = {"images_per_second": self.batch_size / seconds_per_step, "seconds_per_step": seconds_per_step}
        values = values | {name: round(value, 4) for name, value in speed.items()}
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['images_per_second']:.0f} images/s")
        with files.reported(self.path):
            with open(self.path, "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **values}) + "\n")
            self.show({name: value for name, value in values.items() if name != "step"}, step)

    def show(self, values: dict[str, float], step: int) -> None:
        """On the board, where there is one."""
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def tensorboard(folder: Path, start: int) -> Any:
    """A writer of TensorBoard's event files; what it wrote before, of steps after `start`, is dropped."""
    from tensorboardX import SummaryWriter  # needs the extra; everything else does without

    return SummaryWriter(str(folder), purge_step=start + 1)


def lines_up_to(path: Path, last_step: int) -> list[str]:
    """The whole lines of a metrics.jsonl, where there is one, that a checkpoint of `last_step` has behind it."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # a killed run may leave half a line
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
    return kept


def seconds_per_step(log_path: Path) -> float | None:
    """The median over the logged steps, without those that waited for the compiler; None where there are too few."""
    lines = [json.loads(line) for line in lines_up_to(log_path, sys.maxsize)]
    seconds = [line["seconds_per_step"] for line in lines if line["step"] > LOG_EVERY]
    return statistics.median(seconds) if seconds else None


# ------------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Shared:
    """What the runs of one command on one reference share."""

    options: Options
    setup: evaluation.Setup
    guidance: Int[np.ndarray, "pool tokens"] | None

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
        features, labels = setup.predict([setup.zero_shot], setup.data.train).features, setup.data.train.labels
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
    splits = setup.results([best])
    evaluation.save_classifier(folder / "best", setup, best)
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
        "zero_shot": setup.zero_shot_results,
        "skipped": sorted({path for paths in data.gathered(sorted(setup.data.train.skipped.paths)) for path in paths}),
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
                    accuracy = setup.selection_accuracy([state.evaluated])
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
    for size in options.batch_size:
        data.device_mesh(size, options.accumulate)
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
    draws = any(lipsum.METHODS[method].texts == "drawn" for method in options.method)
    at_least = max(options.num_texts) if draws else 1
    return Shared(options, setup, options.guidance and read_guidance(options.guidance, setup, at_least))


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


def connect(options: Options) -> None:
    """Joins the processes of one run: those that the flags tell, else those of a TPU pod or a Slurm job.

    Comes before anything else touches the devices. All but process 0 print nothing. Raises InputError for wrong flags.
    """
    told = [name for name in PROCESSES if getattr(options, name) is not None]
    if told:
        for name in PROCESSES:
            if name not in told:
                raise InputError(f"{flag(told[0])} needs {flag(name)}: give --coordinator, --processes and --process")
        if options.processes < 1 or not 0 <= options.process < options.processes:
            raise InputError(
                f"--process is {options.process} of --processes {options.processes}: number them from 0 to "
                f"{max(options.processes, 1) - 1}"
            )
        host, _, port = options.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise InputError(f"--coordinator is {options.coordinator!r}: give HOST:PORT, such as 10.0.0.1:1234")
        print(
            f"process {options.process} of {options.processes}: waits up to five minutes for all to meet at "
            f"{options.coordinator}",
            flush=True,
        )
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    elif os.environ.get("SLURM_NTASKS") != "1":  # of a single task, JAX would take the first GPU alone
        with contextlib.suppress(ValueError):  # no cluster that JAX knows: one process
            jax.distributed.initialize()
    if not data.writes_files():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what libraries print, too


def check_processes(options: Options, runs: list[Plan]) -> None:
    """Raises InputError where processes of one run were given different options."""
    said = [*options.method, *options.seed, *(settings_of(options, plan) for plan in runs)]
    said += [options.resume, options.overwrite, execution_of(options) | {"workers": 0}]
    if any(other != said for other in data.gathered(said)):
        raise InputError("the processes have different options: give each the same command but for --process")


def keep_freed_memory() -> None:
    """Has glibc, where there is one, keep what XLA frees: on CPU, mapping the pages anew takes a quarter of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_arena_max, 1)


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

        finished = dict(zip(runs, data.from_writer(enter_folders), strict=True))
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


def exit_code(options: Options) -> int:
    """Of `main`: 0, or 2 for bad input, or 128 and the signal's number."""
    try:
        return evaluation.exit_code(lambda: main(options))
    except Stopped as stopped:
        print(f"stopped by {signal.Signals(stopped.number).name}; to go on:\n  {continuing_command(options)}")
        return 128 + stopped.number


if __name__ == "__main__":
    arguments = tyro.cli(Options, prog="python train.py", config=(tyro.conf.FlagCreatePairsOff,))
    keep_freed_memory()
    if not jax.config.jax_compilation_cache_dir:  # the next run of the same sizes starts at once
        jax.config.update("jax_compilation_cache_dir", str(clip.cache_folder() / "jax"))
    code = evaluation.exit_code(lambda: connect(arguments)) or exit_code(arguments)
    if code and jax.distributed.is_initialized():  # the usual way out waits for the other processes
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
