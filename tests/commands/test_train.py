"""The command line end to end, on a tiny random CLIP and tiny trees of images."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import changed, given
from safetensors.numpy import load_file

import clip
import data
import eval as evaluation
import lipsum
import train
from support import devices, errors, layouts, weights
from support.layouts import minidomain
from support.report import tables
from support.run import checks, options
from support.run import finished as finished_runs
from support.run.options import Command
from support.run.setup import open_setups
from tools import export_minidomain


def test_run_from_start_to_table(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    command = changed(command, method=("ft", "lipsum"), seed=(0, 1), steps=(12,))
    train.main(command)
    table = capsys.readouterr().out.splitlines()[-5:]
    assert table[0].split() == ["accuracy,", "%", "real", "sketch", "mean", "of", "shifts"]
    assert [line.split()[0] for line in table[2:]] == [
        "zero-shot",
        "FT",
        "Lipsum-FT",
    ] and "±" in table[4]
    assert "\n".join(table) == tables.render(
        tables.tabulate(tables.read_results([command.out]), "accuracy"), "text"
    )

    folder = command.out / "lipsum" / "seed-1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best",
        "checkpoint",
        "config.json",
        "metrics.jsonl",
        "results.json",
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10, 12]
    assert list(lines[0])[:2] == ["step", "loss"]
    for line in lines:
        np.testing.assert_allclose(
            line["loss"], line["cross_entropy"] + line["regularizer"], rtol=1e-5
        )
        assert line["images_per_second"] > 0 and line["gradient_norm"] > 0
    results = json.loads((folder / "results.json").read_text())
    assert (results["method"], results["seed"], results["steps"], results["data"]) == (
        "lipsum",
        1,
        12,
        "domainnet",
    )
    assert {name: split["role"] for name, split in results["splits"].items()} == {
        "real": "reference",
        "sketch": "shift",
    }
    assert results["settings"]["num_texts"] == 4 and results["seconds"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["classes"] == ["ice cream", "dog", "guitar"]
        and config["versions"]["jax"] == jax.__version__
    )

    # The selected model is a model: loaded again, with its head, it has the results that were
    # written.
    best, _ = weights.load(str(folder / "best"))
    head = load_file(folder / "best" / "head.safetensors")["head"]
    assert json.loads((folder / "best" / "classes.json").read_text()) == config["classes"]
    split = layouts.read_domainnet(command.execution.data_root, "real", ("sketch",), "val").reports[
        "sketch"
    ]
    tau = jnp.exp(best.logit_scale)
    classifier = lipsum.Classifier(best.vision, jnp.asarray(head))
    again = evaluation.metrics(
        evaluation.predict([classifier], tau, split, 8, 1, devices.device_mesh(8))
    )
    assert again["accuracy"] == results["splits"]["sketch"]["accuracy"]
    np.testing.assert_allclose(again["nll"], results["splits"]["sketch"]["nll"], rtol=1e-6)
    zero_shot, _ = weights.load(command.sources.model)
    assert not np.array_equal(zero_shot.vision.projection.weight, best.vision.projection.weight)
    for old, new in zip(jax.tree.leaves(zero_shot.text), jax.tree.leaves(best.text), strict=True):
        np.testing.assert_array_equal(old, new)


def test_same_seed_same_bits(command: Command) -> None:
    for name in ("a", "b"):
        train.main(changed(command, out=command.out / name))
    first, second = (
        command.out / name / "lipsum/seed-0/best/model.safetensors" for name in ("a", "b")
    )
    assert first.read_bytes() == second.read_bytes()


def test_the_most_accurate_model_is_kept(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accuracies are 0.2, 0.6, 0.6 after steps 2, 4 and 6: the first of the best is kept."""
    kept = []
    selection = iter([1, 3, 3])
    predict = evaluation.predict

    def predicts(members, tau, split, *rest):
        if split.name != "val":
            return predict(members, tau, split, *rest)
        kept.append(np.array(members[0].head))
        return predict(members, tau, split, *rest)._replace(correct=np.arange(5) < next(selection))

    monkeypatch.setattr(evaluation, "predict", predicts)
    train.main(command)
    folder = command.out / "lipsum" / "seed-0"
    assert json.loads((folder / "results.json").read_text())["selection"] == {
        "accuracy": 0.6,
        "step": 4,
    }
    np.testing.assert_array_equal(load_file(folder / "best" / "head.safetensors")["head"], kept[1])


