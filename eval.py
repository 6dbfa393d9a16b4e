"""Evaluation: metrics, the one evaluation loop, and the commands on finished runs: tables, figures, post-hoc methods.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py table runs` prints the table of finished runs.
In files, accuracy and ECE are fractions and NLL is in nats. Tables show percent and nats.
"""

import sys

from support import devices
from support.errors import InputError, check_positive, quiet_interrupts, read_json
from support.report import tables
from support.report.tables import Paths

if __name__ == "__main__":
    quiet_interrupts()
    if sys.argv[1:2] in (["table"], ["costs"]):
        sys.exit(tables.run())  # they read files alone, and start at once without JAX

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float
from tqdm import tqdm

import clip
import data
import lipsum
from support import disk
from support.run import setup as opening
from support.run.options import SelectOn
from support.run.setup import FinishedRun, Runs, Setup

# ------------------------------------------------------------------------------------------------------------- metrics


def negative_log_likelihood(
    label_log_probability: Float[np.ndarray, " images"], added: float = 0.0
) -> float:
    """The mean of `-log(p(y | x) + added)`, in nats. Without `added`, a probability that underflows counts in full."""
    with np.errstate(divide="ignore"):  # log 0 is minus infinity, and adds nothing
        return -float(
            np.mean(np.logaddexp(label_log_probability.astype(np.float64), np.log(added)))
        )


class Reliability(NamedTuple):
    """Images, correct ones and summed confidence per bin of confidence. Bins are open below and closed above."""

    count: Float[np.ndarray, " bins"]
    correct: Float[np.ndarray, " bins"]
    confidence: Float[np.ndarray, " bins"]


def reliability(
    confidence: Float[np.ndarray, " images"], correct: Bool[np.ndarray, " images"], bins: int = 15
) -> Reliability:
    """The bins of a reliability diagram. `confidence` is the top-1 probability."""
    index = np.clip(
        np.digitize(confidence, np.linspace(0, 1, bins + 1), right=True) - 1, 0, bins - 1
    )
    per_image = (np.ones(len(index)), correct, confidence.astype(np.float64))
    return Reliability(*(np.bincount(index, values, bins) for values in per_image))


def expected_calibration_error(bins: Reliability) -> float:
    """ECE (Guo et al. 2017): |accuracy - confidence| over the bins, weighted by their sizes."""
    return float(np.sum(np.abs(bins.correct - bins.confidence)) / np.sum(bins.count))


def harmonic_mean(seen: float, unseen: float) -> float:
    """`H = 2 S U / (S + U)` of generalised zero-shot (Table 11)."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0


# ------------------------------------------------------------------------------------------------------------ the loop


class Predictions(NamedTuple):
    """Outcome per image of one pass over a split, in the split's order."""

    features: Float[np.ndarray, "images dim"]  # unit norm; the first member's
    label_log_probability: Float[np.ndarray, " images"]  # nats
    confidence: Float[np.ndarray, " images"]  # the top-1 probability
    correct: Bool[np.ndarray, " images"]


Members = tuple[lipsum.Classifier, ...]
Compared = Bool[np.ndarray | Array, " classes"] | None


