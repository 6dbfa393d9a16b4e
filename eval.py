"""Evaluation: metrics, the one evaluation loop, and the commands on finished runs.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python eval.py table runs` prints the table of
finished runs. In files, accuracy and ECE are fractions and NLL is in nats. Tables show percent and
nats.
"""

import sys

from support.errors import InputError, check_positive, quiet_interrupts, read_json
from support.report import tables
from support.report.tables import Paths

if __name__ == "__main__":
    quiet_interrupts()
    if sys.argv[1:2] in (["table"], ["costs"]):
        sys.exit(tables.run_command())  # they read files alone, and start at once without JAX

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

import clip
import data
import lipsum
from support import devices, disk, layouts
from support.report.labels import describe_method
from support.run import checks, finished
from support.run.finished import FinishedRun
from support.run.options import Places, SelectOn, absolute, to_json, usable_cpus
from support.run.setup import Images, Setup, seen_classes

# -------------------------------------------------------------------------------------- metrics


def negative_log_likelihood(
    label_log_probability: Float[np.ndarray, " images"], added: float = 0.0
) -> float:
    """The mean of `-log(p(y | x) + added)`, in nats.

    Without `added`, a probability that underflows counts in full.
    """
    with np.errstate(divide="ignore"):  # log 0 is minus infinity, and adds nothing
        log_added = np.log(added)
    return -float(np.mean(np.logaddexp(label_log_probability.astype(np.float64), log_added)))


def expected_calibration_error(
    confidence: Float[np.ndarray, " images"], correct: Bool[np.ndarray, " images"], bins: int = 15
) -> float:
    """ECE (Guo et al. 2017): |accuracy - confidence| over bins, weighted by their sizes.

    `confidence` is the top-1 probability. Bins have equal width, open below and closed above.
    """
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.digitize(confidence, edges, right=True) - 1, 0, bins - 1)
    hits = np.bincount(index, correct, bins)
    expected_hits = np.bincount(index, confidence.astype(np.float64), bins)
    return float(np.sum(np.abs(hits - expected_hits)) / len(index))


def harmonic_mean(seen: float, unseen: float) -> float:
    """`H = 2 S U / (S + U)` of generalised zero-shot (Table 11)."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen > 0 else 0.0


# ------------------------------------------------------------------------------------- the loop


class Predictions(NamedTuple):
    """Outcome per image of one pass over a split, in the split's order."""

    features: Float[np.ndarray, "images dim"]  # unit norm; the first member's
    label_log_probability: Float[np.ndarray, " images"]  # nats
    confidence: Float[np.ndarray, " images"]  # the top-1 probability
    correct: Bool[np.ndarray, " images"]


Members = tuple[lipsum.Classifier, ...]
Compared = Bool[np.ndarray | Array, " classes"] | None
Outputs = Callable[[dict[str, Array]], tuple[Array, ...]]  # of a batch


