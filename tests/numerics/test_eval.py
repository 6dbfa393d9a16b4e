"""Metrics against brute force and hand-made cases, whole splits against PyTorch, tables by hand."""

import json
import math
import shutil
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from helpers import changed, given, seeded_model, tiny_command
from PIL import Image
from safetensors.numpy import load_file

import clip
import data
import eval as evaluation
import lipsum
import train
from support import devices, errors, layouts, weights
from support.report import tables
from support.run import options
from support.run import setup as opening

# ------------------------------------------------------------------------------------------------------------- metrics


def brute_force_ece(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    total = 0.0
    for index in range(bins):
        inside = [i for i, c in enumerate(confidence) if index / bins < c <= (index + 1) / bins]
        if inside:
            accuracy = sum(float(correct[i]) for i in inside) / len(inside)
            mean_confidence = sum(float(confidence[i]) for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - mean_confidence)
    return total


@pytest.mark.parametrize("seed", range(5))
def test_ece_against_brute_force(seed: int) -> None:
    random = np.random.default_rng(seed)
    confidence = random.uniform(1 / 7, 1, 500).astype(np.float32)
    correct = random.random(500) < confidence**2
    expected = brute_force_ece(confidence, correct)
    assert expected > 0.01
    np.testing.assert_allclose(
        evaluation.expected_calibration_error(evaluation.reliability(confidence, correct)),
        expected,
        rtol=1e-12,
    )


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.75] * 4, [True, True, True, False], 0.0),  # perfectly calibrated
        ([1.0] * 3, [False] * 3, 1.0),  # always wrong and sure
        ([0.5, 1.0], [False, True], 0.25),
        # An edge belongs to the bin below it: 0.2 = 3/15 stays alone, and misses of opposite sign do not cancel.
        ([0.2, 0.2001], [True, False], (0.8 + 0.2001) / 2),
    ],
)
def test_ece_by_hand(confidence: list[float], correct: list[bool], expected: float) -> None:
    actual = evaluation.expected_calibration_error(
        evaluation.reliability(np.array(confidence), np.array(correct))
    )
    np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_nll_of_a_probability_that_underflows() -> None:
    """exp(-200) is 0 in float32; its logarithm is not lost."""
    vision = seeded_model("tiny").vision
    images = np.full((8, 32, 32, 3), 128, np.uint8)
    feature = clip.image_features(vision, jnp.asarray(images))[0]
    classifier = lipsum.Classifier(vision, jnp.stack([feature, -feature], axis=1))
    _, label, confidence, correct = evaluation.outcomes(
        (classifier,), jnp.float32(100), None, {"image": images, "label": np.ones(8, np.int32)}
    )
    np.testing.assert_allclose(
        evaluation.negative_log_likelihood(np.asarray(label)), 200, rtol=1e-5
    )
    # The authors' script adds 1e-8 to the probability, which caps it at 8 ln 10 nats.
    np.testing.assert_allclose(
        evaluation.negative_log_likelihood(np.asarray(label), 1e-8), 8 * math.log(10), rtol=1e-5
    )
    capped = evaluation.negative_log_likelihood(np.log([0.5, 1e-8]), 1e-8)
    np.testing.assert_allclose(capped, -np.mean(np.log([0.5 + 1e-8, 2e-8])), rtol=1e-12)
    assert not correct.any() and np.all(confidence <= 1)
    np.testing.assert_allclose(confidence, 1, rtol=1e-5)


def test_harmonic_mean_by_hand() -> None:
    assert evaluation.harmonic_mean(0.6, 0.3) == pytest.approx(0.4)
    assert evaluation.harmonic_mean(0.0, 0.0) == 0.0


def test_metrics_by_hand() -> None:
    """NLL is that of the labels, where another class is predicted, too."""
    predictions = evaluation.Predictions(
        features=np.zeros((3, 2), np.float32),
        label_log_probability=np.log(np.array([0.5, 0.25, 0.125], np.float32)),
        confidence=np.array([0.5, 0.75, 0.75], np.float32),
        correct=np.array([True, False, False]),
    )
    metrics = evaluation.metrics(predictions)
    assert metrics["n"] == 3 and metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["nll"] == pytest.approx(2 * math.log(2))
    assert metrics["ece"] == pytest.approx((0.5 + 2 * 0.75) / 3)


