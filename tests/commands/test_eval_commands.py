"""The commands of eval.py on finished runs: post-hoc methods, figures, predictions."""

import json
import shutil
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import changed, given, tiny_command
from PIL import Image
from safetensors.numpy import load_file

import clip
import data
import eval as evaluation
import lipsum
import train
from support import errors, weights
from support.report import tables
from support.report.labels import describe_method
from support.run import finished as finished_runs
from support.run import options


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
    run = finished_runs.read_run(folder)
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

    evaluation.soup_command(given(*runs))
    evaluation.ensemble_command(given(*runs))
    selection = [
        json.loads((run / "results.json").read_text())["selection"]["accuracy"] for run in runs
    ]
    for kind in ("soup", "ensemble"):
        made = json.loads((finished / f"ft,lipsum+{kind}" / "seed-0" / "results.json").read_text())
        assert made["selection"]["accuracy"] >= max(selection)
    evaluation.soup_command(given(runs[1]))
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
    for command in (evaluation.soup_command, evaluation.ensemble_command):
        command(given(finished / "ft" / "seed-0", finished / "ft" / "seed-1"))
    assert most == [2, 4]


def test_post_hoc_bad_input(finished: Path, tmp_path: Path) -> None:
    run = finished / "ft" / "seed-1"
    with pytest.raises(errors.InputError, match=r"--alphas has 1\.5"):
        evaluation.wise_command(given(run), alphas=(1.5,))
    with pytest.raises(errors.InputError, match=r"has no config\.json"):
        evaluation.wise_command(given(tmp_path))
    with pytest.raises(errors.InputError, match="no run is given"):
        evaluation.soup_command(given())
    with pytest.raises(
        errors.InputError,
        match=r"other prompts than .*--templates 'a sketch of",
    ):
        evaluation.soup_command(given(run, finished / "other" / "ft" / "seed-0"))
    with pytest.raises(errors.InputError, match="penalty has -1"):
        evaluation.tpgm_command(given(run), penalty=(-1.0,))
    evaluation.wise_command(given(run), alphas=(0.7,))
    with pytest.raises(errors.InputError, match="give --overwrite"):
        evaluation.wise_command(given(run), alphas=(0.7,))
    evaluation.wise_command(given(run), alphas=(0.7,), overwrite=True)


def test_data_and_models_that_moved(
    finished: Path, model: Path, root: Path, tmp_path: Path, capsys
) -> None:
    """Commands take the data's new place.

    Weights that are others under the same name are noticed, and another preparation of images.
    """
    run = shutil.copytree(finished / "ft" / "seed-0", tmp_path / "ft" / "seed-0")
    config = json.loads((run / "config.json").read_text())
    config["execution"]["data_root"] = "moved away"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.InputError, match=r"moved away has no DOMAIN_test\.txt"):
        evaluation.energy_gap_command(given(run), num_texts=3, text_length=3)
    evaluation.energy_gap_command(
        evaluation.Runs((run,), options.Places(root)), num_texts=3, text_length=3
    )
    assert "sketch" in capsys.readouterr().out
    other = shutil.copytree(model, tmp_path / model.name)
    config["settings"]["model"] = str(other)
    (run / "config.json").write_text(json.dumps(config))
    preparation = json.loads((other / "preprocessor_config.json").read_text())
    squashed = preparation | {"size": preparation["crop_size"]}
    (other / "preprocessor_config.json").write_text(json.dumps(squashed))
    refusal = "was made with other weights or image preparation: restore"
    with pytest.raises(errors.InputError, match=refusal):
        evaluation.energy_gap_command(evaluation.Runs((run,), options.Places(root)))
    loaded, tokenizer = weights.load(str(model))
    loaded = eqx.tree_at(lambda model: model.logit_scale, loaded, jnp.float32(1))
    weights.save(other, loaded, tokenizer)
    with pytest.raises(errors.InputError, match=refusal):
        evaluation.energy_gap_command(evaluation.Runs((run,), options.Places(root)))
    command = changed(
        tiny_command(tmp_path / model.name, root, tmp_path),
        method=("ft",),
        steps=(4,),
        eval_every=1000,
    )
    (run / "results.json").unlink()
    assert errors.exit_code(lambda: train.main(changed(command, resume=True))) == 2
    assert refusal in capsys.readouterr().err


# ------------------------------------------------------------------------ analysis of finished runs