@jax.jit
def log_probabilities(
    members: Members, tau: Float[Array, ""], images: Array, compared: Compared = None
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch dim"]]:
    """Returns `log p(y | x)` of every class, in nats, and the first member's features.

    Probabilities of several members are averaged. Classes that are not `compared` have
    probability 0.
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
    """Returns the `Predictions` of a batch."""
    per_class, features = log_probabilities(members, tau, batch["image"], compared)
    per_label = jnp.take_along_axis(per_class, batch["label"][:, None], axis=1)[:, 0]
    confidence = jnp.minimum(jnp.exp(jnp.max(per_class, axis=1)), 1)  # rounding may exceed 1
    return features, per_label, confidence, jnp.argmax(per_class, axis=1) == batch["label"]


def per_image(
    outputs: Outputs,
    split: data.Split,
    preparation: clip.Preparation,
    batch_size: int,
    workers: int,
    mesh: Mesh,
) -> list[np.ndarray]:
    """Returns the outputs for every image of a split, in order: the one evaluation loop."""
    batches = data.evaluation_batches(split, preparation, batch_size, workers, devices.own_part())
    count = math.ceil(len(split) / batch_size)
    collected = []

    def collect(pending: tuple[Array, ...]) -> None:
        *found, valid = devices.fetch(pending)
        collected.append([x[valid] for x in found])

    pending = None
    for host_batch in devices.progress(batches, f"evaluating {split.name}", count, "batch"):
        batch = devices.shard_batch(host_batch, mesh)
        dispatched = (*outputs(batch), batch["valid"])
        if pending is not None:  # a batch is fetched while the next is computed
            collect(pending)
        pending = dispatched
    if pending is not None:
        collect(pending)
    return [np.concatenate(parts) for parts in zip(*collected, strict=True)]


def predict(
    members: Sequence[lipsum.Classifier],
    tau: Float[Array, ""],
    split: data.Split,
    batch_size: int,
    workers: int,
    mesh: Mesh,
) -> Predictions:
    """One pass of a classifier, or of an ensemble of several members, over a split."""
    outputs = partial(outcomes, tuple(members), tau, split.compared)
    preparation = members[0].vision.preparation
    return Predictions(*per_image(outputs, split, preparation, batch_size, workers, mesh))


def metrics(predictions: Predictions) -> dict[str, Any]:
    """Returns `n`, `accuracy`, `ece`, `nll`, and its value in the authors' script."""
    label_log_probability = predictions.label_log_probability
    return {
        "n": len(predictions.correct),
        "accuracy": float(np.mean(predictions.correct)),
        "ece": expected_calibration_error(predictions.confidence, predictions.correct),
        "nll": negative_log_likelihood(label_log_probability),
        "nll_capped": negative_log_likelihood(label_log_probability, 1e-8),
    }


# ---------------------------------------------------------------------------- results of splits


def predict_split(
    setup: Setup, members: Sequence[lipsum.Classifier], split: data.Split
) -> Predictions:
    """One pass over a split, in the precision of the command."""
    execution = setup.execution
    cast = [
        lipsum.Classifier(clip.compute_in(each.vision, execution.precision), each.head)
        for each in members
    ]
    tau = setup.model.tau
    return predict(cast, tau, split, setup.batch_size, execution.workers, setup.mesh)


def predict_reports(setup: Setup, members: Sequence[lipsum.Classifier]) -> dict[str, Predictions]:
    """One pass over every reported split."""
    reports = setup.data.reports.items()
    return {name: predict_split(setup, members, split) for name, split in reports}


def selection_accuracy(setup: Setup, members: Sequence[lipsum.Classifier]) -> float:
    """Accuracy on the selection data, of classifiers over the classes there."""
    return float(np.mean(predict_split(setup, members, setup.data.selection).correct))


def results_of(
    setup: Setup,
    zero_shot: Mapping[str, Predictions],
    found: Mapping[str, Predictions],
    is_one_model: bool = True,
) -> dict[str, dict[str, Any]]:
    """Returns the content of results.json per reported split, in the order of `found`.

    It has role and metrics; for one model, its energy gap and distortion from the zero-shot
    predictions; if some classes are unseen, S, U and H.
    """
    results = {}
    for name, predictions in found.items():
        role = "reference" if name == setup.sources.reference else "shift"
        split = {"role": role, **metrics(predictions)}
        if is_one_model:  # an ensemble has no features of its own
            before = jnp.asarray(zero_shot[name].features)
            after = jnp.asarray(predictions.features)
            second_moment = jnp.asarray(setup.model.second_moment())
            split["energy_gap"] = float(lipsum.expected_energy_gap(after, before, second_moment))
            split["distortion"] = float(lipsum.feature_distortion(after, before))
        is_seen = np.isin(setup.data.reports[name].labels, setup.seen)
        if is_seen.any() and not is_seen.all():  # a shift may lack the one or the other
            seen, unseen = (float(np.mean(predictions.correct[x])) for x in (is_seen, ~is_seen))
            split |= {"seen": seen, "unseen": unseen, "harmonic_mean": harmonic_mean(seen, unseen)}
        results[name] = split
    return results


# ------------------------------------------------------------------------------- finished runs


@dataclass(frozen=True)
class Runs:
    """The runs of a command, and where their data lie if they moved."""

    # Folders of finished runs, such as runs/lipsum/seed-0; for figures, also folders of some.
    folders: Paths = ()
    # Where the data lie, if they moved.
    moved: Places = dataclasses.field(default_factory=Places)


def evaluate_command(
    runs: Runs,
    shifts: tuple[str, ...],
    data_set: Annotated[str, tyro.conf.arg(name="data", metavar="NAME")],
    class_names: Path | None = None,
    out: Path = Path("evaluated"),
    overwrite: bool = False,
) -> None:
    """Evaluate runs on splits that they did not report, with their own prompts and class names.

    Args:
        shifts: Splits to evaluate on, such as quickdraw.
        data_set: Data set of the splits, as in train.py; folder: --data-root has SHIFT/CLASS/IMAGE.
        class_names: Names of classes whose folders are named otherwise: one 'FOLDER NAME' per line.
        out: Folder for the results' folders, METHOD/seed-SEED.
        overwrite: Replace earlier results.
    """
    places = absolute(runs.moved)

    def read(run: FinishedRun) -> Images:
        classes = tuple(run.config["classes"])
        reports = layouts.read_reports(
            data_set, places.data_root, shifts, classes, places.split_roots, class_names
        )
        data.check_images(list(reports.values()), usable_cpus())
        unused = next(iter(reports.values()))  # nothing is trained or selected on
        seen = seen_classes(classes, run.sources.unseen)
        return data.Data(unused, unused, reports), classes, seen

    opened, setup = finished.open_runs(runs.folders, runs.moved, read=read)
    sources = dataclasses.replace(setup.sources, data=data_set, reference="", shifts=shifts)
    setup = dataclasses.replace(setup, sources=sources)
    folders = [out / run.results["method"] / run.folder.resolve().name for run in opened]
    for folder in folders:
        if folders.count(folder) > 1:
            advice = "evaluate them one by one, each with an --out of its own"
            raise InputError(f"two of the runs would have the folder {folder}: {advice}")
        finished.check_free(folder, overwrite)
    zero_shot = predict_reports(setup, [setup.zero_shot])
    results = []
    for run, folder in zip(opened, folders, strict=True):
        found = predict_reports(setup, [run.classifier])
        settings = run.results["settings"] | to_json(sources)
        new = {
            "data": data_set,
            "evaluated_from": str(run.folder.resolve()),
            "settings": {name: settings[name] for name in run.results["settings"]},
            "splits": results_of(setup, zero_shot, found),
            "zero_shot": results_of(setup, zero_shot, zero_shot),
        }
        results.append(run.results | new)
        finished.delete_run(folder)
        disk.write_json(folder / "config.json", run.config)
        disk.write_json(folder / "results.json", results[-1])
    tables.print_accuracies(results)


# ----------------------------------------------------------------------------- post-hoc methods


def write_post_hoc(
    folder: Path,
    method: str,
    setup: Setup,
    runs: Sequence[FinishedRun],
    members: Sequence[lipsum.Classifier],
    how: dict[str, Any],
    zero_shot: Mapping[str, Predictions],
) -> dict[str, Any]:
    """Writes a post-hoc result as the files of a run; an ensemble has a `best/` per member.

    Returns results.json.
    """
    finished.delete_run(folder)
    for number, member in enumerate(members, start=1):
        best = folder / "best" if len(members) == 1 else folder / "best" / f"member-{number}"
        finished.save_classifier(best, setup, member)
    disk.write_json(folder / "config.json", runs[0].config | {"method": method, "post_hoc": how})
    seen = [setup.restrict_to_seen(member) for member in members]
    found = predict_reports(setup, members)
    kept = ("model", "data", "seed", "settings", "content", "zero_shot")
    results = {name: runs[0].results[name] for name in kept} | {
        "method": method,
        **describe_method(method),
        "steps": 0,
        "seconds": 0.0,
        "post_hoc": how,
        "selection": {"accuracy": selection_accuracy(setup, seen)},
        "splits": results_of(setup, zero_shot, found, len(members) == 1),
    }
    disk.write_json(folder / "results.json", results)
    return results


Variant = tuple[dict[str, Any], Callable[[Setup, FinishedRun], lipsum.Classifier]]


def write_variants(
    runs: Runs, variants: dict[str, Variant], overwrite: bool, select_on: SelectOn | None = None
) -> None:
    """Writes the variants of each run, by method suffix, and prints the table of all."""
    opened, setup = finished.open_runs(runs.folders, runs.moved, select_on)
    zero_shot = predict_reports(setup, [setup.zero_shot])
    results = [run.results for run in opened]
    for run in opened:
        for suffix, (how, make) in variants.items():
            method = f"{run.results['method']}+{suffix}"
            folder = finished.new_folder([run], method, overwrite)
            how |= {"select_on": setup.sources.select_on}
            members = [make(setup, run)]
            results.append(write_post_hoc(folder, method, setup, [run], members, how, zero_shot))
    tables.print_accuracies(results)


def wise_command(
    runs: Runs, alphas: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5), overwrite: bool = False
) -> None:
    """WiSE (equation 17): weights between the zero-shot model's and each run's, one per alpha.

    Args:
        alphas: Shares of the fine-tuned weights, from 0 to 1.
        overwrite: Replace earlier results.
    """

    def mixed(setup: Setup, run: FinishedRun, alpha: float) -> lipsum.Classifier:
        return lipsum.wise(setup.zero_shot, run.classifier, alpha)

    variants: dict[str, Variant] = {}
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            advice = "give shares from 0 (zero-shot) to 1 (fine-tuned)"
            raise InputError(f"--alphas has {alpha}: {advice}")
        variants[f"wise-{alpha:g}"] = {"alpha": alpha}, partial(mixed, alpha=alpha)
    write_variants(runs, variants, overwrite)