def test_steps_that_are_due() -> None:
    """Every third, and the last one: of a method without steps, that is step 0."""
    assert [step for step in range(9) if train.is_due(step, 3, 8)] == [3, 6, 8]
    assert train.is_due(0, 3, 0)


def test_exported_benchmark_gives_the_same_numbers(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--data minidomain`, and `--data domainnet` on the exported PNG files."""
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(minidomain, "SIZES", {"train": 40, "val": 20, "test": 20})
    export_minidomain.main(tmp_path / "export")
    drawn = changed(
        command,
        data="minidomain",
        data_root=None,
        reference=("real",),
        templates="a {}.",
        augmentation="off",
        method=("ft",),
    )
    read = changed(drawn, data="domainnet", data_root=tmp_path / "export", reference=("real",))
    results = []
    for name, variant in (("drawn", drawn), ("read", read)):
        train.main(changed(variant, out=command.out / name))
        results.append(
            json.loads((command.out / name / "ft" / "seed-0" / "results.json").read_text())
        )
    assert list(results[0]["splits"]) == list(minidomain.DOMAINS)
    for key in ("zero_shot", "selection"):
        assert results[0][key] == results[1][key]
    assert results[0]["splits"] == {
        domain: results[1]["splits"][domain] for domain in minidomain.DOMAINS
    }


def test_the_seed_reaches_the_random_texts(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []

    def stops(state, frozen, batch, key):
        keys.append(jax.random.key_data(key).tolist())
        raise KeyboardInterrupt

    monkeypatch.setattr(lipsum, "training_step", lambda *_: stops)
    with pytest.raises(KeyboardInterrupt):
        train.main(changed(command, seed=(3,)))
    assert keys == [jax.random.key_data(jax.random.key(3)).tolist()]


def test_exact_lipsum_averages_over_the_users_texts(command: Command, tmp_path: Path) -> None:
    """C2 by hand: the mean of the outer products of three texts' features."""
    texts = ["red", "blue paint", "a dog"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    command = changed(command, method=("lipsum-exact",), guidance=tmp_path / "texts.txt")
    (run,) = options.runs(command)
    (setup,) = open_setups([run.sources], options.resolved(command).execution, 8)
    frozen = train.freeze(run, setup)
    model, tokenizer = weights.load(command.sources.model)
    features = [
        model.text(jnp.asarray(ids)) for ids in clip.tokenize(tokenizer, texts, model.config)
    ]
    expected = sum(np.outer(x, x) / np.sum(np.square(x)) for x in features) / 3
    np.testing.assert_allclose(frozen.second_moment, expected, atol=1e-6)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ("ft", "lipsam")}, "unknown method 'lipsam': did you mean lipsum"),
        ({"data": "domainnett"}, "unknown data set 'domainnett': did you mean domainnet"),
        ({"model": "ViT-B16"}, "unknown model preset 'ViT-B16': did you mean ViT-B/16"),
        ({"model": "missing.pt"}, "weights missing.pt cannot be read"),
        ({"reference": ("reel",)}, "unknown split 'reel': did you mean real"),
        ({"reference": ""}, "--reference is needed with --data domainnet: one of real, sketch"),
        ({"shifts": ("sketsh",)}, "unknown split 'sketsh': did you mean sketch"),
        ({"shifts": ("real",)}, "'real' is the reference and a shift at once"),
        ({"data_root": None}, "--data-root is needed with --data domainnet"),
        ({"data": "minidomain"}, "--data minidomain is drawn, not read from --data-root"),
        ({"data_root": Path("nowhere")}, "nowhere has no DOMAIN_test.txt (found: no such folder)"),
        ({"steps": (0,)}, "--steps is 0: give at least 1"),
        ({"warmup": 1.5}, "--warmup is 1.5"),
        ({"learning_rate": (float("nan"),)}, "--learning-rate is nan"),
        ({"batch_size": (12,)}, "--batch-size 12 does not divide among 8 devices"),
        (
            {"text_length": (39,)},
            "--text-length 39 with start and end token is over the model's context of 40",
        ),
        (
            {"templates": "a photo"},
            "--templates 'a photo' is neither openai nor a prompt with {}, and as a file it cannot",
        ),
        ({"templates": "a {} " + "x" * 60}, "tokens, the model takes 38: shorten it"),
        ({"seed": (-1,)}, "--seed"),
        ({"method": ("clip",)}, "unknown method 'clip'"),
        ({"data": "captions"}, "unknown data set 'captions'"),
        (
            {"method": ("ft", "car-ft")},
            "car-ft compares prompts with each other, --templates has one",
        ),
        (
            {"method": ("kld-random",), "num_texts": (4, 1)},
            "kld-random compares texts with each other, --num-texts is",
        ),
        (
            {"method": ("scratch-ft",), "fixed_head": True},
            "--fixed-head keeps the head of scratch-ft at zeros",
        ),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(
    changes: dict[str, object],
    message: str,
    command: Command,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path,
) -> None:
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "cache"))
    assert errors.exit_code(lambda: train.main(changed(command, **changes))) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not command.out.exists()


def test_what_the_prompts_cannot_tell_apart_is_said(command: Command, tmp_path: Path) -> None:
    """Texts that are equal after OpenAI's cleaning, and unseen classes that a split lacks, get a
    warning each.
    """
    (tmp_path / "prompts.txt").write_text("a {}.\nA  {}.\n")
    command = changed(command, method=("mse-fixed",), templates=str(tmp_path / "prompts.txt"))
    runs = list(options.runs(command))
    (setup,) = open_setups([runs[0].sources], options.resolved(command).execution, 8)
    assert list(checks.warnings_for_setup(setup, runs)) == [
        f"--templates {tmp_path / 'prompts.txt'} repeats prompts, which count as often: A  {{}}.",
        "mse-fixed with one prompt holds one direction of the features: "
        "give --templates openai or several",
    ]
    sketch = data.take(
        setup.data.reports["sketch"], np.flatnonzero(setup.data.reports["sketch"].labels), "sketch"
    )
    reports = setup.data.reports | {"sketch": sketch}
    images = setup.data.train
    without_dogs = data.take(images, np.flatnonzero(images.labels != 1), "train")
    setup = dataclasses.replace(
        setup,
        model=dataclasses.replace(setup.model, templates=("a {}.",)),
        classes=("dog", "ice cream", "Dog"),
        seen=np.array([1, 2]),
        data=dataclasses.replace(setup.data, train=without_dogs, reports=reports),
    )
    assert list(checks.warnings_for_setup(setup, [])) == [
        "classes with the prompts of an earlier class are never predicted zero-shot: Dog",
        "1 classes have no training image (dog): add some, or give --unseen",
        "sketch lacks all 1 unseen classes: its unseen accuracy is over those that it has",
    ]


def test_existing_run_is_not_touched(command: Command, capsys) -> None:
    folder = command.out / "lipsum" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("precious")
    assert errors.exit_code(lambda: train.main(command)) == 2
    assert (
        f"{folder} holds a run: give --resume, --overwrite or another --out"
        in capsys.readouterr().err
    )
    assert (folder / "results.json").read_text() == "precious"


def test_broken_image_stops_before_training(
    command: Command, tmp_path: Path, root: Path, capsys
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in root.iterdir():
        (copy / path.name).symlink_to(path) if path.is_dir() else (copy / path.name).write_bytes(
            path.read_bytes()
        )
    (copy / "cut.png").write_bytes((root / "real/dog/test0.png").read_bytes()[:200])
    lines = (copy / "real_train.txt").read_text().splitlines()
    lines[7] = "ice_cream/../cut.png 0"
    (copy / "ice_cream").mkdir()
    (copy / "real_train.txt").write_text("\n".join(lines))
    os.rename(copy / "cut.png", copy / "ice_cream" / "cut.png")
    lines[7] = "ice_cream/cut.png 0"
    (copy / "real_train.txt").write_text("\n".join(lines))
    assert errors.exit_code(lambda: train.main(changed(command, data_root=copy))) == 2
    error = capsys.readouterr().err
    assert f"{copy / 'real_train.txt'} line 8" in error and "cut.png is no readable image" in error
    assert not command.out.exists()


def test_command_line(model: Path, root: Path, tmp_path: Path) -> None:
    """The real commands in their own processes: --help, a run, its table, an unknown method."""
    folder = Path(train.__file__).parent

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    shown = run("train.py", "--help")
    assert shown.returncode == 0
    assert shown.stderr == "" and "(default: )" not in shown.stdout
    boxes = (options.Command, options.Sources, lipsum.Settings, options.Execution, options.Cluster)
    named = {field.name for box in boxes for field in dataclasses.fields(box)}
    for name in named - {"sources", "settings", "execution", "cluster", "sweep"}:
        assert errors.flag(name) in shown.stdout
    for title in ("sources", "settings", "execution", "cluster"):
        assert f"─ {title} options ─" in shown.stdout
    common = (
        "--model",
        str(model),
        "--data",
        "domainnet",
        "--data-root",
        str(root),
        "--templates",
        "a {}.",
        "--reference",
        "real",
        "--out",
        str(tmp_path / "runs"),
    )
    done = run(
        "train.py", "--method", "ft", *common, "--steps", "2", "--batch-size", "4", "--workers", "1"
    )
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stderr
    table = run("eval.py", "table", str(tmp_path / "runs"))
    assert table.returncode == 0 and done.stdout.endswith(table.stdout)
    assert "NLL" in run("eval.py", "table", str(tmp_path / "runs"), "--metric", "nll").stdout
    failed = run("train.py", "--method", "fft", *common)
    assert failed.returncode == 2 and failed.stderr.startswith(
        "error: unknown method 'fft': did you mean ft"
    )
    assert failed.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------- sweeps


def test_sweep_over_references_and_rates(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each reference has its own data and table.

    Finished runs are kept if their settings are unchanged.
    """
    sweep = changed(
        command, method=("ft",), reference=("real", "sketch"), learning_rate=(1e-3, 1e-2)
    )
    train.main(sweep)
    output = capsys.readouterr().out
    first, second = output[output.index("accuracy") :].split("accuracy, %")[1:]
    assert first.split()[:2] == ["real", "sketch"] and second.split()[:2] == ["sketch", "real"]
    assert "FT (learning rate 0.001)" in first and "FT (learning rate 0.01)" in second
    results = json.loads(
        (command.out / "ft/seed-0-learning-rate-0.01-reference-sketch/results.json").read_text()
    )
    assert (
        results["splits"]["sketch"]["role"] == "reference"
        and results["settings"]["learning_rate"] == 0.01
    )
    train.main(changed(sweep, resume=True))
    assert capsys.readouterr().out.count("is finished: kept") == 4
    other = changed(sweep, resume=True, warmup=0.5)
    assert errors.exit_code(lambda: train.main(other)) == 2
    assert "was made with other settings (--warmup 0.1, now 0.5)" in capsys.readouterr().err


# ---------------------------------------------------------------------------- generalised zero-shot


def test_unseen_classes_are_reported_and_not_trained(
    command: Command, tmp_path: Path, capsys
) -> None:
    (tmp_path / "unseen.txt").write_text("guitar\n")
    command = changed(command, method=("ft",), unseen_file=tmp_path / "unseen.txt")
    train.main(command)
    output = capsys.readouterr().out
    assert "3 classes (2 seen), 18 images to train on, 2 to select on" in output
    folder = command.out / "ft" / "seed-0"
    results = json.loads((folder / "results.json").read_text())
    assert results["settings"]["fixed_head"] and results["settings"]["unseen"] == ["guitar"]

    # Against brute force: the saved model over all three classes, image by image.
    (run,), setup = finished_runs.open_runs([folder], options.Places())
    assert setup.data.train.classes == ("ice cream", "dog") and set(setup.data.train.labels) == {
        0,
        1,
    }
    np.testing.assert_array_equal(run.classifier.head, setup.zero_shot.head)
    split = setup.data.reports["sketch"]
    features_of = jax.jit(clip.image_features)
    right = {0: [], 1: [], 2: []}
    for file, label in zip(split.images, split.labels, strict=True):
        image = jnp.asarray(data.read_image(file, clip.Preparation(16)))
        features = features_of(run.classifier.vision, image[None])[0]
        right[int(label)].append(int(jnp.argmax(features @ run.classifier.head)) == label)
    seen, unseen = np.mean(right[0] + right[1]), np.mean(right[2])
    assert (
        results["splits"]["sketch"]["seen"] == seen
        and results["splits"]["sketch"]["unseen"] == unseen
    )
    evaluation.wise_command(given(folder), alphas=(0.5,))
    evaluation.tpgm_command(given(folder), steps=2, batch_size=8)
    tables.table_command((command.out,), metric="harmonic-mean")
    assert "harmonic mean of seen and unseen" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unseen": ("gitar",)}, "unknown class 'gitar': did you mean guitar"),
        ({"unseen": ("dog", "ice_cream")}, "--unseen holds back 2 of 3 classes"),
        (
            {"unseen": ("dog",), "method": ("scratch-ft",)},
            "--unseen keeps the zero-shot head, scratch-ft starts from",
        ),
        ({"unseen_file": Path("nowhere.txt")}, "--unseen-file nowhere.txt cannot be read"),
    ],
)
def test_bad_unseen_classes(changes: dict[str, object], message: str, command: Command) -> None:
    with pytest.raises(errors.InputError, match=message):
        train.main(changed(command, **changes))


# ---------------------------------------------------------------------------- all methods, post-hoc


def test_methods_that_start_elsewhere(command: Command, tmp_path: Path) -> None:
    """LP trains only the head, LP-FT starts there, Scratch-FT at zeros; a fixed head stays;
    guidance is read.
    """
    (tmp_path / "texts.txt").write_text("red\nblue paint\na dog\nthe guitar\n")
    fixed = changed(
        command,
        method=("lp", "lp-ft", "lipsum-exact"),
        fixed_head=True,
        guidance=tmp_path / "texts.txt",
    )
    train.main(fixed)
    # At a rate of zero, Scratch-FT stays where it starts.
    train.main(changed(command, method=("scratch-ft",), learning_rate=(0.0,)))
    runs = {
        name: finished_runs.read_run(command.out / name / "seed-0")
        for name in (*fixed.method, "scratch-ft")
    }
    zero_shot, _ = weights.load(command.sources.model)
    np.testing.assert_array_equal(runs["scratch-ft"].classifier.head, 0)
    np.testing.assert_array_equal(runs["lp"].classifier.head, runs["lp-ft"].classifier.head)
    for old, new in zip(
        jax.tree.leaves(zero_shot.vision),
        jax.tree.leaves(runs["lp"].classifier.vision),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    assert runs["lp"].results["steps"] == 0 and runs["lp-ft"].results["steps"] == 6
    # Three colours are three classes: a linear probe of a random tower classifies them better than
    # chance.
    assert runs["lp"].results["splits"]["real"]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n\nb\n", "line 2 is empty"),
        ("a\n" + "word " * 40, "line 2: the text .* tokens, the model takes 38"),
        ("a\nb\n", "has 2 texts: give at least --num-texts 4"),
        ("a b\nA  b\n" * 3, "has one text 6 times: give different ones"),
    ],
)
def test_bad_guidance(command: Command, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "texts.txt").write_text(text)
    with pytest.raises(errors.InputError, match=message):
        train.main(changed(command, guidance=tmp_path / "texts.txt"))


# ------------------------------------------------------------------------ analysis of finished runs


@pytest.mark.parametrize(
    ("data_set", "tree", "reference"),
    [("cub", "cub", "cub"), ("folder", "zoo", "val"), ("imagenet",) * 3],
)
def test_every_layout_trains_and_evaluates(
    data_set: str,
    tree: str,
    reference: str,
    command: Command,
    request: pytest.FixtureRequest,
    capsys,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """From the options to a table. domainnet has its own tests above."""
    root = request.getfixturevalue(tree)
    said = {
        "data": data_set,
        "data_root": root,
        "templates": "{}",
        "steps": (2,),
        "method": ("lipsum",),
    }
    command = changed(command, out=tmp_path_factory.mktemp("runs"))  # not where the images are
    train.main(changed(command, reference=(reference,), **said))
    assert "Lipsum-FT" in capsys.readouterr().out
    results = json.loads((command.out / "lipsum/seed-0/results.json").read_text())
    assert next(iter(results["splits"])) == reference and results["steps"] == 2


def test_from_python_in_a_thread(command: options.Command) -> None:
    """A second run of the process, outside its main thread; signal handlers stay as they were."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    failed = []

    def run(out: Path) -> None:
        try:
            train.main(changed(command, method=("ft",), steps=2, out=out))
        except BaseException as error:
            failed.append(error)

    train.main(changed(command, method=("ft",), steps=2, out=command.out / "a"))
    thread = threading.Thread(target=run, args=(command.out / "b",))
    thread.start()
    thread.join()
    assert not failed and [signal.getsignal(number) for number in numbers] == before
    a, b = (command.out / out / "ft" / "seed-0" / "results.json" for out in "ab")
    assert json.loads(a.read_text())["splits"] == json.loads(b.read_text())["splits"]