def test_predict(finished: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed classes against the model's own probabilities; a run, its best/, an ensemble."""
    run = finished / "ft" / "seed-0"
    images = (root / "real" / "dog" / "test0.png", root / "sketch" / "guitar" / "test1.png")
    evaluation.predict_command(images, run, top=2)
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[3]] == [str(image) for image in images] and len(lines) == 6
    classifier, model = finished_runs.read_classifier(run / "best")
    pixels = data.read_image(data.ListedFile(images[0], ""), classifier.vision.preparation)
    features = clip.image_features(classifier.vision, jnp.asarray(pixels)[None])
    probabilities = np.asarray(
        jax.nn.softmax(jnp.exp(model.logit_scale) * (features @ classifier.head))
    )[0]
    order = np.argsort(-probabilities)
    names = json.loads((run / "best" / "classes.json").read_text())
    assert lines[1] == f"  {100 * probabilities[order[0]]:5.1f} %  {names[order[0]]}"
    evaluation.predict_command(images, run / "best", top=2)
    assert capsys.readouterr().out.splitlines() == lines
    evaluation.ensemble_command(given(run, finished / "lipsum" / "seed-0"), overwrite=True)
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
    predict = evaluation.predict_split

    def repeated(setup, members, split):
        found = predict(setup, members, split)
        return found._replace(features=np.resize(found.features, (300, found.features.shape[1])))

    monkeypatch.setattr(evaluation, "predict_split", repeated)
    evaluation.energy_gap_command(
        given(finished / "ft" / "seed-0"), num_texts=100, brute_force=True
    )
    for line in capsys.readouterr().out.splitlines():
        _, _, closed, _, _, brute_force = line.split()
        np.testing.assert_allclose(float(closed), float(brute_force), rtol=1e-5)


