"""Evaluation: metrics, one pass over a split, and the commands on finished runs: tables, figures, post-hoc methods.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py table runs` prints the table of finished runs.

Accuracy and ECE are fractions and NLL is in nats in files; tables that people read show percent and nats.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, UInt8
from tqdm import tqdm

import clip
import data
import lipsum
from support import files, opening, tables, weights
from support.errors import InputError, exit_code, read_json
from support.opening import FinishedRun, Setup, check_text_length, open_runs, read_classifier, save_classifier

# ------------------------------------------------------------------------------------------------------------- metrics


def negative_log_likelihood(label_log_probability: Float[np.ndarray, " images"]) -> float:
    """The mean of `-log p(y | x)`, in nats. It takes logarithms: a probability that underflows still counts in full."""
    return -float(np.mean(label_log_probability, dtype=np.float64))


class Reliability(NamedTuple):
    """Confidence bins of equal width, open below and closed above: images, how many are right, summed confidence."""

    count: Float[np.ndarray, " bins"]
    correct: Float[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]


def reliability(
    confidence: Float[np.ndarray, " images"], correct: Bool[np.ndarray, " images"], bins: int = 15
) -> Reliability:
    """`confidence` is the top-1 probability."""
    bin_of = np.clip(np.digitize(confidence, np.linspace(0, 1, bins + 1), right=True) - 1, 0, bins - 1)
    per_image = (np.ones(len(bin_of)), correct, confidence.astype(np.float64))
    return Reliability(*(np.bincount(bin_of, values, bins) for values in per_image))


def expected_calibration_error(bins: Reliability) -> float:
    """ECE (Guo et al. 2017): |accuracy - confidence| over the bins, weighted by their sizes."""
    return float(np.sum(np.abs(bins.correct - bins.confidence)) / np.sum(bins.count))


def harmonic_mean(seen: float, unseen: float) -> float:
    """`H = 2 S U / (S + U)` of generalised zero-shot (table 11)."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0


# ---------------------------------------------------------------------------------------------------------- evaluation


class Predictions(NamedTuple):
    """What one pass over a split tells of each image, in the split's order."""

    features: Float[np.ndarray, "images dim"]  # unit norm; of an ensemble, the first member's
    label_log_probability: Float[np.ndarray, " images"]  # nats
    confidence: Float[np.ndarray, " images"]  # the top-1 probability
    correct: Bool[np.ndarray, " images"]