def tpgm(
    setup: Setup,
    run: FinishedRun,
    norm: lipsum.Norm,
    penalty: float,
    steps: int,
    batch_size: int,
) -> lipsum.Classifier:
    """Equation 19 on the selection data, unaugmented, then the projection of equation 18."""
    tuned = lipsum.Tuned(
        setup.restrict_to_seen(setup.zero_shot),
        setup.restrict_to_seen(run.classifier),
        setup.model.tau,
        penalty,
        norm,
    )
    gamma, state = lipsum.tpgm_start(tuned)
    preparation, workers = tuned.zero_shot.vision.preparation, setup.execution.workers
    seed = run.results["seed"]
    batches = data.training_batches(
        setup.data.selection, preparation, batch_size, seed, workers, augmentation="off"
    )
    for _ in devices.progress(range(steps), "TPGM", steps, "step"):
        batch = devices.shard_batch(next(batches), setup.mesh)
        gamma, state, _ = lipsum.tpgm_step(gamma, state, tuned, batch)
    return setup.extend_to_all(lipsum.tpgm_projection(tuned, gamma))


def tpgm_command(
    runs: Runs,
    penalty: tuple[float, ...] = (),
    norm: lipsum.Norm = "frobenius",
    steps: int = 200,
    batch_size: int = 64,
    select_on: SelectOn | None = None,
    overwrite: bool = False,
) -> None:
    """TPGM (equations 18 and 19): each tensor projected into a ball around the zero-shot model's.

    Args:
        penalty: TPGM-C: mu, the weight of the radii's squares, a result each (the paper: 0.1 0.2
            0.5 1 2 5).
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
        suffix = f"tpgm-c-{value:g}" if penalty else "tpgm"
        suffix += "-mars" if norm == "mars" else ""
        how = {"norm": norm, "penalty": value, "steps": steps, "batch_size": batch_size}
        variants[suffix] = how, partial(tpgm, **how)
    write_variants(runs, variants, overwrite, select_on)


def soup_command(runs: Runs, overwrite: bool = False) -> None:
    """Greedy soup: the average of the weights of runs, chosen on the selection data.

    Args:
        overwrite: Replace an earlier result.
    """
    combine_greedily(runs, "soup", len(runs.folders), overwrite)


def ensemble_command(runs: Runs, overwrite: bool = False) -> None:
    """Greedy ensemble: the average of the probabilities of at most four runs.

    Args:
        overwrite: Replace an earlier result.
    """
    combine_greedily(runs, "ensemble", 4, overwrite)


def combine_greedily(
    runs: Runs, kind: Literal["soup", "ensemble"], most: int, overwrite: bool
) -> None:
    """Writes the greedy soup or ensemble of at most `most` runs, and prints the table of all."""
    opened, setup = finished.open_runs(runs.folders, runs.moved)
    names = ",".join(dict.fromkeys(run.results["method"] for run in opened))
    method = f"{names}+{kind}"
    folder = finished.new_folder(opened, method, overwrite)

    def members_of(indices: Sequence[int]) -> list[lipsum.Classifier]:
        chosen = [opened[index].classifier for index in indices]
        return [lipsum.soup(chosen)] if kind == "soup" else chosen

    def accuracy_of(indices: Sequence[int]) -> float:
        members = [setup.restrict_to_seen(member) for member in members_of(indices)]
        return selection_accuracy(setup, members)

    alone = [accuracy_of([index]) for index in range(len(opened))]
    chosen = lipsum.greedy_members(alone, accuracy_of, most)
    folders = [str(run.folder) for run in opened]
    how = {
        "candidates": dict(zip(folders, alone, strict=True)),
        "members": [folders[index] for index in chosen],
    }
    zero_shot = predict_reports(setup, [setup.zero_shot])
    members = members_of(chosen)
    results = write_post_hoc(folder, method, setup, opened, members, how, zero_shot)
    print(f"{len(chosen)} of {len(opened)} runs are in the {kind}: {', '.join(how['members'])}")
    tables.print_accuracies([run.results for run in opened] + [results])


# ------------------------------------------------------------------------------------- analysis


def figures_command(runs: Runs, out: Path = Path("figures"), files_only: bool = False) -> None:
    """Write the paper's figures for finished runs, as PNG and SVG.

    Args:
        out: The folder to write to.
        files_only: Leave out the two figures that need the data and the models (energy vectors,
            contact sheet).
    """
    try:
        from support.report import figures  # needs the extra; everything else does without
    except ImportError as error:
        raise InputError(f"figures need {error.name}: pip install '.[plots]'") from error
    results = [run for run in tables.read_results(runs.folders) if run["method"] != "zero-shot"]
    models = tables.group_by_model(results)
    drawn: dict[str, tuple[Callable, str]] = {}
    for name, (draw, needs) in figures.FROM_FILES.items():
        of_all = name == "distortion"  # in panels
        for model, own in {"": results}.items() if of_all else models.items():
            drawn[f"{name} {model}".strip().replace("/", "-")] = partial(draw, own), needs
    if not files_only:
        main = figures.main_settings(results)
        folders = {run["method"]: run["path"].parent for run in reversed(main)}
        opened, setup = finished.open_runs(tuple(reversed(folders.values())), runs.moved)
        vectors = energy_vectors_of(opened, setup)
        drawn["energy_vectors"] = partial(figures.draw_energy_vectors, *vectors), ""
        splits = list(setup.data.reports.values())
        preparation = setup.model.clip.config.preparation
        sheet = partial(figures.draw_contact_sheet, splits, setup.classes, preparation)
        drawn["contact_sheet"] = sheet, ""
    figures.write_figures(drawn, out)
    if len(models) == 1:
        tables.print_correlations(results)


def energy_vectors_of(
    runs: Sequence[FinishedRun], setup: Setup
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Returns the content of figure 15, for the first 100 images of every split.

    It is the features [images, dim] by split, zero-shot and per method, and C2.
    """
    splits = {
        name: data.take(split, np.arange(min(100, len(split))), name)
        for name, split in setup.data.reports.items()
    }

    def features_of(classifier: lipsum.Classifier) -> dict[str, np.ndarray]:
        return {
            name: predict_split(setup, [classifier], split).features
            for name, split in splits.items()
        }

    after = {run.results["method"]: features_of(run.classifier) for run in runs}
    return features_of(setup.zero_shot), after, setup.model.second_moment()


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
        seed: Seed of the random texts. results.json has the gap over 10,000 texts of 8 tokens from
            seed 0.
        brute_force: Also compute it from every pair of image and text, beside the closed form
            d^T C2 d.
    """
    check_positive(num_texts=num_texts, text_length=text_length)
    opened, setup = finished.open_runs(runs.folders, runs.moved)
    checks.refuse(checks.texts_too_long(text_length, setup.model.clip.config))
    text = setup.model.text
    ids = lipsum.random_texts(text, num_texts, text_length, jax.random.key(seed))
    texts = jax.jit(lipsum.embed_many_texts)(text, ids)
    second_moment = texts.T @ texts / num_texts
    zero_shot = predict_reports(setup, [setup.zero_shot])
    for run in opened:
        for name, predictions in predict_reports(setup, [run.classifier]).items():
            after, before = (jnp.asarray(x.features) for x in (predictions, zero_shot[name]))
            gap = lipsum.expected_energy_gap(after, before, second_moment)
            line = f"{run.folder}  {name}  {gap:.6e}"
            if brute_force:
                parts = [slice(start, start + 256) for start in range(0, len(after), 256)]
                gaps = [float(lipsum.energy_gap(after[x], before[x], texts)) for x in parts]
                weights = [len(after[x]) for x in parts]
                line += f"  brute force {np.average(gaps, weights=weights):.6e}"
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
    members, models = zip(*map(finished.read_classifier, folders), strict=True)
    classes = tuple(read_json(folders[0] / "classes.json"))
    labels = np.zeros(len(images), np.int32)  # unknown
    split = data.Split("images", classes, tuple(map(data.ListedFile, images)), labels)
    data.check_images([split], 1)
    batch_size = devices.evaluation_batch_size(64)
    mesh = devices.device_mesh(batch_size)
    tau = jnp.exp(models[0].logit_scale)

    def outputs(batch: dict[str, Array]) -> tuple[Array]:
        return log_probabilities(members, tau, batch["image"])[:1]

    preparation = members[0].vision.preparation
    (per_class,) = per_image(outputs, split, preparation, batch_size, 1, mesh)
    for path, probabilities in zip(images, np.exp(per_class), strict=True):
        print(path)
        for index in np.argsort(-probabilities, kind="stable")[:top]:
            print(f"  {100 * probabilities[index]:5.1f} %  {classes[index]}")


COMMANDS: dict[str, Callable[..., None]] = {
    "evaluate": evaluate_command,
    "figures": figures_command,
    "energy-gap": energy_gap_command,
    "predict": predict_command,
    "wise": wise_command,
    "tpgm": tpgm_command,
    "soup": soup_command,
    "ensemble": ensemble_command,
}

if __name__ == "__main__":
    sys.exit(tables.run_command(COMMANDS))
