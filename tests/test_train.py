"""The command line end to end, on a tiny random CLIP and tiny trees of images."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeded
from PIL import Image
from safetensors.numpy import load_file
from test_clip import config_of

import clip
import data
import eval as evaluation
import lipsum
import minidomain
import train
import weights

CLASSES = ("ice_cream", "dog", "guitar")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP whose tokenizer knows bytes alone."""
    symbols = clip.byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), clip.START_TEXT, clip.END_TEXT]
    tokenizer = clip.bpe_tokenizer({word: index for index, word in enumerate(words)}, [])
    sizes = seeded.ARCHITECTURES["tiny"] | {"image_size": 16, "context_length": 40, "vocabulary_size": len(words)}
    state = seeded.hugging_face_weights(sizes, seeded.SEED)
    folder = tmp_path_factory.mktemp("model")
    weights.save(folder, weights.from_state_dict(state, config_of(sizes), "hugging_face", "seeded"), tokenizer)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DomainNet's layout: two domains, three classes told by their colour."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for domain in ("real", "sketch"):
        for split, number in (("train", 10), ("test", 4)):
            lines = []
            for label, name in enumerate(CLASSES):
                (folder / domain / name).mkdir(parents=True, exist_ok=True)
                for index in range(number):
                    pixels = random.integers(0, 120, (20, 24, 3), dtype=np.uint8)
                    pixels[..., label] += 120
                    path = f"{domain}/{name}/{split}{index}.png"
                    Image.fromarray(pixels).save(folder / path)
                    lines.append(f"{path} {label}\n")
            (folder / f"{domain}_{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def options(model: Path, root: Path, tmp_path: Path) -> train.Options:
    return train.Options(
        model=str(model), data="domainnet", data_root=root, reference="real", steps=6, batch_size=8, learning_rate=1e-3,
        num_texts=4, text_length=3, eval_every=2, checkpoint_every=100, workers=1, out=tmp_path / "runs",
    )  # fmt: skip


def test_run_from_start_to_table(options: train.Options, capsys: pytest.CaptureFixture[str]) -> None:
    options = dataclasses.replace(options, method=("ft", "lipsum"), seed=(0, 1), steps=12)
    train.main(options)
    table = capsys.readouterr().out.splitlines()[-5:]
    assert table[0].split() == ["accuracy,", "%", "real", "sketch", "mean", "of", "shifts"]
    assert [line.split()[0] for line in table[2:]] == ["zero-shot", "FT", "Lipsum-FT"] and "±" in table[4]
    assert "\n".join(table) == evaluation.table(evaluation.read_results([options.out]), "accuracy")

    folder = options.out / "lipsum" / "seed-1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best", "checkpoint", "config.json", "metrics.jsonl", "results.json",
    ]  # fmt: skip
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10, 12]
    assert list(lines[0])[:2] == ["step", "loss"]
    for line in lines:
        np.testing.assert_allclose(line["loss"], line["cross_entropy"] + line["regularizer"], rtol=1e-5)
        assert line["images_per_second"] > 0 and line["gradient_norm"] > 0
    results = json.loads((folder / "results.json").read_text())
    assert (results["method"], results["seed"], results["steps"], results["data"]) == ("lipsum", 1, 12, "domainnet")
    assert {name: split["role"] for name, split in results["splits"].items()} == {
        "real": "reference",
        "sketch": "shift",
    }
    assert results["settings"]["num_texts"] == 4 and results["seconds"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["classes"] == ["ice cream", "dog", "guitar"] and config["versions"]["jax"] == jax.__version__

    # The selected model is a model: loaded again, with its head, it has the results that were written.
    best, _ = weights.load(str(folder / "best"))
    head = load_file(folder / "best" / "head.safetensors")["head"]
    assert json.loads((folder / "best" / "classes.json").read_text()) == config["classes"]
    split = data.read_domainnet(options.data_root, "real", ("sketch",), "val").reports["sketch"]
    again = evaluation.evaluate(
        [lipsum.Classifier(best.vision, jnp.asarray(head))], jnp.exp(best.logit_scale), split, 8, 1, data.device_mesh(8)
    )
    assert again["accuracy"] == results["splits"]["sketch"]["accuracy"]
    np.testing.assert_allclose(again["nll"], results["splits"]["sketch"]["nll"], rtol=1e-6)
    zero_shot, _ = weights.load(options.model)
    assert not np.array_equal(zero_shot.vision.projection.weight, best.vision.projection.weight)
    for old, new in zip(jax.tree.leaves(zero_shot.text), jax.tree.leaves(best.text), strict=True):
        np.testing.assert_array_equal(old, new)


def test_same_seed_same_bits(options: train.Options) -> None:
    for name in ("a", "b"):
        train.main(dataclasses.replace(options, out=options.out / name))
    first, second = (options.out / name / "lipsum/seed-0/best/model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_the_most_accurate_model_is_kept(options: train.Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Selection accuracies 0.2, 0.6, 0.6 after steps 2, 4 and 6: the first of the best wins."""
    kept = []
    selection = iter([0.2, 0.6, 0.6])

    def evaluate(members, tau, split, *rest):
        if split.name == "val":
            kept.append(np.array(members[0].head))
            return {"n": 3, "accuracy": next(selection), "ece": 0.0, "nll": 0.0}
        return {"n": 12, "accuracy": 0.5, "ece": 0.0, "nll": 0.0}

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    train.main(options)
    folder = options.out / "lipsum" / "seed-0"
    assert json.loads((folder / "results.json").read_text())["selection"] == {"accuracy": 0.6, "step": 4}
    np.testing.assert_array_equal(load_file(folder / "best" / "head.safetensors")["head"], kept[1])


def test_interrupted_run_resumes_to_the_same_bits(options: train.Options, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = dataclasses.replace(options, out=options.out / "unbroken")
    train.main(unbroken)

    def breaks(state, *rest):
        if int(state.step) == 4:  # a checkpoint was made at step 4
            raise KeyboardInterrupt
        return lipsum.lipsum_step(state, *rest)

    broken = dataclasses.replace(options, out=options.out / "broken")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setitem(lipsum.METHODS, "lipsum", lipsum.Method("Lipsum-FT", breaks))
        train.main(broken)
    folders = [options.out / name / "lipsum" / "seed-0" for name in ("unbroken", "broken")]
    with open(folders[1] / "metrics.jsonl", "a") as log:
        log.write('{"step": 5, "lo')  # what a kill may leave
    assert not (folders[1] / "results.json").exists()
    train.main(dataclasses.replace(broken, resume=True))
    contents = []
    for folder in folders:
        losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        results = json.loads((folder / "results.json").read_text())["splits"]
        contents.append(((folder / "best/model.safetensors").read_bytes(), losses, results))
    assert contents[0] == contents[1]


def test_resume_keeps_finished_runs_and_refuses_other_settings(options: train.Options, capsys) -> None:
    train.main(options)
    folder = options.out / "lipsum" / "seed-0"
    before = (folder / "results.json").stat().st_mtime_ns
    train.main(dataclasses.replace(options, resume=True))
    assert "is finished: kept" in capsys.readouterr().out
    assert (folder / "results.json").stat().st_mtime_ns == before
    (folder / "results.json").unlink()
    assert evaluation.exit_code(lambda: train.main(dataclasses.replace(options, resume=True, weight=2.0))) == 2
    assert "made with other settings (weight)" in capsys.readouterr().err
    (folder / "checkpoint" / "state.eqx").write_bytes(b"{}\n")
    assert evaluation.exit_code(lambda: train.main(dataclasses.replace(options, resume=True))) == 2
    assert "cannot be read" in capsys.readouterr().err
    train.main(dataclasses.replace(options, overwrite=True))
    assert (folder / "results.json").exists()


def test_exported_benchmark_gives_the_same_numbers(
    options: train.Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--data minidomain`, and `--data domainnet` on what `minidomain.py --export` wrote."""
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(minidomain, "SIZES", {"train": 40, "val": 20, "test": 20})
    minidomain.main(export=tmp_path / "export")
    drawn = dataclasses.replace(
        options,
        data="minidomain",
        data_root=None,
        reference=None,
        templates="a {}.",
        augmentation="off",
        method=("ft",),
    )
    read = dataclasses.replace(drawn, data="domainnet", data_root=tmp_path / "export", reference="real")
    results = []
    for name, variant in (("drawn", drawn), ("read", read)):
        train.main(dataclasses.replace(variant, out=options.out / name))
        results.append(json.loads((options.out / name / "ft" / "seed-0" / "results.json").read_text()))
    assert list(results[0]["splits"]) == list(minidomain.DOMAINS)
    for key in ("zero_shot", "selection"):
        assert results[0][key] == results[1][key]
    assert results[0]["splits"] == {domain: results[1]["splits"][domain] for domain in minidomain.DOMAINS}


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ("ft", "lipsam")}, "unknown method 'lipsam': did you mean lipsum"),
        ({"data": "domainnett"}, "unknown data set 'domainnett': did you mean domainnet"),
        ({"model": "ViT-B16"}, "unknown model preset 'ViT-B16': did you mean ViT-B/16"),
        ({"model": "missing.pt"}, "missing.pt do not exist"),
        ({"reference": "reel"}, "unknown split 'reel': did you mean real"),
        ({"reference": None}, "--reference is needed with --data domainnet: one of real, sketch"),
        ({"shifts": ("sketsh",)}, "unknown split 'sketsh': did you mean sketch"),
        ({"shifts": ("real",)}, "'real' is the reference and a shift at once"),
        ({"data_root": None}, "--data-root is needed with --data domainnet"),
        ({"data": "minidomain"}, "--data minidomain is drawn, not read from --data-root"),
        ({"data_root": Path("nowhere")}, "--data-root nowhere has no DOMAIN_test.txt (found: no such folder)"),
        ({"steps": 0}, "--steps is 0: give at least 1"),
        ({"warmup": 1.5}, "--warmup is 1.5"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"batch_size": 12}, "--batch-size 12 does not divide among 8 devices"),
        ({"text_length": 39}, "--text-length 39 with start and end token is over the model's context of 40"),
        ({"templates": "a photo"}, "--templates 'a photo' is neither a prompt with {} nor a readable file"),
        ({"templates": "a {} " + "x" * 60}, "tokens, the model takes 38: shorten it"),
        ({"seed": (-1,)}, "--seed"),
        ({"method": ("ft", "clip")}, "--method clip trains one model: give it alone"),
        ({"method": ("clip",)}, "unknown captioned data set 'domainnet'"),
        ({"data": "captions"}, "unknown data set 'captions'"),
    ],
)
def test_bad_input_is_one_line_and_makes_nothing(
    changes: dict[str, object], message: str, options: train.Options, capsys, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("LIPSUM_CACHE", str(tmp_path / "cache"))
    assert evaluation.exit_code(lambda: train.main(dataclasses.replace(options, **changes))) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not options.out.exists()


def test_existing_run_is_not_touched(options: train.Options, capsys) -> None:
    folder = options.out / "lipsum" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("precious")
    assert evaluation.exit_code(lambda: train.main(options)) == 2
    assert f"{folder} holds a run: give --resume, --overwrite or another --out" in capsys.readouterr().err
    assert (folder / "results.json").read_text() == "precious"


def test_broken_image_stops_before_training(options: train.Options, tmp_path: Path, root: Path, capsys) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in root.iterdir():
        (copy / path.name).symlink_to(path) if path.is_dir() else (copy / path.name).write_bytes(path.read_bytes())
    (copy / "cut.png").write_bytes((root / "real/dog/test0.png").read_bytes()[:200])
    lines = (copy / "real_train.txt").read_text().splitlines()
    lines[7] = "ice_cream/../cut.png 0"
    (copy / "ice_cream").mkdir()
    (copy / "real_train.txt").write_text("\n".join(lines))
    os.rename(copy / "cut.png", copy / "ice_cream" / "cut.png")
    lines[7] = "ice_cream/cut.png 0"
    (copy / "real_train.txt").write_text("\n".join(lines))
    assert evaluation.exit_code(lambda: train.main(dataclasses.replace(options, data_root=copy))) == 2
    error = capsys.readouterr().err
    assert f"{copy / 'real_train.txt'} line 8" in error and "cut.png is no readable image" in error
    assert not options.out.exists()


def test_loss_that_is_not_finite_names_the_step(options: train.Options, capsys) -> None:
    assert evaluation.exit_code(lambda: train.main(dataclasses.replace(options, learning_rate=1e30, warmup=0.0))) == 2
    assert "lower --learning-rate" in capsys.readouterr().err


def test_command_line(model: Path, root: Path, tmp_path: Path) -> None:
    """The real commands in processes of their own: --help, a run, its table, an unknown method."""
    folder = Path(train.__file__).parent

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=300
        )

    shown = run("train.py", "--help")
    assert shown.returncode == 0
    for field in dataclasses.fields(train.Options):
        assert f"--{field.name.replace('_', '-')}" in shown.stdout
    common = (
        "--model",
        str(model),
        "--data",
        "domainnet",
        "--data-root",
        str(root),
        "--reference",
        "real",
        "--out",
        str(tmp_path / "runs"),
    )
    done = run("train.py", "--method", "ft", *common, "--steps", "2", "--batch-size", "4", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stderr
    table = run("eval.py", "table", str(tmp_path / "runs"))
    assert table.returncode == 0 and done.stdout.endswith(table.stdout)
    assert "NLL" in run("eval.py", "table", str(tmp_path / "runs"), "--metric", "nll").stdout
    failed = run("train.py", "--method", "fft", *common)
    assert failed.returncode == 2 and failed.stderr.startswith("error: unknown method 'fft': did you mean ft")
    assert failed.stderr.count("\n") == 1