@jax.jit
def log_probabilities(
    members: Members, tau: Float[Array, ""], images: Array, compared: Compared = None
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch dim"]]:
    """Returns `log p(y | x)` of every class, in nats, and the first member's features.

    Probabilities of several members are averaged. Classes that are not `compared` have probability 0.
    """
    features = [clip.image_features(member.vision, images) for member in members]
    logits = [
        lipsum.logits(x, member.head, tau) for x, member in zip(features, members, strict=True)
    ]
    if compared is not None:
        logits = [jnp.where(compared[None], u, -jnp.inf) for u in logits]
    per_member = jnp.stack([jax.nn.log_softmax(u) for u in logits])
    return jax.nn.logsumexp(per_member, axis=0) - math.log(len(members)), features[0]


@jax.jit
def outcomes(
    members: Members, tau: Float[Array, ""], compared: Compared, batch: dict[str, Array]
) -> tuple[Array, ...]:
    """The `Predictions` of a batch."""
    per_class, features = log_probabilities(members, tau, batch["image"], compared)
    per_label = jnp.take_along_axis(per_class, batch["label"][:, None], axis=1)[:, 0]
    confidence = jnp.minimum(jnp.exp(jnp.max(per_class, axis=1)), 1)  # rounding may exceed 1
    return features, per_label, confidence, jnp.argmax(per_class, axis=1) == batch["label"]


def per_image(
    outputs: Callable[[dict[str, Array]], tuple[Array, ...]], split: data.Split, resolution: int, batch_size: int,
    workers: int, mesh: Mesh,
) -> list[np.ndarray]:  # fmt: skip
    """The outputs of a function of batches for every image of a split, in order: the one evaluation loop."""
    batches = tqdm(
        data.evaluation_batches(split, resolution, batch_size, workers, devices.own_part()), f"evaluating {split.name}",
        -(-len(split) // batch_size), unit="batch", leave=False, disable=devices.hides_bars(),
    )  # fmt: skip
    computed = (
        (*outputs(batch), batch["valid"])
        for batch in (devices.shard_batch(each, mesh) for each in batches)
    )
    collected = []
    for batch, _ in pairwise(
        chain(computed, [None])
    ):  # a batch is fetched while the next is computed
        *found, valid = devices.fetch(batch)
        collected.append([x[valid] for x in found])
    return [np.concatenate(parts) for parts in zip(*collected, strict=True)]


def predict(
    members: Sequence[lipsum.Classifier], tau: Float[Array, ""], split: data.Split, batch_size: int, workers: int,
    mesh: Mesh,
) -> Predictions:  # fmt: skip
    """One pass of a classifier, or of an ensemble of several members, over a split."""
    outputs = partial(outcomes, tuple(members), tau, split.compared)
    return Predictions(
        *per_image(outputs, split, members[0].vision.image_size, batch_size, workers, mesh)
    )


def metrics(predictions: Predictions) -> dict[str, Any]:
    """`n`, `accuracy`, `ece`, `nll`, its value in the authors' script, and the bins of the reliability diagram."""
    bins = reliability(predictions.confidence, predictions.correct)
    return {
        "n": len(predictions.correct),
        "accuracy": float(np.mean(predictions.correct)),
        "ece": expected_calibration_error(bins),
        "nll": negative_log_likelihood(predictions.label_log_probability),
        "nll_capped": negative_log_likelihood(predictions.label_log_probability, 1e-8),
        "reliability": {name: values.tolist() for name, values in bins._asdict().items()},
    }


# --------------------------------------------------------------------------------------------------- results of splits


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Evaluates classifiers on the splits of one setup."""

    setup: Setup

    def predict(self, members: Sequence[lipsum.Classifier], split: data.Split) -> Predictions:
        """One pass over a split, in the precision of the command."""
        execution = self.setup.execution
        cast = [
            lipsum.Classifier(clip.compute_in(each.vision, execution.precision), each.head)
            for each in members
        ]
        batch_size = devices.evaluation_batch_size(self.setup.batch_size, execution.accumulate)
        return predict(cast, self.setup.tau, split, batch_size, execution.workers, self.setup.mesh)

    def selection_accuracy(self, members: Sequence[lipsum.Classifier]) -> float:
        """Accuracy on the selection data, of classifiers over the classes there."""
        return float(np.mean(self.predict(members, self.setup.data.selection).correct))

    @cached_property
    def zero_shot_predictions(self) -> dict[str, Predictions]:
        """Per reported split."""
        setup = self.setup
        return {
            name: self.predict([setup.zero_shot], split)
            for name, split in setup.data.reports.items()
        }

    @cached_property
    def zero_shot_results(self) -> dict[str, dict[str, Any]]:
        """`results` of the zero-shot classifier."""
        return {
            name: self.split_results(name, found)
            for name, found in self.zero_shot_predictions.items()
        }

    @property
    def second_moment(self) -> Float[Array, "dim dim"]:
        """C2 over the 10,000 random texts of 8 tokens that the paper's energy gap is over."""
        return jnp.asarray(
            opening.second_moment(self.setup, min(8, self.setup.model.config.context_length - 2))
        )

    def results(self, members: Sequence[lipsum.Classifier]) -> dict[str, dict[str, Any]]:
        """The content of results.json per reported split."""
        found = {
            name: self.predict(members, split) for name, split in self.setup.data.reports.items()
        }
        return {
            name: self.split_results(name, each, len(members) == 1) for name, each in found.items()
        }

    def split_results(
        self, name: str, predictions: Predictions, is_one_model: bool = True
    ) -> dict[str, Any]:
        """Role and metrics of a split; energy gap and distortion of one model; if some classes are unseen, S, U, H."""
        setup = self.setup
        results = {
            "role": "shift" if name in list(setup.data.reports)[1:] else "reference",
            **metrics(predictions),
        }
        if is_one_model:  # an ensemble has no features of its own
            before = jnp.asarray(self.zero_shot_predictions[name].features)
            after = jnp.asarray(predictions.features)
            results["energy_gap"] = float(
                lipsum.expected_energy_gap(after, before, self.second_moment)
            )
            results["distortion"] = float(lipsum.feature_distortion(after, before))
        if len(setup.seen) < len(setup.classes):
            is_seen = np.isin(setup.data.reports[name].labels, setup.seen)
            if is_seen.any() and not is_seen.all():  # a shift may lack the one or the other
                seen, unseen = (
                    float(np.mean(predictions.correct[which])) for which in (is_seen, ~is_seen)
                )
                results |= {
                    "seen": seen,
                    "unseen": unseen,
                    "harmonic_mean": harmonic_mean(seen, unseen),
                }
        return results


# ---------------------------------------------------------------------------------------------------- post-hoc methods


def write_post_hoc(
    folder: Path, method: str, evaluator: Evaluator, runs: Sequence[FinishedRun],
    members: Sequence[lipsum.Classifier], how: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Writes a post-hoc result as the files of a run; an ensemble has a `best/` per member. Returns results.json."""
    setup = evaluator.setup
    disk.delete(folder)
    folder.mkdir(parents=True)
    for number, member in enumerate(members, start=1):
        best = folder / "best" if len(members) == 1 else folder / "best" / f"member-{number}"
        best.parent.mkdir(exist_ok=True)
        opening.save_classifier(best, setup, member)
    disk.write_json(folder / "config.json", runs[0].config | {"method": method, "post_hoc": how})
    results = {
        name: runs[0].results[name] for name in ("model", "data", "seed", "settings", "zero_shot")
    } | {
        "method": method,
        **tables.names(method),
        "steps": 0,
        "seconds": 0.0,
        "post_hoc": how,
        "selection": {
            "accuracy": evaluator.selection_accuracy(
                [setup.over_seen(member) for member in members]
            )
        },
        "splits": evaluator.results(members),
    }
    disk.write_json(folder / "results.json", results)
    return results


Variant = tuple[dict[str, Any], Callable[[Setup, FinishedRun], lipsum.Classifier]]


def write_variants(
    runs: Runs, variants: dict[str, Variant], overwrite: bool, select_on: SelectOn | None = None
) -> None:
    """Writes the variants of each run, which `variants` contains by method suffix, and prints the table of all."""
    opened, setup = opening.open_runs(runs, select_on)
    evaluator = Evaluator(setup)
    results = [run.results for run in opened]
    for run in opened:
        for suffix, (how, make) in variants.items():
            method = f"{run.results['method']}+{suffix}"
            folder = opening.new_folder([run], method, overwrite)
            how |= {"select_on": setup.sources.select_on}
            results.append(
                write_post_hoc(folder, method, evaluator, [run], [make(setup, run)], how)
            )
    tables.print_accuracies(results)


def wise_command(
    runs: Runs, alphas: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5), overwrite: bool = False
) -> None:
    """WiSE (equation 17): weights between the zero-shot model's and each run's, a result per alpha.

    Args:
        alphas: Shares of the fine-tuned weights, from 0 to 1.
        overwrite: Replace earlier results.
    """

    def mixed(setup: Setup, run: FinishedRun, alpha: float) -> lipsum.Classifier:
        return lipsum.wise(setup.zero_shot, run.classifier, alpha)

    variants: dict[str, Variant] = {}
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise InputError(
                f"--alphas has {alpha}: give shares from 0 (zero-shot) to 1 (fine-tuned)"
            )
        variants[f"wise-{alpha:g}"] = {"alpha": alpha}, partial(mixed, alpha=alpha)
    write_variants(runs, variants, overwrite)


def tpgm(
    setup: Setup, run: FinishedRun, norm: lipsum.Norm, penalty: float, steps: int, batch_size: int
) -> lipsum.Classifier:
    """Equation 19 on the selection data, unaugmented, then the projection of equation 18."""
    zero_shot = setup.over_seen(setup.zero_shot)
    fine_tuned = setup.over_seen(run.classifier)
    gamma, bound, state = lipsum.tpgm_start(zero_shot, fine_tuned, norm)
    batches = data.training_batches(
        setup.data.selection, zero_shot.vision.image_size, batch_size, run.results["seed"], setup.execution.workers,
        augmentation="off",
    )  # fmt: skip
    for _ in tqdm(range(steps), "TPGM", unit="step", leave=False, disable=devices.hides_bars()):
        batch = devices.shard_batch(next(batches), setup.mesh)
        gamma, state, _ = lipsum.tpgm_step(
            gamma, bound, state, zero_shot, fine_tuned, setup.tau, batch, norm, penalty
        )
    return setup.over_all(lipsum.tpgm_projection(zero_shot, fine_tuned, gamma, norm))


def tpgm_command(
    runs: Runs,
    penalty: tuple[float, ...] = (),
    norm: lipsum.Norm = "frobenius",
    steps: int = 200,
    batch_size: int = 64,
    select_on: SelectOn | None = None,
    overwrite: bool = False,
) -> None:
    """TPGM (equations 18 and 19): each parameter tensor projected into a ball around the zero-shot model's.

    Args:
        penalty: TPGM-C: mu, the weight of the radii's squares, a result each (the paper: 0.1 0.2 0.5 1 2 5).
        norm: Norm of a tensor's distance: frobenius, or mars, the L1 norm row by row.
        steps: Steps of Adam, rate 1e-2, on the radii.
        batch_size: Images per step.
        select_on: val or test, as in the paper. None: what the runs were selected on.
        overwrite: Replace earlier results.
    """
    for value in penalty:
        if not 0 <= value < math.inf:
            raise InputError(f"--penalty has {value}: give numbers, at least 0")
    check_positive(steps=steps, batch_size=batch_size)
    devices.device_mesh(batch_size)
    variants: dict[str, Variant] = {}
    for value in penalty or (0.0,):
        suffix = (f"tpgm-c-{value:g}" if penalty else "tpgm") + ("-mars" if norm == "mars" else "")
        how = {"norm": norm, "penalty": value, "steps": steps, "batch_size": batch_size}
        variants[suffix] = how, partial(tpgm, **how)
    write_variants(runs, variants, overwrite, select_on)


def greedy_command(
    runs: Runs, kind: tyro.conf.Fixed[Literal["soup", "ensemble"]], overwrite: bool = False
) -> None:
    """Greedy soup, the average of runs' weights, or greedy ensemble, the average of the probabilities of at most four.

    Args:
        kind: soup or ensemble.
        overwrite: Replace earlier results.
    """
    opened, setup = opening.open_runs(runs)
    evaluator = Evaluator(setup)
    method = f"{','.join(dict.fromkeys(run.results['method'] for run in opened))}+{kind}"
    folder = opening.new_folder(opened, method, overwrite)

    def members_of(indices: Sequence[int]) -> list[lipsum.Classifier]:
        chosen = [opened[index].classifier for index in indices]
        return [lipsum.soup(chosen)] if kind == "soup" else chosen

    def accuracy_of(indices: Sequence[int]) -> float:
        return evaluator.selection_accuracy(
            [setup.over_seen(member) for member in members_of(indices)]
        )

    alone = [accuracy_of([index]) for index in range(len(opened))]
    members = lipsum.greedy_members(alone, accuracy_of, len(opened) if kind == "soup" else 4)
    how = {
        "candidates": {
            str(run.folder): accuracy for run, accuracy in zip(opened, alone, strict=True)
        },
        "members": [str(opened[index].folder) for index in members],
    }
    results = write_post_hoc(folder, method, evaluator, opened, members_of(members), how)
    print(f"{len(members)} of {len(opened)} runs are in the {kind}: {', '.join(how['members'])}")
    tables.print_accuracies([run.results for run in opened] + [results])


# ------------------------------------------------------------------------------------------------------------ analysis


def figures_command(runs: Runs, out: Path = Path("figures"), files_only: bool = False) -> None:
    """Write the paper's figures for finished runs, as PNG and SVG.

    Args:
        out: The folder to write to.
        files_only: Leave out the two figures that need the data and the models (energy vectors, contact sheet).
    """
    try:
        from support import figures  # needs the extra; everything else does without
    except ImportError as error:
        raise InputError(f"figures need {error.name}: pip install '.[plots]'") from error
    results = tables.read_results(runs.folders)
    drawn: dict[str, Callable] = {
        name: partial(draw, results) for name, draw in figures.FROM_FILES.items()
    }
    if not files_only:
        first_of = {
            run["method"]: run["path"].parent for run in reversed(figures.main_settings(results))
        }
        opened, setup = opening.open_runs(replace(runs, folders=tuple(reversed(first_of.values()))))
        drawn["energy_vectors"] = lambda: figures.energy_vectors(
            *energy_vectors_of(opened, Evaluator(setup))
        )
        drawn["contact_sheet"] = lambda: figures.contact_sheet(setup)
    figures.write_figures(drawn, out)
    print(tables.correlations(results))


def energy_vectors_of(
    runs: Sequence[FinishedRun], evaluator: Evaluator
) -> tuple[Any, Any, np.ndarray]:
    """The content of figure 15, for the first 100 images of every split: features before and after, and C2."""
    reports = evaluator.setup.data.reports.items()
    splits = {
        name: data.take(split, np.arange(min(100, len(split))), name) for name, split in reports
    }

    def features_of(classifier: lipsum.Classifier) -> dict[str, Float[np.ndarray, "_ dim"]]:
        return {
            name: evaluator.predict([classifier], split).features for name, split in splits.items()
        }

    after = {run.results["label"]: features_of(run.classifier) for run in runs}
    return features_of(evaluator.setup.zero_shot), after, np.asarray(evaluator.second_moment)


def energy_gap_command(
    runs: Runs,
    num_texts: int = 10_000,
    text_length: int = 8,
    seed: int = 0,
    brute_force: bool = False,
) -> None:
    """Print the energy gap (equation 6) of runs over random texts of your choice, on every split.

    Args:
        num_texts: Random texts.
        text_length: Random tokens per text.
        seed: Seed of the random texts. results.json has the gap over 10,000 texts of 8 tokens from seed 0.
        brute_force: Also compute it from every pair of image and text, beside the closed form d^T C2 d.
    """
    check_positive(num_texts=num_texts, text_length=text_length)
    opened, setup = opening.open_runs(runs)
    opening.check_text_length(text_length, setup.model.config)
    evaluator = Evaluator(setup)
    ids = lipsum.random_texts(setup.text, num_texts, text_length, jax.random.key(seed))
    texts = jax.jit(lipsum.features_of_many)(setup.text, ids)
    second_moment = texts.T @ texts / num_texts
    for run in opened:
        for name, split in setup.data.reports.items():
            after = jnp.asarray(evaluator.predict([run.classifier], split).features)
            before = jnp.asarray(evaluator.zero_shot_predictions[name].features)
            line = f"{run.folder}  {name}  {lipsum.expected_energy_gap(after, before, second_moment):.6e}"
            if brute_force:
                parts = [slice(start, start + 256) for start in range(0, len(after), 256)]
                gaps = [
                    float(lipsum.energy_gap(after[part], before[part], texts)) for part in parts
                ]
                line += f"  brute force {np.average(gaps, weights=[len(after[part]) for part in parts]):.6e}"
            print(line)


def predict_command(images: Paths, model: Path, top: int = 5) -> None:
    """Print the most probable classes of image files.

    Args:
        images: Image files.
        model: The folder of a finished run, such as runs/lipsum/seed-0, or its best/ folder.
        top: How many classes to print.
    """
    check_positive(top=top)
    if not images:
        raise InputError("no image is given: give image files")
    best = model / "best" if (model / "best").is_dir() else model
    folders = sorted(best.glob("member-*")) or [best]  # an ensemble has several
    members, models = zip(*map(opening.read_classifier, folders), strict=True)
    classes = tuple(read_json(folders[0] / "classes.json"))
    split = data.Split(
        "images", classes, tuple(map(data.ListedFile, images)), np.zeros(len(images), np.int32)
    )
    data.check_images([split], 1)
    batch_size = devices.evaluation_batch_size(64)

    def outputs(batch: dict[str, Array]) -> tuple[Array]:
        return log_probabilities(members, jnp.exp(models[0].logit_scale), batch["image"])[:1]

    (per_class,) = per_image(
        outputs, split, members[0].vision.image_size, batch_size, 1, devices.device_mesh(batch_size)
    )
    for path, probabilities in zip(images, np.exp(per_class), strict=True):
        print(path)
        for index in np.argsort(-probabilities, kind="stable")[:top]:
            print(f"  {100 * probabilities[index]:5.1f} %  {classes[index]}")


COMMANDS: dict[str, Callable[..., None]] = {
    "figures": figures_command,
    "energy-gap": energy_gap_command,
    "predict": predict_command,
    "wise": wise_command,
    "tpgm": tpgm_command,
    "soup": partial(greedy_command, kind="soup"),
    "ensemble": partial(greedy_command, kind="ensemble"),
}

if __name__ == "__main__":
    sys.exit(tables.run(COMMANDS))