def test_figures(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """Every figure is written; what the runs do not hold is named; without matplotlib, the extra to
    install.
    """
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    evaluation.wise_command(given(finished / "ft" / "seed-0"), alphas=(0.25,), overwrite=True)
    capsys.readouterr()
    runs = (finished / "ft", finished / "lipsum", finished / "ft+wise-0.25")
    evaluation.figures_command(given(*runs), tmp_path)
    output = capsys.readouterr().out
    assert "soups: nothing to show yet, it needs python eval.py soup or ensemble on runs" in output
    assert "weights: nothing to show yet, it needs several --weight of a method" in output
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


def test_the_figure_of_weights_shows_means_over_seeds(finished: Path, monkeypatch) -> None:
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

    kd = lipsum_run | describe_method("kd") | {"method": "kd"}
    runs = [
        variant(ft, 0, 0, (0.9, 0.1)),
        *(variant(lipsum_run, 0, weight, (0.8, weight / 10)) for weight in (2.0, 1.0)),
        *(
            variant(kd, seed, weight, (0.5 + seed / 10, weight / 10))
            for weight in (3.0, 0.3)
            for seed in (0, 1)
        ),
    ]
    placed = []
    monkeypatch.setattr(figures.Panel, "place_labels", lambda panel: placed.extend(panel.labels))
    (axes,) = figures.draw_weights(runs).axes
    lines = {
        line.get_marker() + line.get_color(): np.round(line.get_xydata(), 6).tolist()
        for line in axes.get_lines()
    }
    zero_shot = lines.pop("*black")
    assert lines == {
        "s" + figures.LOOKS["ft"]["color"]: [[10, 90]],
        "o" + figures.LOOKS["lipsum"]["color"]: [[20, 80], [10, 80]],
        "o0.3": [[3, 55], [30, 55]],
    }
    assert np.shape(zero_shot) == (1, 2) and axes.get_title() == "KD, by weight"
    assert {label.text: np.round(label.point, 6).tolist() for label in placed} == {
        "FT": [10, 90],
        "Lipsum-FT": [10, 80],
        "1": [10, 80],
        "2": [20, 80],
        "0.3": [3, 55],
        "3": [30, 55],
        "zero-shot": zero_shot[0],
    }


def test_best_opens_in_transformers(finished: Path, root: Path, tmp_path: Path) -> None:
    """Features, tokens and, with head.safetensors, logits, through PyTorch's CLIPModel and
    CLIPProcessor.

    The image is square: of an odd number of pixels to crop, transformers leaves the spare one on
    the other side than torchvision, which OpenAI used, and this project.
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
    pixels = data.read_image(data.ListedFile(path), ours.config.preparation)
    actual = np.asarray(clip.image_features(ours.vision, jnp.asarray(pixels)[None]))
    np.testing.assert_allclose(actual, features, atol=2e-6)
    np.testing.assert_allclose(tau * actual @ head, tau * features @ head, atol=2e-6 * tau)
    width = inputs["input_ids"].shape[1]
    np.testing.assert_array_equal(
        clip.tokenize(tokenizer, texts, ours.config)[:, :width][0], inputs["input_ids"][0]
    )


# ---------------------------------------------------------------- zero-shot, and splits of later on


def results_in(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_zero_shot_is_a_method(finished: Path, model: Path, root: Path, tmp_path, capsys) -> None:
    """It has the files of a run and the accuracy in every run, and a table has it once."""
    command = changed(tiny_command(model, root, tmp_path), method=("zero-shot", "ft"), seed=(3, 4))
    train.main(command)
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows.count("zero-shot") == 1 and rows[-2:] == ["zero-shot", "FT"]
    folder = tmp_path / "zero-shot" / "seed-3"
    assert not (tmp_path / "zero-shot" / "seed-4").exists()
    results = results_in(folder)
    assert results["splits"] == results["zero_shot"]
    assert results["splits"] == results_in(finished / "ft" / "seed-0")["zero_shot"]
    clip_model, _ = weights.load(str(model))
    for mine, own in zip(
        jax.tree.leaves(finished_runs.read_run(folder).classifier.vision),
        jax.tree.leaves(clip_model.vision),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, own)


def test_evaluate_finds_what_the_run_reported(finished: Path, root: Path, tmp_path, capsys) -> None:
    """The same images as a folder of class folders, in another order: the recorded metrics."""
    for path in root.glob("sketch/*/test*.png"):
        place = tmp_path / "data" / "drawings" / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    runs = [finished / "ft" / "seed-0", finished / "lipsum" / "seed-1"]
    evaluation.evaluate_command(
        evaluation.Runs(tuple(runs), options.Places(tmp_path / "data")),
        ("drawings",),
        "folder",
        out=tmp_path / "out",
    )
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed[-3:]] == ["zero-shot", "FT", "Lipsum-FT"]
    assert "drawings" in printed[-5] and "real" not in printed[-5]
    for run in runs:
        before = results_in(run)
        after = results_in(tmp_path / "out" / run.parent.name / run.name)
        for kind in ("splits", "zero_shot"):
            found = after[kind]["drawings"]
            assert (
                found["role"] == "shift" and found["accuracy"] == before[kind]["sketch"]["accuracy"]
            )
            for metric in ("nll", "ece", "energy_gap", "distortion"):
                expected = before[kind]["sketch"][metric]
                np.testing.assert_allclose(found[metric], expected, rtol=1e-5, atol=1e-7)
    tables.table_command((tmp_path / "out",))
    assert capsys.readouterr().out.splitlines() == printed[-5:]


def test_evaluate_on_a_domain_that_was_left_out(finished: Path, root: Path, tmp_path) -> None:
    run = finished / "ft" / "seed-0"
    places = options.Places(root)
    arguments = (evaluation.Runs((run,), places), ("sketch", "real"), "domainnet")
    evaluation.evaluate_command(*arguments, out=tmp_path / "out")
    found = results_in(tmp_path / "out" / "ft" / "seed-0")["splits"]
    assert list(found) == ["sketch", "real"] and found["real"]["role"] == "shift"
    assert found["real"]["accuracy"] == results_in(run)["splits"]["real"]["accuracy"]
    with pytest.raises(errors.InputError, match="give --overwrite"):
        evaluation.evaluate_command(*arguments, out=tmp_path / "out")


def test_evaluate_bad_input(finished: Path, root: Path, tmp_path: Path) -> None:
    runs = evaluation.Runs((finished / "ft" / "seed-0",), options.Places(tmp_path))
    (tmp_path / "photos" / "tuba").mkdir(parents=True)
    shutil.copy(root / "real" / "dog" / "test0.png", tmp_path / "photos" / "tuba")
    for shifts, message in {
        (): "--shifts is needed",
        ("phtos",): "has no phtos",
        ("photos",): r"photos has classes that the run does not know \(tuba\): give --class-names",
    }.items():
        with pytest.raises(errors.InputError, match=message):
            evaluation.evaluate_command(runs, shifts, "folder", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    names = tmp_path / "names.txt"
    names.write_text("tuba guitar\n")
    evaluation.evaluate_command(runs, ("photos",), "folder", names, tmp_path / "out")
    assert results_in(tmp_path / "out" / "ft" / "seed-0")["splits"]["photos"]["n"] == 1
