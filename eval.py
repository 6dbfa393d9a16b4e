"""Evaluation: metrics, one pass over a split, tables of finished runs, and the post-hoc methods on them.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py table runs` prints the table of finished runs.

Accuracy and ECE are fractions and NLL is in nats in files; tables that people read show percent and nats.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tqdm import tqdm

import clip
import data
import download
import lipsum
import minidomain
import weights
from clip import InputError, read_json

# ------------------------------------------------------------------------------------------------------------- metrics


def negative_log_likelihood(label_log_probability: Float[np.ndarray, " images"]) -> float:
    """The mean of `-log p(y | x)`, in nats. It takes logarithms: a probability that underflows still counts in full."""
    return -float(np.mean(label_log_probability, dtype=np.float64))


def expected_calibration_error(
    confidence: Float[np.ndarray, " images"], correct: Bool[np.ndarray, " images"], bins: int = 15
) -> float:
    """ECE (Guo et al. 2017): |accuracy - confidence| over bins of equal width, weighted by their sizes.

    Bins are open below and closed above; `confidence` is the top-1 probability.
    """
    bin_of = np.digitize(confidence, np.linspace(0, 1, bins + 1), right=True)
    gap = np.bincount(bin_of, correct - confidence.astype(np.float64), minlength=bins + 1)
    return float(np.sum(np.abs(gap)) / len(confidence))


# ---------------------------------------------------------------------------------------------------------- evaluation


@jax.jit
def _outcomes(
    members: tuple[lipsum.Classifier, ...], tau: Float[Array, ""], batch: dict[str, Array]
) -> tuple[Float[Array, " batch"], Float[Array, " batch"], Bool[Array, " batch"]]:
    """Per image: the label's log-probability, the top-1 probability, and whether top-1 is the label.

    Several members make an ensemble: the mean of their probabilities.
    """
    of_members = [
        jax.nn.log_softmax(lipsum.logits(clip.image_features(member.vision, batch["image"]), member.head, tau))
        for member in members
    ]
    log_probabilities = jax.nn.logsumexp(jnp.stack(of_members), axis=0) - math.log(len(members))
    of_label = jnp.take_along_axis(log_probabilities, batch["label"][:, None], axis=1)[:, 0]
    top = jnp.max(log_probabilities, axis=1)
    return of_label, jnp.exp(top), jnp.argmax(log_probabilities, axis=1) == batch["label"]


def evaluate(
    members: Sequence[lipsum.Classifier],
    tau: Float[Array, ""],
    split: data.Split,
    batch_size: int,
    workers: int,
    mesh: Mesh,
) -> dict[str, int | float]:
    """`n`, `accuracy`, `ece` and `nll` of a classifier, or of an ensemble of several, on a split, in one pass."""
    resolution = members[0].vision.image_size
    batches = data.evaluation_batches(split, resolution, batch_size, workers)
    collected = []
    for batch in tqdm(batches, f"evaluating {split.name}", -(-len(split) // batch_size), unit="batch", leave=False):
        valid = batch.pop("valid")
        outcomes = _outcomes(tuple(members), tau, data.shard_batch(batch, mesh))
        collected.append([np.asarray(x)[valid] for x in outcomes])
    of_label, confidence, correct = (np.concatenate(parts) for parts in zip(*collected, strict=True))
    return {
        "n": len(split),
        "accuracy": float(np.mean(correct)),
        "ece": expected_calibration_error(confidence, correct),
        "nll": negative_log_likelihood(of_label),
    }


_image_features = jax.jit(clip.image_features)


def features(
    vision: clip.VisionTower, split: data.Split, sources: "Sources", mesh: Mesh
) -> tuple[Float[np.ndarray, "images dim"], Int[np.ndarray, " images"]]:
    """Unit-norm embeddings of every image of a split, preprocessed as for evaluation, and the labels."""
    batches = data.evaluation_batches(split, vision.image_size, sources.batch_size, sources.workers)
    parts = []
    for batch in tqdm(batches, f"features of {split.name}", -(-len(split) // sources.batch_size), leave=False):
        valid = batch.pop("valid")
        parts.append(np.asarray(_image_features(vision, data.shard_batch(batch, mesh)["image"]))[valid])
    return np.concatenate(parts), split.labels


# ------------------------------------------------------------------------------------------- what runs are made from


@dataclass(frozen=True)
class Sources:
    """The options, as `train.Options` has them, that decide what is evaluated and how."""

    model: str
    data: str
    data_root: Path | None
    reference: str
    shifts: tuple[str, ...]
    templates: str | None
    keep_underscores: bool
    select_on: str
    batch_size: int
    workers: int


@dataclass(frozen=True)
class Setup:
    """What every run of one command shares: the zero-shot model, its heads, the data, the devices."""

    sources: Sources
    model: clip.CLIP
    tokenizer: Tokenizer
    data: data.Data
    zero_shot: lipsum.Classifier
    context_head: Float[Array, "dim templates"]
    tau: Float[Array, ""]
    mesh: Mesh

    def evaluate(self, members: Sequence[lipsum.Classifier], split: data.Split) -> dict[str, int | float]:
        return evaluate(members, self.tau, split, self.sources.batch_size, self.sources.workers, self.mesh)

    def evaluate_reports(self, members: Sequence[lipsum.Classifier]) -> dict[str, dict[str, Any]]:
        """The results of every reported split, with its role."""
        return {
            name: {"role": "shift" if index else "reference", **self.evaluate(members, split)}
            for index, (name, split) in enumerate(self.data.reports.items())
        }


def read_templates(templates: str | None) -> list[str]:
    """OpenAI's prompts, those of a file, the one prompt given, or minidomain's.

    Raises InputError for one without `{}`.
    """
    if templates is None:
        return list(minidomain.TEMPLATES)
    if templates == "openai":
        return download.openai_prompts()[1]
    if "{}" in templates:
        return [templates]
    try:
        lines = Path(templates).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--templates {templates!r} is neither openai, a prompt with {{}} nor a readable file: {error}"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"--templates {templates} is empty: write one prompt a line")
    for prompt in prompts:
        if "{}" not in prompt:
            raise InputError(f"--templates {templates}: {prompt!r} has no {{}} for the class: add it")
    return prompts


def prepare(sources: Sources) -> Setup:
    """Loads and checks the model and the data. Raises InputError before any long work."""
    templates = read_templates(sources.templates)
    mesh = data.device_mesh(sources.batch_size)
    model, tokenizer = weights.load(sources.model)
    read = data.DATASETS[sources.data]
    images = read(sources.data_root, sources.reference, sources.shifts, sources.select_on, sources.keep_underscores)
    data.check_images([images.train, images.selection, *images.reports.values()], sources.workers)
    features = clip.prompt_features(model, tokenizer, images.train.classes, templates)
    zero_shot, context_head, tau = data.replicate(
        (
            lipsum.Classifier(model.vision, clip.zero_shot_head(features)),
            clip.context_head(features),
            jnp.exp(model.logit_scale),
        ),
        mesh,
    )
    return Setup(sources, model, tokenizer, images, zero_shot, context_head, tau, mesh)


def write_json(path: Path, content: Any) -> None:
    """Written beside its place and renamed onto it, so that the file is whole at any moment."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def save_classifier(folder: Path, setup: Setup, classifier: lipsum.Classifier) -> None:
    """A classifier as a Hugging Face CLIP folder, with the head and the names of its columns."""
    model = eqx.tree_at(lambda model: model.vision, setup.model, classifier.vision)
    temporary = folder.with_name(folder.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    weights.save(temporary, model, setup.tokenizer)
    save_file({"head": np.asarray(classifier.head, order="C")}, temporary / "head.safetensors")
    write_json(temporary / "classes.json", setup.data.train.classes)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


# -------------------------------------------------------------------------------------------------------------- tables

Metric = Literal["accuracy", "ece", "nll"]
# What tables show of each metric: heading, factor, decimals.
SHOWN = {"accuracy": ("accuracy, %", 100, 1), "ece": ("ECE, %", 100, 1), "nll": ("NLL, nats", 1, 3)}


def read_results(runs: list[Path]) -> list[dict[str, Any]]:
    """Every `results.json` in or under the given folders. Raises InputError where there is none or one is broken."""
    results = []
    for run in runs:
        found = sorted(run.rglob("results.json"))
        if not found:
            raise InputError(f"{run} holds no results.json: give the folders of finished runs")
        for path in found:
            content = read_json(path)
            if missing := {"method", "seed", "splits", "zero_shot"} - set(content):
                raise InputError(f"{path} lacks {', '.join(sorted(missing))}: it is not a run's; leave it out")
            results.append(content | {"path": path})
    first = results[0]
    for other in results[1:]:
        if list(other["splits"]) != list(first["splits"]):
            raise InputError(
                f"{first['path']} has splits {', '.join(first['splits'])}, {other['path']} has "
                f"{', '.join(other['splits'])}: give runs of the same splits"
            )
    return results


def table(results: list[dict[str, Any]], metric: str) -> str:
    """Zero-shot and each method in rows, each split and the shifts' mean in columns; mean ± deviation over seeds."""
    splits = results[0]["splits"]
    shifts = [name for name, split in splits.items() if split["role"] == "shift"]
    heading, factor, decimals = SHOWN[metric]

    def cells(runs: list[dict[str, Any]]) -> list[str]:
        """Each column's mean over `runs`, with the sample standard deviation where there are two or more."""
        columns = [[run[name][metric] for run in runs] for name in splits]
        if shifts:
            columns.append([statistics.fmean(run[name][metric] for name in shifts) for run in runs])
        return [
            f"{factor * statistics.fmean(column):.{decimals}f}"
            + (f" ± {factor * statistics.stdev(column):.{decimals}f}" if len(column) > 1 else "")
            for column in columns
        ]

    rows = [[heading, *splits, *(["mean of shifts"] if shifts else [])]]
    rows.append(["zero-shot", *cells([results[0]["zero_shot"]])])
    for method in dict.fromkeys(result["method"] for result in results):
        runs = [result["splits"] for result in results if result["method"] == method]
        rows.append([label_of(method), *cells(runs)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ----------------------------------------------------------------------------------------------------- finished runs

POST_HOC = {"wise": "WiSE", "tpgm": "TPGM", "tpgm-c": "TPGM-C"}


def label_of(method: str) -> str:
    """What tables call a method: `lipsum+wise-0.9` is Lipsum-FT + WiSE 0.9."""
    base, *suffixes = method.split("+")
    names = [", ".join(lipsum.METHODS[name].label if name in lipsum.METHODS else name for name in base.split(","))]
    for suffix in suffixes:
        name = next((name for name in sorted(POST_HOC, reverse=True) if suffix.startswith(name)), "")
        names.append(POST_HOC.get(name, "") + suffix.removeprefix(name).replace("-", " "))
    return " + ".join(names)


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what `config.json` and `results.json` say, and its selected classifier."""

    folder: Path
    config: dict[str, Any]
    results: dict[str, Any]
    classifier: lipsum.Classifier


def read_run(folder: Path) -> Run:
    """Raises InputError where the folder is no finished run with one classifier."""
    for name in ("config.json", "results.json", "best/head.safetensors", "best/classes.json"):
        if not (folder / name).exists():
            raise InputError(f"{folder} has no {name}: give the folder of a finished run, such as runs/lipsum/seed-0")
    model, _ = weights.load(str(folder / "best"))
    head = load_file(folder / "best" / "head.safetensors")["head"]
    config, results = read_json(folder / "config.json"), read_json(folder / "results.json")
    return Run(folder, config, results, lipsum.Classifier(model.vision, jnp.asarray(head)))


def open_runs(folders: Sequence[Path], select_on: str | None) -> tuple[list[Run], Setup]:
    """The runs, and the setup that all of them share. Raises InputError where they do not share one."""
    if not folders:
        raise InputError("no run is given: give the folders of finished runs, such as runs/lipsum/seed-0")
    runs = [read_run(folder) for folder in folders]
    first = runs[0]
    shared = [field.name for field in dataclasses.fields(Sources) if field.name not in ("batch_size", "workers")]
    for run in runs[1:]:
        if run.config["classes"] != first.config["classes"]:
            raise InputError(f"{first.folder} and {run.folder} have different classes: give runs of the same data")
        for name in shared:
            one, other = first.config["settings"][name], run.config["settings"][name]
            if one != other:
                raise InputError(
                    f"{first.folder} has {name} {one!r}, {run.folder} has {other!r}: give runs of the same one"
                )
    settings = first.config["settings"]
    said = {name: settings[name] for name in shared} | {"batch_size": settings["batch_size"]}
    said |= {"data_root": settings["data_root"] and Path(settings["data_root"]), "shifts": tuple(settings["shifts"])}
    if select_on:
        said["select_on"] = select_on
    setup = prepare(Sources(**said, workers=os.cpu_count() or 1))
    if list(setup.data.train.classes) != first.config["classes"]:
        raise InputError(f"the data of {first.folder} have other classes now: restore {settings['data_root']}")
    return runs, setup


def new_folder(runs: Sequence[Run], method: str, overwrite: bool) -> Path:
    """Beside the runs: OUT/METHOD/seed-S, the seed the first run's. Raises InputError where it is taken."""
    folder = runs[0].folder.resolve().parents[1] / method / runs[0].folder.resolve().name
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists: give --overwrite to replace it")
    return folder


def write_post_hoc(
    folder: Path, method: str, setup: Setup, runs: Sequence[Run], members: Sequence[lipsum.Classifier],
    how: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What a post-hoc method made, as the files of a run; an ensemble has a `best/` for each member. Its results."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, member in enumerate(members, start=1):
        best = folder / "best" if len(members) == 1 else folder / "best" / f"member-{number}"
        best.parent.mkdir(exist_ok=True)
        save_classifier(best, setup, member)
    config = runs[0].config | {"method": method, "post_hoc": how}
    write_json(folder / "config.json", config)
    results = {name: runs[0].results[name] for name in ("model", "data", "seed", "settings", "zero_shot")} | {
        "method": method,
        "steps": 0,
        "seconds": 0.0,
        "post_hoc": how,
        "selection": {"accuracy": setup.evaluate(members, setup.data.selection)["accuracy"]},
        "splits": setup.evaluate_reports(members),
    }
    write_json(folder / "results.json", results)
    return results


def wise_command(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    alphas: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5),
    overwrite: bool = False,
) -> None:
    """WiSE (equation 17): weights between the zero-shot model's and each run's, a result for every alpha.

    Args:
        runs: Folders of finished runs, such as runs/lipsum/seed-0.
        alphas: Shares of the fine-tuned weights, from 0 to 1.
        overwrite: Replace earlier results.
    """
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise InputError(f"--alphas has {alpha}: give shares from 0 (zero-shot) to 1 (fine-tuned)")
    opened, setup = open_runs(runs, None)
    results = []
    for run in opened:
        for alpha in alphas:
            method = f"{run.results['method']}+wise-{alpha:g}"
            folder = new_folder([run], method, overwrite)
            mixed = lipsum.wise(setup.zero_shot, run.classifier, alpha)
            results.append(write_post_hoc(folder, method, setup, [run], [mixed], {"alpha": alpha}))
    print(table([run.results for run in opened] + results, "accuracy"))


def tpgm(
    setup: Setup,
    fine_tuned: lipsum.Classifier,
    norm: lipsum.Norm,
    penalty: float,
    seed: int,
    steps: int,
    batch_size: int,
) -> lipsum.Classifier:
    """Equation 19 on the selection data, unaugmented, then the projection of equation 18."""
    gamma, bound, state = lipsum.tpgm_start(setup.zero_shot, fine_tuned, norm)
    resolution = setup.zero_shot.vision.image_size
    batches = data.training_batches(
        setup.data.selection, resolution, batch_size, seed, setup.sources.workers, augmentation="off"
    )
    for _ in tqdm(range(steps), "TPGM", unit="step", leave=False):
        batch = data.shard_batch(next(batches), setup.mesh)
        gamma, state, _ = lipsum.tpgm_step(
            gamma, bound, state, setup.zero_shot, fine_tuned, setup.tau, batch, norm, penalty
        )
    return lipsum.tpgm_projection(setup.zero_shot, fine_tuned, gamma, norm)


def tpgm_command(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    penalty: tuple[float, ...] = (),
    norm: lipsum.Norm = "frobenius",
    steps: int = 200,
    batch_size: int = 64,
    select_on: Literal["val", "test"] | None = None,
    overwrite: bool = False,
) -> None:
    """TPGM (equations 18 and 19): each parameter tensor projected into a ball around the zero-shot model's.

    Args:
        runs: Folders of finished runs, such as runs/lipsum/seed-0.
        penalty: TPGM-C: mu, the weight of the radii's squares, a result for each (the paper: 0.1 0.2 0.5 1 2 5).
        norm: Of a tensor's distance: frobenius, or mars, the L1 norm row by row.
        steps: Steps of Adam, rate 1e-2, on the radii.
        batch_size: Images per step.
        select_on: val or test, as the paper did. Default: what the runs were selected on.
        overwrite: Replace earlier results.
    """
    for value in penalty:
        if not 0 <= value < math.inf:
            raise InputError(f"--penalty has {value}: give numbers, at least 0")
    for name, value in (("steps", steps), ("batch-size", batch_size)):
        if value < 1:
            raise InputError(f"--{name} is {value}: give at least 1")
    data.device_mesh(batch_size)
    opened, setup = open_runs(runs, select_on)
    results = []
    for run in opened:
        for value in penalty or (0.0,):
            kind = f"tpgm-c-{value:g}" if penalty else "tpgm"
            method = f"{run.results['method']}+{kind}" + ("-mars" if norm == "mars" else "")
            folder = new_folder([run], method, overwrite)
            projected = tpgm(setup, run.classifier, norm, value, run.results["seed"], steps, batch_size)
            how = {"norm": norm, "penalty": value, "steps": steps, "batch_size": batch_size}
            how["select_on"] = setup.sources.select_on
            results.append(write_post_hoc(folder, method, setup, [run], [projected], how))
    print(table([run.results for run in opened] + results, "accuracy"))


def greedy_command(kind: Literal["soup", "ensemble"], folders: tuple[Path, ...], overwrite: bool) -> None:
    """The greedy soup or ensemble of runs, chosen on the selection data."""
    runs, setup = open_runs(folders, None)
    bases = ",".join(dict.fromkeys(run.results["method"] for run in runs))
    method = f"{bases}+{kind}"
    folder = new_folder(runs, method, overwrite)
    classifiers = [run.classifier for run in runs]

    def members_of(indices: Sequence[int]) -> list[lipsum.Classifier]:
        chosen = [classifiers[index] for index in indices]
        return [lipsum.soup(chosen)] if kind == "soup" else chosen

    def accuracy_of(indices: Sequence[int]) -> float:
        return float(setup.evaluate(members_of(indices), setup.data.selection)["accuracy"])

    alone = [accuracy_of([index]) for index in range(len(runs))]
    members = lipsum.greedy_members(alone, accuracy_of, len(runs) if kind == "soup" else 4)
    how = {
        "candidates": {str(run.folder): accuracy for run, accuracy in zip(runs, alone, strict=True)},
        "members": [str(runs[index].folder) for index in members],
    }
    results = write_post_hoc(folder, method, setup, runs, members_of(members), how)
    print(f"{len(members)} of {len(runs)} runs are in the {kind}: {', '.join(how['members'])}")
    print(table([run.results for run in runs] + [results], "accuracy"))


def soup_command(runs: tyro.conf.Positional[tuple[Path, ...]], overwrite: bool = False) -> None:
    """Greedy soup: the average of the runs' weights, of those that raise the accuracy on the selection data.

    Args:
        runs: Folders of finished runs.
        overwrite: Replace earlier results.
    """
    greedy_command("soup", runs, overwrite)


def ensemble_command(runs: tyro.conf.Positional[tuple[Path, ...]], overwrite: bool = False) -> None:
    """Greedy ensemble: the average of the probabilities of at most four runs.

    Args:
        runs: Folders of finished runs.
        overwrite: Replace earlier results.
    """
    greedy_command("ensemble", runs, overwrite)


# -------------------------------------------------------------------------------------------------------- command line


def exit_code(command: Callable[[], None]) -> int:
    """Runs a command: 0, or 2 after one line on stderr where the user's input is wrong. Faults of ours raise (1)."""
    try:
        command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def table_command(runs: tyro.conf.Positional[tuple[Path, ...]], metric: Metric = "accuracy") -> None:
    """Print the table of finished runs: a row per method, a column per split.

    Args:
        runs: Folders of runs, or folders that hold some.
        metric: What to show: accuracy or ECE in percent, NLL in nats.
    """
    print(table(read_results(list(runs)), metric))


app = tyro.extras.SubcommandApp()
app.command(name="table")(table_command)
app.command(name="wise")(wise_command)
app.command(name="tpgm")(tpgm_command)
app.command(name="soup")(soup_command)
app.command(name="ensemble")(ensemble_command)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: app.cli(description=__doc__.splitlines()[0], config=(tyro.conf.FlagCreatePairsOff,))))
