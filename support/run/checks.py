"""What a command refuses and warns of, in the order in which a user wants to hear it.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python train.py --steps 0` shows a refusal.

`check_options` needs no data, `check_setup` does. Each goes through a list of small checks, which
yield what is wrong, and raises the first as an InputError. Readers of files raise their own.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

import clip
import lipsum
from support import devices
from support.errors import InputError, few, flag, read_json
from support.run import options
from support.run.finished import check_content, run_files
from support.run.logs import PROFILED
from support.run.options import Cluster, Command, Run, as_arguments
from support.run.processes import gathered
from support.run.setup import Setup

Problems = Iterator[str]


def refuse(problems: Problems) -> None:
    """Raises the first problem as an InputError."""
    for problem in problems:
        raise InputError(problem)


# --------------------------------------------------------------------------------- without data


def check_options(command: Command, runs: Sequence[Run]) -> None:
    """Raises InputError for options that make no sense, before anything is read."""
    for check in WITHOUT_DATA:
        refuse(check(command, runs))


def processes_differ(command: Command, runs: Sequence[Run]) -> Problems:
    execution = dataclasses.replace(command.execution, workers=0)
    own = repr(dataclasses.replace(command, execution=execution, cluster=Cluster()))
    if any(other != own for other in gathered(own)):
        advice = "give each the same command except for --process"
        yield f"the processes have different options: {advice}"


def steps_are_not_compiled(command: Command, runs: Sequence[Run]) -> Problems:
    if jax.config.jax_disable_jit:  # pyrefly: ignore[missing-attribute]
        yield "JAX_DISABLE_JIT is set, steps and evaluation are compiled: unset it"


def no_runs(command: Command, runs: Sequence[Run]) -> Problems:
    if not runs or min(command.seed) < 0 or max(command.seed) >= 2**32:
        yield "--method and --seed need at least one value, seeds from 0 to 2**32 - 1"


COUNTS = ["steps", "batch_size", "num_texts", "text_length", "eval_every"]
COUNTS += ["accumulate", "workers", "checkpoint_every"]
VALID: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(COUNTS, (lambda value: value >= 1, "give at least 1")),
    "learning_rate": (lambda value: 0 <= value < np.inf, "give at least 0"),
    "weight": (lambda value: 0 <= value < np.inf, "give at least 0"),
    "warmup": (lambda value: 0 <= value <= 1, "give a fraction of the steps, from 0 to 1"),
    "temperature": (lambda value: 0 < value < np.inf, "give a number above 0"),
    "decay": (lambda value: 0 <= value < 1, "give a number from 0 up to, but not including, 1"),
}


def numbers_out_of_range(command: Command, runs: Sequence[Run]) -> Problems:
    for run in runs:
        values = vars(run.settings) | vars(run.execution)
        for name, (is_valid, advice) in VALID.items():
            if not is_valid(values[name]):
                yield f"{flag(name)} is {values[name]}: {advice}"


def methods_contradict_options(command: Command, runs: Sequence[Run]) -> Problems:
    for run in runs:
        name, method = run.method, lipsum.METHODS[run.method]
        if run.sources.unseen and method.start != "zero-shot":
            problem = f"--unseen keeps the zero-shot head, {name} starts from another"
            yield f"{problem}: leave {name} out"
        if run.settings.fixed_head and method.start == "zeros":
            problem = f"--fixed-head keeps the head of {name} at zeros, so nothing is learnt"
            yield f"{problem}: leave one out"
        is_random = method.tempered and method.guidance == "random"
        if is_random and run.settings.num_texts == 1:
            problem = f"{name} compares texts with each other, --num-texts is 1"
            yield f"{problem}: give at least 2"


def options_contradict_each_other(command: Command, runs: Sequence[Run]) -> Problems:
    if command.resume and command.overwrite:
        yield "--resume keeps what --overwrite deletes: give one of them"
    steps = min(run.settings.steps for run in runs)
    if command.execution.profile and steps < max(PROFILED):
        yield f"--profile traces up to step {max(PROFILED)}, --steps is {steps}: give more"
    if command.execution.tensorboard and not importlib.util.find_spec("tensorboardX"):
        yield "--tensorboard needs tensorboardX: pip install '.[tensorboard]'"


def batches_do_not_divide(command: Command, runs: Sequence[Run]) -> Problems:
    for run in runs:
        devices.device_mesh(run.settings.batch_size, run.execution.accumulate)  # raises
    yield from ()


WITHOUT_DATA = [
    processes_differ,
    steps_are_not_compiled,
    no_runs,
    numbers_out_of_range,
    methods_contradict_options,
    options_contradict_each_other,
    batches_do_not_divide,
]


def check_folders(command: Command, runs: Sequence[Run]) -> None:
    """Raises InputError if a folder holds something else than what --resume may continue."""
    refuse(taken_folders(command, runs))


def taken_folders(command: Command, runs: Sequence[Run]) -> Problems:
    for run in runs:
        if run.folder.exists() and not run.folder.is_dir():
            yield f"{run.folder} is a file: give another --out"
        if run_files(run.folder) and not (command.resume or command.overwrite):
            yield f"{run.folder} holds a run: give --resume, --overwrite or another --out"
        path = run.folder / "config.json"
        if command.resume and path.exists():
            saved = read_json(path)["settings"]
            if changed := list(changed_settings(run, saved)):
                problem = f"{path} was made with other settings ({', '.join(changed)})"
                yield f"{problem}: give the same ones, --overwrite or another --out"


def changed_settings(run: Run, saved: dict[str, object]) -> Iterator[str]:
    """Yields the settings of a run that differ from the saved ones of a config.json."""
    for name, now in options.read_settings(run).items():
        before = saved[name]
        if isinstance(now, str) and os.path.isabs(now) and before:  # a file may have moved
            now, before = os.path.basename(now), os.path.basename(str(before))
        if now != before:
            yield f"{flag(name)} {before}, now {now}"


def warnings_for_options(command: Command, runs: Sequence[Run]) -> Iterator[str]:
    """Yields options without effect, and methods that their settings make another one."""
    unread = set.intersection(
        *(
            options.unread_settings(lipsum.METHODS[name], command.settings.guidance)
            for name in command.method
        )
    )
    # The evaluation reads the one, --unseen sets the other.
    unread -= {"batch_size", "fixed_head" if command.sources.unseen else ""}
    default = vars(options.defaults_of(command).settings)
    for name, value in (vars(command.settings) | command.sweep).items():
        if name in unread and value != default[name]:
            words = f"{flag(name)} {as_arguments(value)}"
            yield f"{words} has no effect on {' '.join(command.method)}"
    for run in runs:
        name, method, settings = run.method, lipsum.METHODS[run.method], run.settings
        if method.loss and settings.weight == 0:
            yield f"{name} with --weight 0 is ft"
        if method.trained and settings.learning_rate == 0:
            yield f"{name} with --learning-rate 0 stays as it starts"
        if method.averaged and settings.decay == 0:
            yield f"{name} with --decay 0 is ft"
        kept = lipsum.average_decay(settings) ** settings.steps
        if method.averaged and kept > 0.9:
            which = f"{name} with --decay {settings.decay} and --steps {settings.steps}"
            share = f"{100 * kept:.0f}% of the zero-shot model"
            yield f"{which} averages {share}: give a smaller decay"


# ------------------------------------------------------------------------------------ with data


def check_setup(setup: Setup, runs: Sequence[Run], resume: bool) -> None:
    """Raises InputError if the model or its texts do not fit the runs on a reference."""
    for run in runs:
        refuse(prompts_are_one(setup, run))
        refuse(texts_do_not_fit(setup, run))
        path = run.folder / "config.json"
        if resume and path.exists():
            check_content(run.folder, read_json(path), setup)


def prompts_are_one(setup: Setup, run: Run) -> Problems:
    method = lipsum.METHODS[run.method]
    if method.guidance == "fixed" and method.tempered and count_prompts(setup) == 1:
        problem = f"{run.method} compares prompts with each other, --templates has one"
        advice = f"give --templates openai or a file of several, or leave {run.method} out"
        yield f"{problem}: {advice}"


def texts_do_not_fit(setup: Setup, run: Run) -> Problems:
    method = lipsum.METHODS[run.method]
    guidance, count = run.settings.guidance, run.settings.num_texts
    if method.guidance not in ("random", "averaged"):
        return
    if guidance is None:
        yield from texts_too_long(run.settings.text_length, setup.model.clip.config)
        return
    texts = setup.model.read_guidance(guidance)
    if method.guidance == "random" and len(texts) < count:
        problem = f"--guidance {guidance} has {len(texts)} texts"
        yield f"{problem}: give at least --num-texts {count} or lower it"
    if len(texts) > 1 and len(np.unique(texts, axis=0)) == 1:
        yield f"--guidance {guidance} has one text {len(texts)} times: give different ones"


def texts_too_long(length: int, config: clip.Config) -> Problems:
    context = config.context_length
    if length + 2 > context:
        problem = f"--text-length {length} with start and end token is over the model's context"
        yield f"{problem} of {context} tokens: give at most {context - 2}"


def repeated(texts: Sequence[str]) -> list[str]:
    """Returns the texts that the tokenizer cannot tell from an earlier one."""
    cleaned = [clip.clean_text(text) for text in texts]
    return [text for index, text in enumerate(texts) if cleaned.index(cleaned[index]) < index]


def count_prompts(setup: Setup) -> int:
    """Returns how many different prompts each class has."""
    return len(setup.model.templates) - len(repeated(setup.model.templates))


def warnings_for_setup(setup: Setup, runs: Sequence[Run]) -> Iterator[str]:
    """Yields all in the data and the prompts that makes a result mean less than it seems to."""
    if classes := repeated(setup.classes):
        problem = "classes with the prompts of an earlier class are never predicted zero-shot"
        yield f"{problem}: {', '.join(classes)}"
    train = setup.data.train
    if untrained := np.setdiff1d(np.arange(len(train.classes)), train.labels).tolist():
        names = few([train.classes[label] for label in untrained])
        problem = f"{len(untrained)} classes have no training image ({names})"
        yield f"{problem}: add some, or give --unseen"
    if ids := [name for name in setup.classes if re.fullmatch(r"n\d{8}|\d+", name)]:
        problem = f"class names such as {ids[0]!r} mean nothing to a text tower"
        yield f"{problem}: give --class-names FILE"
    if templates := repeated(setup.model.templates):
        problem = f"--templates {setup.sources.templates} repeats prompts, which count as often"
        yield f"{problem}: {', '.join(templates)}"
    is_fixed = any(lipsum.METHODS[run.method].guidance == "fixed" for run in runs)
    if is_fixed and count_prompts(setup) == 1:
        problem = "mse-fixed with one prompt holds one direction of the features"
        yield f"{problem}: give --templates openai or several"
    unseen = np.setdiff1d(np.arange(len(setup.classes)), setup.seen)
    for name, split in setup.data.reports.items():
        if missing := len(np.setdiff1d(unseen, split.labels)):
            lack = "all" if missing == len(unseen) else f"{missing} of the"
            problem = f"{name} lacks {lack} {len(unseen)} unseen classes"
            yield f"{problem}: its unseen accuracy is over those that it has"