@pytest.mark.parametrize("compared", [None, [True, False, True, True]], ids=str)
def test_an_ensemble_averages_probabilities(compared: list[bool] | None) -> None:
    """Against NumPy: softmax over the compared classes, the others have probability 0, the mean over two members."""
    vision = seeded_model("tiny").vision
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    heads = np.random.default_rng(1).normal(size=(2, 40, 4)).astype(np.float32)
    features = np.asarray(clip.image_features(vision, images), np.float64)
    mask = np.ones(4, bool) if compared is None else np.array(compared)
    exponentials = np.exp(5 * features @ heads) * mask
    expected = np.mean(exponentials / np.sum(exponentials, axis=-1, keepdims=True), axis=0)
    members = tuple(lipsum.Classifier(vision, jnp.asarray(head)) for head in heads)
    actual, _ = evaluation.log_probabilities(
        members, jnp.float32(5), images, None if compared is None else mask
    )
    np.testing.assert_allclose(np.exp(actual), expected, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------- whole splits


def test_zero_shot_on_real_images_equals_pytorch() -> None:
    """Accuracies exactly, logits within 2e-3 (they are rounded), NLL and ECE within 1e-4, on every list."""
    root = shared("data/pacs")
    reference = json.loads(shared("weights/pacs-clip/reference.json").read_text())
    model, tokenizer = weights.load(str(shared("weights/pacs-clip/openai.pt")))
    images = layouts.read_domainnet(root, "photo", ("art_painting", "cartoon", "sketch"), "test")
    assert list(images.train.classes) == reference["classes"] and list(images.reports) == list(
        reference["splits"]
    )
    features = clip.prompt_features(model, tokenizer, images.train.classes, reference["templates"])
    classifier = lipsum.Classifier(model.vision, clip.zero_shot_head(features))
    tau = jnp.exp(model.logit_scale)
    np.testing.assert_allclose(tau, reference["logit_scale_exp"], rtol=1e-6)
    mesh = devices.device_mesh(64)
    image_features = jax.jit(clip.image_features)
    for name, expected in reference["splits"].items():
        split = images.reports[name]
        first = [str(file.path.relative_to(root)) for file in split.images[:4]]
        assert first == expected["first_files"]
        batch = next(data.evaluation_batches(split, model.config.image_size, 4, workers=1))
        logits = lipsum.logits(
            image_features(model.vision, jnp.asarray(batch["image"])), classifier.head, tau
        )
        np.testing.assert_allclose(logits, expected["first_logits"], rtol=0, atol=2e-3)
        actual = evaluation.metrics(evaluation.predict([classifier], tau, split, 64, 2, mesh))
        assert actual["n"] == expected["n"]
        assert round(actual["accuracy"] * 210) == round(expected["accuracy"] * 210), name
        assert abs(actual["accuracy"] - expected["accuracy"]) < 1e-6
        assert abs(actual["nll"] - expected["nll"]) < 1e-4
        assert abs(actual["ece"] - expected["ece"]) < 1e-4
    # Padding never changes a metric: 210 images fill batches of 8 and of 64 with 6 and 46 more.
    other = evaluation.metrics(
        evaluation.predict([classifier], tau, split, 8, 2, devices.device_mesh(8))
    )
    for metric in ("accuracy", "ece", "nll"):
        np.testing.assert_allclose(other[metric], actual[metric], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- post-hoc methods


@pytest.fixture(scope="module")
def finished(model: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of FT and Lipsum-FT with two seeds each; `other` holds a run on two prompts."""
    out = tmp_path_factory.mktemp("runs")
    command = changed(
        tiny_command(model, root, out),
        method=("ft", "lipsum"),
        seed=(0, 1),
        steps=(4,),
        eval_every=1000,
    )
    train.main(command)
    train.main(
        changed(
            command, method=("ft",), seed=(0,), templates="a sketch of a {}.", out=out / "other"
        )
    )
    return out


def classifier_of(folder: Path) -> list[np.ndarray]:
    run = opening.read_run(folder)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(run.classifier)]


def test_post_hoc_commands(finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    runs = [
        finished / "ft" / "seed-0",
        finished / "lipsum" / "seed-0",
        finished / "lipsum" / "seed-1",
    ]
    evaluation.wise_command(given(runs[0]), alphas=(0.0, 0.5, 1.0))
    results = json.loads((runs[0] / "results.json").read_text())
    ends = {
        alpha: json.loads((finished / f"ft+wise-{alpha}" / "seed-0" / "results.json").read_text())
        for alpha in (0, 1)
    }
    for split in ("real", "sketch"):
        assert ends[1]["splits"][split] == results["splits"][split]
        assert ends[0]["splits"][split] == results["zero_shot"][split]
    assert [split["role"] for split in results["splits"].values()] == ["reference", "shift"]
    for mixed, tuned in zip(
        classifier_of(finished / "ft+wise-1" / "seed-0"), classifier_of(runs[0]), strict=True
    ):
        np.testing.assert_array_equal(mixed, tuned)
    assert "FT + WiSE 0.5" in capsys.readouterr().out

    monkeypatch.setitem(data.AUGMENTATIONS, "crop", None)  # TPGM's images are not augmented
    evaluation.tpgm_command(given(runs[1]), penalty=(0.5,), norm="mars", steps=3, batch_size=8)
    assert "Lipsum-FT + TPGM-C 0.5 mars" in capsys.readouterr().out
    how = json.loads((finished / "lipsum+tpgm-c-0.5-mars" / "seed-0" / "results.json").read_text())[
        "post_hoc"
    ]
    assert how["select_on"] == "val"

    evaluation.greedy_command(given(*runs), "soup")
    evaluation.greedy_command(given(*runs), "ensemble")
    selection = [
        json.loads((run / "results.json").read_text())["selection"]["accuracy"] for run in runs
    ]
    for kind in ("soup", "ensemble"):
        made = json.loads((finished / f"ft,lipsum+{kind}" / "seed-0" / "results.json").read_text())
        assert made["selection"]["accuracy"] >= max(selection)
    evaluation.greedy_command(given(runs[1]), "soup")
    for mixed, tuned in zip(
        classifier_of(finished / "lipsum+soup" / "seed-0"), classifier_of(runs[1]), strict=True
    ):
        np.testing.assert_array_equal(mixed, tuned)
    tables.table_command(
        (finished / "ft", finished / "ft+wise-0.5", finished / "ft,lipsum+ensemble")
    )
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[-3:]] == [
        "FT",
        "FT + WiSE 0.5",
        "FT, Lipsum-FT + ensemble",
    ]


def test_a_soup_may_have_every_run_and_an_ensemble_four(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = []
    monkeypatch.setattr(
        lipsum, "greedy_members", lambda alone, accuracy_of, limit: most.append(limit) or [0]
    )
    for kind in ("soup", "ensemble"):
        evaluation.greedy_command(
            given(finished / "ft" / "seed-0", finished / "ft" / "seed-1"), kind
        )
    assert most == [2, 4]


def test_post_hoc_bad_input(finished: Path, tmp_path: Path) -> None:
    run = finished / "ft" / "seed-1"
    with pytest.raises(errors.InputError, match=r"--alphas has 1\.5"):
        evaluation.wise_command(given(run), alphas=(1.5,))
    with pytest.raises(errors.InputError, match=r"has no config\.json"):
        evaluation.wise_command(given(tmp_path))
    with pytest.raises(errors.InputError, match="no run is given"):
        evaluation.greedy_command(given(), "soup")
    with pytest.raises(errors.InputError, match="has templates 'a photo of a"):
        evaluation.greedy_command(given(run, finished / "other" / "ft" / "seed-0"), "soup")
    with pytest.raises(errors.InputError, match="penalty has -1"):
        evaluation.tpgm_command(given(run), penalty=(-1.0,))
    evaluation.wise_command(given(run), alphas=(0.7,))
    with pytest.raises(errors.InputError, match="give --overwrite"):
        evaluation.wise_command(given(run), alphas=(0.7,))
    evaluation.wise_command(given(run), alphas=(0.7,), overwrite=True)


def test_data_and_models_that_moved(
    finished: Path, model: Path, root: Path, tmp_path: Path, capsys
) -> None:
    """Commands take the data's new place. Weights that are others under the same name are noticed."""
    run = shutil.copytree(finished / "ft" / "seed-0", tmp_path / "ft" / "seed-0")
    config = json.loads((run / "config.json").read_text())
    config["execution"]["data_root"] = "moved away"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.InputError, match=r"moved away has no DOMAIN_test\.txt"):
        evaluation.energy_gap_command(given(run), num_texts=3, text_length=3)
    evaluation.energy_gap_command(
        opening.Runs((run,), options.Places(root)), num_texts=3, text_length=3
    )
    assert "sketch" in capsys.readouterr().out
    other, tokenizer = weights.load(str(model))
    other = eqx.tree_at(lambda model: model.logit_scale, other, jnp.float32(1))
    weights.save(tmp_path / model.name, other, tokenizer)
    config["settings"]["model"] = str(tmp_path / model.name)
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.InputError, match="was made with other weights or prompts: restore"):
        evaluation.energy_gap_command(opening.Runs((run,), options.Places(root)))
    command = changed(
        tiny_command(tmp_path / model.name, root, tmp_path),
        method=("ft",),
        steps=(4,),
        eval_every=1000,
    )
    (run / "results.json").unlink()
    assert errors.exit_code(lambda: train.main(changed(command, resume=True))) == 2
    assert "was made with other weights or prompts: restore" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- analysis of finished runs


def test_predict(finished: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed classes against the model's own probabilities; a run, its best/ and an ensemble."""
    run = finished / "ft" / "seed-0"
    images = (root / "real" / "dog" / "test0.png", root / "sketch" / "guitar" / "test1.png")
    evaluation.predict_command(images, run, top=2)
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == [str(image) for image in images] and len(lines) == 6
    classifier, model = opening.read_classifier(run / "best")
    features = clip.image_features(
        classifier.vision, jnp.asarray(data.read_image(data.ListedFile(images[0], ""), 16))[None]
    )
    probabilities = np.asarray(
        jax.nn.softmax(jnp.exp(model.logit_scale) * (features @ classifier.head))
    )[0]
    order = np.argsort(-probabilities)
    names = json.loads((run / "best" / "classes.json").read_text())
    assert lines[1] == f"  {100 * probabilities[order[0]]:5.1f} %  {names[order[0]]}"
    evaluation.predict_command(images, run / "best", top=2)
    assert capsys.readouterr().out.splitlines() == lines
    evaluation.greedy_command(
        given(run, finished / "lipsum" / "seed-0"), "ensemble", overwrite=True
    )
    evaluation.predict_command(images[:1], finished / "ft,lipsum+ensemble" / "seed-0", top=1)
    assert len(capsys.readouterr().out.splitlines()[-2:]) == 2
    with pytest.raises(errors.InputError, match=r"missing\.png does not exist"):
        evaluation.predict_command((Path("missing.png"),), run)
    with pytest.raises(errors.InputError, match=r"has no head\.safetensors"):
        evaluation.predict_command(images, finished)


def test_energy_gap_command(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both ways agree to 1e-5, and with results.json if the texts are the same."""
    run = finished / "ft" / "seed-0"
    evaluation.energy_gap_command(given(run), brute_force=True)
    results = json.loads((run / "results.json").read_text())["splits"]
    for line in capsys.readouterr().out.splitlines():
        _, name, closed, _, _, brute_force = line.split()
        np.testing.assert_allclose(float(closed), float(brute_force), rtol=1e-5)
        np.testing.assert_allclose(float(closed), results[name]["energy_gap"], rtol=1e-5)
        assert float(closed) > 0


def test_brute_force_over_parts_of_unequal_size(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """300 images are two parts, of 256 and of 44."""
    predict = evaluation.Evaluator.predict

    def repeated(self, members, split):
        found = predict(self, members, split)
        return found._replace(features=np.resize(found.features, (300, found.features.shape[1])))

    monkeypatch.setattr(evaluation.Evaluator, "predict", repeated)
    evaluation.energy_gap_command(
        given(finished / "ft" / "seed-0"), num_texts=100, brute_force=True
    )
    for line in capsys.readouterr().out.splitlines():
        _, _, closed, _, _, brute_force = line.split()
        np.testing.assert_allclose(float(closed), float(brute_force), rtol=1e-5)


def test_figures(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """Every figure is written; what the runs do not hold is named; without matplotlib, the extra to install."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    evaluation.wise_command(given(finished / "ft" / "seed-0"), alphas=(0.25,), overwrite=True)
    capsys.readouterr()
    runs = (finished / "ft", finished / "lipsum", finished / "ft+wise-0.25")
    evaluation.figures_command(given(*runs), tmp_path)
    output = capsys.readouterr().out
    assert "soups: nothing to show yet, it needs python eval.py soup RUNS" in output
    assert "weights: nothing to show yet, it needs python train.py --method kd --weight" in output
    names = {
        "trade_off",
        "trade_off_per_shift",
        "distortion",
        "energy_gap",
        "post_hoc_curves",
        "energy_vectors",
        "contact_sheet",
    }
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    for name in names:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert np.asarray(image.convert("L")).std() > 1, name
    assert "Pearson's correlation of relative accuracy with energy gap" in output
    monkeypatch.setitem(sys.modules, "support.report.figures", None)
    monkeypatch.delattr("support.report.figures")
    with pytest.raises(errors.InputError, match=r"pip install '\.\[plots\]'"):
        evaluation.figures_command(given(*runs), tmp_path)


def test_the_figure_of_weights_shows_means_over_seeds(finished: Path) -> None:
    """A panel per method with several lambdas; Lipsum-FT's curve and FT's point are in each."""
    figures = pytest.importorskip("support.report.figures")
    ft, *_ = tables.read_results([finished / "ft"])
    lipsum_run, *_ = tables.read_results([finished / "lipsum"])

    def variant(run: dict, seed: int, weight: float, accuracies: tuple[float, float]) -> dict:
        splits = {name: {"role": split["role"]} for name, split in run["splits"].items()}
        for split, accuracy in zip(splits.values(), accuracies, strict=True):
            split["accuracy"] = accuracy
        return run | {
            "seed": seed,
            "settings": run["settings"] | {"weight": weight},
            "splits": splits,
        }

    kd = lipsum_run | tables.names("kd") | {"method": "kd"}
    runs = [
        variant(ft, 0, 0, (0.9, 0.1)),
        *(variant(lipsum_run, 0, weight, (0.8, weight / 10)) for weight in (2.0, 1.0)),
        *(
            variant(kd, seed, weight, (0.5 + seed / 10, weight / 10))
            for weight in (3.0, 0.3)
            for seed in (0, 1)
        ),
    ]
    figure = figures.weights_plot(runs)
    (panel,) = figure.axes
    lines = {
        line.get_marker() + line.get_color(): np.round(line.get_xydata(), 6).tolist()
        for line in panel.get_lines()
    }
    zero_shot = lines.pop("*black")
    assert lines == {
        "s" + figures.LOOKS["ft"]["color"]: [[10, 90]],
        "o" + figures.LOOKS["lipsum"]["color"]: [[20, 80], [10, 80]],
        "o0.3": [[30, 55], [3, 55]],
    }
    assert np.shape(zero_shot) == (1, 2) and panel.get_title() == "KD, by weight"
    labels = {text.get_text(): np.round(text.xy, 6).tolist() for text in panel.texts}
    assert labels.pop("zero-shot") == np.round(zero_shot[0], 6).tolist()
    assert labels == {
        "FT": [10, 90],
        "Lipsum-FT": [10, 80],
        "1": [10, 80],
        "2": [20, 80],
        "0.3": [3, 55],
        "3": [30, 55],
    }


def test_best_opens_in_transformers(finished: Path, root: Path, tmp_path: Path) -> None:
    """Features, tokens and, with head.safetensors, logits, through PyTorch's CLIPModel and CLIPProcessor.

    The image is square: of an odd number of pixels to crop, transformers leaves the spare one on the other
    side than torchvision, which OpenAI used, and this project.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    best = finished / "lipsum" / "seed-0" / "best"
    theirs = transformers.CLIPModel.from_pretrained(best)
    processor = transformers.CLIPProcessor.from_pretrained(best)
    ours, tokenizer = weights.load(str(best))
    head, tau = load_file(best / "head.safetensors")["head"], np.exp(float(ours.logit_scale))
    path, texts = tmp_path / "square.png", ["a photo of a dog", "ice cream"]
    Image.open(next((root / "sketch/dog").iterdir())).crop((0, 0, 20, 20)).save(path)
    inputs = processor(text=texts, images=Image.open(path), return_tensors="np", padding=True)
    with torch.no_grad():
        features = theirs.get_image_features(
            torch.tensor(inputs["pixel_values"])
        ).pooler_output.numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    pixels = data.read_image(data.ListedFile(path), ours.config.image_size)
    actual = np.asarray(clip.image_features(ours.vision, jnp.asarray(pixels)[None]))
    np.testing.assert_allclose(actual, features, atol=2e-6)
    np.testing.assert_allclose(tau * actual @ head, tau * features @ head, atol=2e-6 * tau)
    width = inputs["input_ids"].shape[1]
    np.testing.assert_array_equal(
        clip.tokenize(tokenizer, texts, ours.config)[:, :width][0], inputs["input_ids"][0]
    )