@jax.jit
def log_probabilities(
    members: tuple[lipsum.Classifier, ...],
    tau: Float[Array, ""],
    images: Array,
    compared: Bool[np.ndarray | Array, " classes"] | None = None,
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch dim"]]:
    """Of every class, in nats, and the first member's features. Several members: the mean of their probabilities.

    Where some classes alone are `compared`, the others' logits are cut: their probability is 0.
    """
    features = [clip.image_features(member.vision, images) for member in members]
    logits = [lipsum.logits(of_member, member.head, tau) for of_member, member in zip(features, members, strict=True)]
    if compared is not None:
        logits = [jnp.where(compared[None], of_member, -jnp.inf) for of_member in logits]
    of_members = [jax.nn.log_softmax(of_member) for of_member in logits]
    return jax.nn.logsumexp(jnp.stack(of_members), axis=0) - math.log(len(members)), features[0]


@jax.jit
def _outcomes(
    members: tuple[lipsum.Classifier, ...],
    tau: Float[Array, ""],
    batch: dict[str, Array],
    compared: Bool[np.ndarray | Array, " classes"] | None,
) -> tuple:
    """A batch's `Predictions`."""
    of_classes, features = log_probabilities(members, tau, batch["image"], compared)
    of_label = jnp.take_along_axis(of_classes, batch["label"][:, None], axis=1)[:, 0]
    return features, of_label, jnp.exp(jnp.max(of_classes, axis=1)), jnp.argmax(of_classes, axis=1) == batch["label"]


def predict(
    members: Sequence[lipsum.Classifier],
    tau: Float[Array, ""],
    split: data.Split,
    batch_size: int,
    workers: int,
    mesh: Mesh,
) -> Predictions:
    """One pass of a classifier, or of an ensemble of several, over a split, preprocessed as for evaluation."""
    resolution = members[0].vision.image_size
    batches = data.evaluation_batches(split, resolution, batch_size, workers, data.own_part())
    bar = tqdm(
        batches, f"evaluating {split.name}", -(-len(split) // batch_size), unit="batch", leave=False,
        disable=not data.writes_files(),
    )  # fmt: skip
    collected = []
    for host_batch in bar:
        batch = data.shard_batch(host_batch, mesh)
        outcomes = _outcomes(tuple(members), tau, batch, split.compared)
        *outcomes, valid = data.fetch((*outcomes, batch["valid"]))
        collected.append([x[valid] for x in outcomes])
    return Predictions(*(np.concatenate(parts) for parts in zip(*collected, strict=True)))


def metrics(predictions: Predictions) -> dict[str, Any]:
    """`n`, `accuracy`, `ece`, `nll`, and the bins of the reliability diagram."""
    bins = reliability(predictions.confidence, predictions.correct)
    return {
        "n": len(predictions.correct),
        "accuracy": float(np.mean(predictions.correct)),
        "ece": expected_calibration_error(bins),
        "nll": negative_log_likelihood(predictions.label_log_probability),
        "reliability": {name: values.tolist() for name, values in bins._asdict().items()},
    }


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates classifiers on the splits of one setup."""

    setup: opening.Setup

    def predict(self, members: Sequence[lipsum.Classifier], split: data.Split) -> Predictions:
        """One pass over a split, in the precision of the command."""
        execution = self.setup.execution
        computing = [
            lipsum.Classifier(clip.compute_in(member.vision, execution.precision), member.head) for member in members
        ]
        batch_size = data.evaluation_batch_size(self.setup.batch_size, execution.accumulate)
        return predict(computing, self.setup.tau, split, batch_size, execution.workers, self.setup.mesh)

    def selection_accuracy(self, members: Sequence[lipsum.Classifier]) -> float:
        """Accuracy on the selection data, of classifiers over the classes there."""
        return float(np.mean(self.predict(members, self.setup.data.selection).correct))

    @cached_property
    def zero_shot_predictions(self) -> dict[str, Predictions]:
        return {name: self.predict([self.setup.zero_shot], split) for name, split in self.setup.data.reports.items()}

    @cached_property
    def second_moment(self) -> Float[Array, "dim dim"]:
        """C2 over the 10,000 random texts of 8 tokens that the paper's energy gap is over."""
        length = min(8, self.setup.model.config.context_length - 2)
        return jnp.asarray(opening.second_moment(self.setup, length))

    @cached_property
    def zero_shot_results(self) -> dict[str, dict[str, Any]]:
        return {name: self.results_of(name, predictions) for name, predictions in self.zero_shot_predictions.items()}

    def results(self, members: Sequence[lipsum.Classifier]) -> dict[str, dict[str, Any]]:
        """Of every reported split what results.json tells."""
        return {
            name: self.results_of(name, self.predict(members, split), len(members) == 1)
            for name, split in self.setup.data.reports.items()
        }

    def results_of(self, name: str, predictions: Predictions, is_one_model: bool = True) -> dict[str, Any]:
        """Role and metrics of a split; energy gap and distortion of one model; where classes are unseen, S, U and H."""
        setup = self.setup
        results = {"role": "shift" if name in list(setup.data.reports)[1:] else "reference", **metrics(predictions)}
        if is_one_model:  # an ensemble has no features of its own
            before = jnp.asarray(self.zero_shot_predictions[name].features)
            after = jnp.asarray(predictions.features)
            results["energy_gap"] = float(lipsum.expected_energy_gap(after, before, self.second_moment))
            results["distortion"] = float(lipsum.feature_distortion(after, before))
        if len(setup.seen) < len(setup.classes):
            is_seen = np.isin(setup.data.reports[name].labels, setup.seen)
            if is_seen.any() and not is_seen.all():  # a shift may lack the one or the other
                seen, unseen = (float(np.mean(predictions.correct[which])) for which in (is_seen, ~is_seen))
                results |= {"seen": seen, "unseen": unseen, "harmonic_mean": harmonic_mean(seen, unseen)}
        return results


# ----------------------------------------------------------------------------------------------------- finished runs


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """The table of accuracies that commands end with."""
    print(tables.rendered(tables.table(results, "accuracy"), "text", bold=sys.stdout.isatty()))


def new_folder(runs: Sequence[FinishedRun], method: str, overwrite: bool) -> Path:
    """Beside the runs: OUT/METHOD/seed-S, the seed the first run's. Raises InputError where it is taken."""
    folder = runs[0].folder.resolve().parents[1] / method / runs[0].folder.resolve().name
    if folder.exists() and not overwrite:
        raise InputError(f"{folder} exists: give --overwrite to replace it")
    return folder


def write_post_hoc(
    folder: Path, method: str, evaluator: Evaluator, runs: Sequence[FinishedRun], members: Sequence[lipsum.Classifier],
    how: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What a post-hoc method made, as the files of a run; an ensemble has a `best/` for each member. Its results."""
    setup = evaluator.setup
    files.delete(folder)
    folder.mkdir(parents=True)
    for number, member in enumerate(members, start=1):
        best = folder / "best" if len(members) == 1 else folder / "best" / f"member-{number}"
        best.parent.mkdir(exist_ok=True)
        save_classifier(best, setup, member)
    config = runs[0].config | {"method": method, "post_hoc": how}
    files.write_json(folder / "config.json", config)
    results = {name: runs[0].results[name] for name in ("model", "data", "seed", "settings", "zero_shot")} | {
        "method": method,
        "steps": 0,
        "seconds": 0.0,
        "post_hoc": how,
        "selection": {"accuracy": evaluator.selection_accuracy([setup.over_seen(member) for member in members])},
        "splits": evaluator.results(members),
        "skipped": sorted(setup.data.train.skipped.paths),
    }
    files.write_json(folder / "results.json", results)
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
    opened, setup = open_runs(runs)
    evaluator, results = Evaluator(setup), []
    for run in opened:
        for alpha in alphas:
            method = f"{run.results['method']}+wise-{alpha:g}"
            folder = new_folder([run], method, overwrite)
            mixed = lipsum.wise(setup.zero_shot, run.classifier, alpha)
            results.append(write_post_hoc(folder, method, evaluator, [run], [mixed], {"alpha": alpha}))
    print_table([run.results for run in opened] + results)


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
    zero_shot, fine_tuned = setup.over_seen(setup.zero_shot), setup.over_seen(fine_tuned)
    gamma, bound, state = lipsum.tpgm_start(zero_shot, fine_tuned, norm)
    resolution = setup.zero_shot.vision.image_size
    batches = data.training_batches(
        setup.data.selection, resolution, batch_size, seed, setup.execution.workers, augmentation="off"
    )
    for _ in tqdm(range(steps), "TPGM", unit="step", leave=False):
        batch = data.shard_batch(next(batches), setup.mesh)
        gamma, state, _ = lipsum.tpgm_step(gamma, bound, state, zero_shot, fine_tuned, setup.tau, batch, norm, penalty)
    return setup.over_all(lipsum.tpgm_projection(zero_shot, fine_tuned, gamma, norm))


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
    evaluator, results = Evaluator(setup), []
    for run in opened:
        for value in penalty or (0.0,):
            kind = f"tpgm-c-{value:g}" if penalty else "tpgm"
            method = f"{run.results['method']}+{kind}" + ("-mars" if norm == "mars" else "")
            folder = new_folder([run], method, overwrite)
            projected = tpgm(setup, run.classifier, norm, value, run.results["seed"], steps, batch_size)
            how = {"norm": norm, "penalty": value, "steps": steps, "batch_size": batch_size}
            how["select_on"] = setup.sources.select_on
            results.append(write_post_hoc(folder, method, evaluator, [run], [projected], how))
    print_table([run.results for run in opened] + results)


def greedy_command(kind: Literal["soup", "ensemble"], folders: tuple[Path, ...], overwrite: bool) -> None:
    """The greedy soup or ensemble of runs, chosen on the selection data."""
    runs, setup = open_runs(folders)
    evaluator = Evaluator(setup)
    bases = ",".join(dict.fromkeys(run.results["method"] for run in runs))
    method = f"{bases}+{kind}"
    folder = new_folder(runs, method, overwrite)
    classifiers = [run.classifier for run in runs]

    def members_of(indices: Sequence[int]) -> list[lipsum.Classifier]:
        chosen = [classifiers[index] for index in indices]
        return [lipsum.soup(chosen)] if kind == "soup" else chosen

    def accuracy_of(indices: Sequence[int]) -> float:
        return evaluator.selection_accuracy([setup.over_seen(member) for member in members_of(indices)])

    alone = [accuracy_of([index]) for index in range(len(runs))]
    members = lipsum.greedy_members(alone, accuracy_of, len(runs) if kind == "soup" else 4)
    how = {
        "candidates": {str(run.folder): accuracy for run, accuracy in zip(runs, alone, strict=True)},
        "members": [str(runs[index].folder) for index in members],
    }
    results = write_post_hoc(folder, method, evaluator, runs, members_of(members), how)
    print(f"{len(members)} of {len(runs)} runs are in the {kind}: {', '.join(how['members'])}")
    print_table([run.results for run in runs] + [results])


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


Runs = tyro.conf.Positional[tuple[Path, ...]]


def table_command(runs: Runs, metric: tables.MetricName = "accuracy", format: tables.Format = "text") -> None:
    """Print the table of finished runs: a row per method, a column per split, mean ± standard deviation over seeds.

    Args:
        runs: Folders of runs, or folders that hold some.
        metric: What to show; seen, unseen and harmonic-mean are those of runs with --unseen.
        format: csv and json are unrounded, in fractions and nats.
    """
    results = tables.read_results(runs)
    print(tables.rendered(tables.table(results, metric), format, bold=sys.stdout.isatty()))
    if metric in ("energy-gap", "distortion") and format == "text":
        print(tables.correlations(results))


def costs_command(runs: Runs, format: tables.Format = "text") -> None:
    """Print what training cost: time per step and images per second by method, and the ratio to FT's.

    Args:
        runs: Folders of runs, or folders that hold some.
        format: csv and json are unrounded.
    """
    print(tables.rendered(tables.costs(tables.read_results(runs)), format))


def figures_command(runs: Runs, out: Path = Path("figures"), files_only: bool = False) -> None:
    """Write the paper's figures for finished runs, as PNG and SVG.

    Args:
        runs: Folders of runs, or folders that hold some.
        out: The folder to write to.
        files_only: Leave out the two figures that need the data and the models (energy vectors, contact sheet).
    """
    try:
        from support import figures  # needs the extra; everything else does without
    except ImportError as error:
        raise InputError(f"figures need {error.name}: pip install '.[plots]'") from error
    results = tables.read_results(runs)
    drawn = {name: lambda draw=draw: draw(results) for name, draw in figures.FROM_FILES.items()}
    if not files_only:
        first_of = {run["method"]: run["path"].parent for run in reversed(figures.main_settings(results))}
        opened, setup = open_runs(list(reversed(first_of.values())))
        drawn["energy_vectors"] = lambda: energy_vectors_of(opened, Evaluator(setup))
        drawn["contact_sheet"] = lambda: figures.contact_sheet(images_of_classes(setup))
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in drawn.items():
        try:
            figure = draw()
        except figures.Nothing as nothing:
            print(f"{name}: nothing to show yet, it needs {nothing}")
            continue
        for suffix in ("png", "svg"):
            figure.savefig(out / f"{name}.{suffix}", dpi=200)
        print(f"{out / name}.png, .svg")
    print(tables.correlations(results))


def first_images(split: data.Split, count: int) -> data.Split:
    return dataclasses.replace(split, images=split.images[:count], labels=split.labels[:count])


def energy_vectors_of(runs: Sequence[FinishedRun], evaluator: Evaluator) -> Any:
    """Figure 15 for one run of each method: the first 100 images of every split."""
    from support import figures

    setup = evaluator.setup
    splits = {name: first_images(split, 100) for name, split in setup.data.reports.items()}

    def features_of(classifier: lipsum.Classifier) -> dict[str, Float[np.ndarray, "_ dim"]]:
        return {name: evaluator.predict([classifier], split).features for name, split in splits.items()}

    after = {tables.label_of(run.results["method"]): features_of(run.classifier) for run in runs}
    return figures.energy_vectors(features_of(setup.zero_shot), after, np.asarray(evaluator.second_moment))


def images_of_classes(setup: Setup, most: int = 20) -> dict[str, dict[str, UInt8[np.ndarray, "_ _ 3"] | None]]:
    """The first image of each of the first classes in every split, as evaluation sees it."""
    return {
        name: {
            split.name: data.read_image(split.images[found[0]], setup.model.config.image_size) if len(found) else None
            for split in setup.data.reports.values()
            for found in [np.flatnonzero(split.labels == label)]
        }
        for label, name in list(enumerate(setup.classes))[:most]
    }


def energy_gap_command(
    runs: Runs, num_texts: int = 10_000, text_length: int = 8, seed: int = 0, brute_force: bool = False
) -> None:
    """Print the energy gap (equation 6) of runs over random texts that you choose, on every split.

    Args:
        runs: Folders of finished runs, such as runs/lipsum/seed-0.
        num_texts: Random texts.
        text_length: Random tokens per text.
        seed: Of the random texts; results.json has those of seed 0, 10,000 of 8 tokens.
        brute_force: Also from every pair of image and text, beside the closed form d^T C2 d.
    """
    for name, value in (("num-texts", num_texts), ("text-length", text_length)):
        if value < 1:
            raise InputError(f"--{name} is {value}: give at least 1")
    opened, setup = open_runs(runs)
    evaluator = Evaluator(setup)
    check_text_length(text_length, setup.model.config)
    ids = lipsum.random_texts(setup.text, num_texts, text_length, jax.random.key(seed))
    texts = jax.jit(lipsum.features_of_many)(setup.text, ids)
    second_moment = texts.T @ texts / num_texts
    for run in opened:
        for name, split in setup.data.reports.items():
            after = jnp.asarray(evaluator.predict([run.classifier], split).features)
            before = jnp.asarray(evaluator.zero_shot_predictions[name].features)
            line = f"{run.folder}  {name}  {lipsum.expected_energy_gap(after, before, second_moment):.6e}"
            if brute_force:
                pairs = (slice(start, start + 256) for start in range(0, len(after), 256))
                total = sum(
                    float(lipsum.energy_gap(after[part], before[part], texts)) * len(after[part]) for part in pairs
                )
                line += f"  brute force {total / len(after):.6e}"
            print(line)


def predict_command(
    images: tyro.conf.Positional[tuple[Path, ...]], model: Path, top: int = 5, batch_size: int = 64
) -> None:
    """Print the most probable classes of image files.

    Args:
        images: Image files.
        model: The folder of a finished run, such as runs/lipsum/seed-0, or its best/ folder.
        top: How many classes to print.
        batch_size: Images at a time.
    """
    if top < 1 or batch_size < 1:
        raise InputError(f"--top is {top} and --batch-size {batch_size}: give at least 1")
    if not images:
        raise InputError("no image is given: give image files")
    best = model / "best" if (model / "best").is_dir() else model
    members, tau, classes = [], None, None
    for folder in sorted(best.glob("member-*")) or [best]:
        classifier, loaded = read_classifier(folder)
        members.append(classifier)
        tau, classes = jnp.exp(loaded.logit_scale), read_json(folder / "classes.json")
    files = tuple(data.ListedFile(path) for path in images)
    data.check_images([data.Split("images", tuple(classes), files, np.zeros(len(files), np.int32))], 1)
    resolution = members[0].vision.image_size
    for start in range(0, len(files), batch_size):
        part = files[start : start + batch_size]
        pixels = np.stack([data.read_image(file, resolution) for file in part])
        of_classes, _ = log_probabilities(tuple(members), tau, jnp.asarray(pixels))
        for file, probabilities in zip(part, np.exp(np.asarray(of_classes)), strict=True):
            print(file.path)
            for index in np.argsort(-probabilities, kind="stable")[:top]:
                print(f"  {100 * probabilities[index]:5.1f} %  {classes[index]}")


def export_command(run: tyro.conf.Positional[Path], out: Path, format: Literal["openai"] = "openai") -> None:
    """Write a run's model for other tools. Its best/ folder opens in PyTorch transformers as it is.

    Args:
        run: The folder of a finished run, such as runs/lipsum/seed-0, or its best/ folder.
        out: The file to write; `--model FILE` opens it, with OpenAI's vocabulary beside it or in the cache.
        format: openai: a state dict under OpenAI's names, as safetensors.
    """
    if out.exists():
        raise InputError(f"--out {out} exists already: delete it or give another name")
    model, _ = weights.load(str(run / "best" if (run / "best").is_dir() else run))
    {"openai": weights.save_openai}[format](out, model)
    print(out)


app = tyro.extras.SubcommandApp()
app.command(name="table")(table_command)
app.command(name="costs")(costs_command)
app.command(name="figures")(figures_command)
app.command(name="energy-gap")(energy_gap_command)
app.command(name="predict")(predict_command)
app.command(name="export")(export_command)
app.command(name="wise")(wise_command)
app.command(name="tpgm")(tpgm_command)
app.command(name="soup")(soup_command)
app.command(name="ensemble")(ensemble_command)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: app.cli(description=__doc__.splitlines()[0], config=(tyro.conf.FlagCreatePairsOff,))))
