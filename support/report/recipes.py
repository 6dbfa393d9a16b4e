"""Each table and figure of the paper as the commands that make it, from training to print.

Paper: https://openreview.net/forum?id=2JF8mJRJ7M. `python -m support.report.recipes` lists them;
`python -m support.report.recipes table-10` prints the commands, `--run` runs them one after the
other, and `--short` makes that a few steps on the embedded benchmark. The commands expect the
folders of the data in the environment, as DOMAINNET, IMAGENET and CUB.

Recipes share runs: with --resume, Table 2 keeps those of Table 1. FT with five seeds is trained
once for ten tables and figures.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import tyro

from support.errors import InputError, exit_code
from support.report.tables import COMMAND_LINE

Lines = Iterator[str]
SCENARIOS = ("domainnet", "imagenet")
MODELS = {"b32": "ViT-B/32", "b16": "ViT-B/16", "l14": "ViT-L/14"}
COMPARED = "ft ema l2sp kd car-ft lipsum"
HEADS = "scratch-ft lp-ft ft lp zero-shot"
GUIDANCES = "car-ft kld-random mse-fixed lipsum"
REFERENCES = "painting clipart infograph sketch"
FIVE = "0 1 2 3 4"

RECIPES: dict[str, Callable[[], Lines]] = {}


def recipe(lines: Callable[..., Lines]) -> Callable[..., Lines]:
    """Adds a recipe under its function's name, as `table-10`."""
    RECIPES[lines.__name__.replace("_", "-")] = lines
    return lines


# ------------------------------------------------------------------------------- command lines


def train(
    data: str, methods: str, model: str = "b16", options: str = "", name: str = "", seed: str = FIVE
) -> str:
    """Returns the command that trains by the methods, in a folder per scenario and model."""
    words = f'python train.py --protocol paper --data {data} --data-root "${data.upper()}"'
    words += f" --model {MODELS[model]} --method {methods} --seed {seed} {options}".rstrip()
    return f"{words} --out paper/{name or f'{data}-{model}'} --resume"


def runs(folder: str, methods: str) -> str:
    """Returns the folders of the methods' runs."""
    return " ".join(f"paper/{folder}/{method}" for method in methods.split())


def table(folders: str, values: str = "", options: str = "") -> str:
    """Returns the command that prints a table, with the paper's `values` below it."""
    paper = f"--paper {values}" if values else ""
    return " ".join(filter(None, ["python eval.py table", folders, options, paper]))


def figures(folders: str, name: str, options: str = "--files-only") -> str:
    """Returns the command that draws the figures of runs."""
    words = ["python eval.py figures", folders, options, f"--out paper/figures/{name}"]
    return " ".join(filter(None, words))


def post_hoc(folder: str) -> Lines:
    """Yields the commands of WiSE, TPGM and TPGM-C on FT and Lipsum-FT."""
    found = f"paper/{folder}/ft/seed-* paper/{folder}/lipsum/seed-*"
    yield f"python eval.py wise {found} --alphas 1 0.9 0.8 0.7 0.6 0.5 --overwrite"
    yield f"python eval.py tpgm {found} --overwrite"
    yield f"python eval.py tpgm {found} --penalty 0.1 0.2 0.5 1 2 5 --overwrite"


# ------------------------------------------------------------------------------------- tables


@recipe
def table_1() -> Lines:
    """Accuracy, ViT-B/16."""
    for data in SCENARIOS:
        yield train(data, f"zero-shot {COMPARED}")
        yield table(runs(f"{data}-b16", f"zero-shot {COMPARED}"), f"table-1/{data}")


@recipe
def table_2() -> Lines:
    """ECE and NLL, ViT-B/16."""
    for data in SCENARIOS:
        yield train(data, f"zero-shot {COMPARED}")
        for metric in ("ece", "nll"):
            folders = runs(f"{data}-b16", f"zero-shot {COMPARED}")
            yield table(folders, f"table-2/{data}/{metric}", f"--metric {metric}")


@recipe
def table_3() -> Lines:
    """Loss and text guidance, DomainNet."""
    yield train("domainnet", GUIDANCES)
    yield table(runs("domainnet-b16", GUIDANCES), "table-3")


@recipe
def table_4() -> Lines:
    """Heads at the start of fine-tuning."""
    for data in SCENARIOS:
        for model in MODELS:
            yield train(data, HEADS, model)
            yield table(runs(f"{data}-{model}", HEADS), f"table-4/{data}/{model}")


@recipe
def table_5() -> Lines:
    """Accuracy, ViT-B/32 and ViT-L/14."""
    for model in ("b32", "l14"):
        for data in SCENARIOS:
            yield train(data, f"zero-shot {COMPARED}", model)
            folders = runs(f"{data}-{model}", f"zero-shot {COMPARED}")
            yield table(folders, f"table-5/{data}/{model}")


@recipe
def table_6(data: str = "domainnet", values: str = "table-6") -> Lines:
    """WiSE, TPGM and TPGM-C on FT and Lipsum-FT, DomainNet."""
    yield train(data, "ft lipsum")
    yield from post_hoc(f"{data}-b16")
    found = runs(f"{data}-b16", "ft+wise* ft+tpgm* lipsum+wise* lipsum+tpgm*")
    yield table(found, values)


@recipe
def table_7() -> Lines:
    """WiSE, TPGM and TPGM-C on FT and Lipsum-FT, ImageNet."""
    yield from table_6("imagenet", "table-7")


@recipe
def table_8() -> Lines:
    """Length and number of the random texts."""
    for data in SCENARIOS:
        for values in ("--text-length 1 2 4 8 16 32", "--num-texts 10 20 40 160 320"):
            yield train(data, "lipsum", options=values, name=f"table-8-{data}")
        yield table(f"paper/table-8-{data}", f"table-8/{data}")


@recipe
def table_9() -> Lines:
    """Loss and text guidance, both scenarios."""
    for data in SCENARIOS:
        yield train(data, GUIDANCES)
        yield table(runs(f"{data}-b16", GUIDANCES), f"table-9/{data}")


@recipe
def table_10() -> Lines:
    """Other references, with the mean over all splits."""
    yield train("domainnet", COMPARED, options=f"--reference {REFERENCES}", name="table-10")
    for reference in REFERENCES.split():
        found = f"paper/table-10/*/*-reference-{reference}"
        yield table(found, f"table-10/{reference}", "--average all")


@recipe
def table_11() -> Lines:
    """Generalised zero-shot, CUB: three trials. CoOp and SHIP are the paper's quotations."""
    methods = "zero-shot ft car-ft lipsum"
    options = '--unseen-file "$CUB/unseen.txt"'
    yield train("cub", methods, options=options, name="table-11", seed="0 1 2")
    for metric in ("seen", "unseen", "harmonic-mean"):
        yield table("paper/table-11", f"table-11/{metric}", f"--metric {metric}")


# ------------------------------------------------------------------------- figures and section B.3


@recipe
def figure_2(
    data: str = "domainnet", steps: str = "1000 3000 5000", name: str = "figure-2"
) -> Lines:
    """FT over rates and steps, DomainNet; also Figure 8. The values are ours: the text has none."""
    values = f"--steps {steps} --learning-rate 1e-6 3e-6 1e-5 3e-5"
    yield train(data, "ft", options=values, name=name, seed="0")
    yield figures(f"paper/{name}", name)


@recipe
def figure_3() -> Lines:
    """Feature distortion of FT and LP-FT per model; also Figures 9 to 12."""
    for data in SCENARIOS:
        for model in MODELS:
            yield train(data, "ft lp-ft", model)
        found = " ".join(runs(f"{data}-{model}", "ft lp-ft") for model in MODELS)
        yield figures(found, f"figure-3-{data}")


@recipe
def figure_4() -> Lines:
    """Energy gap of all methods, with WiSE and TPGM; also Figure 13."""
    for data in SCENARIOS:
        yield train(data, COMPARED)
        yield from post_hoc(f"{data}-b16")
        yield figures(runs(f"{data}-b16", f"{COMPARED} ft+wise* ft+tpgm*"), f"figure-4-{data}")


@recipe
def figure_5() -> Lines:
    """WiSE and TPGM-C on FT and Lipsum-FT; also Figure 14."""
    for data in SCENARIOS:
        yield train(data, "ft lipsum")
        yield from post_hoc(f"{data}-b16")
        found = runs(f"{data}-b16", "ft ft+wise* ft+tpgm* lipsum lipsum+wise* lipsum+tpgm*")
        yield figures(found, f"figure-5-{data}")


@recipe
def figure_6() -> Lines:
    """Soups and ensembles. Ranges are those of B.2; which combinations it does not say."""
    for data, steps in {"domainnet": "3000 5000 7000", "imagenet": "30000 50000 70000"}.items():
        values = "--batch-size 128 160 192 224 256 --learning-rate 1e-6 3e-6 1e-5 3e-5"
        name = f"figure-6-{data}"
        yield train(data, "ft lipsum", options=f"{values} --steps {steps}", name=name, seed="0")
        for method in ("ft", "lipsum"):
            for kind in ("soup", "ensemble"):
                yield f"python eval.py {kind} paper/{name}/{method}/seed-* --overwrite"
        yield figures(f"paper/{name}", name)


@recipe
def figure_7() -> Lines:
    """FT over rates and steps, ImageNet."""
    yield from figure_2("imagenet", "10000 30000 50000", "figure-7")


@recipe
def figure_15() -> Lines:
    """Energy vectors before and after fine-tuning; also the example images of Figure 16."""
    for data in SCENARIOS:
        yield train(data, COMPARED)
        yield figures(runs(f"{data}-b16", COMPARED), f"figure-15-{data}", options="")


@recipe
def feat_kd() -> Lines:
    """FeatKD beside Lipsum-FT, ImageNet (B.3)."""
    yield train("imagenet", "feat-kd lipsum")
    yield table(runs("imagenet-b16", "feat-kd lipsum"), "appendix-b.3/feat-kd")


@recipe
def costs() -> Lines:
    """Training costs, ImageNet (B.3): KD, CAR-FT and Lipsum-FT take about 20 % more than FT."""
    yield train("imagenet", COMPARED)
    yield f"python eval.py costs {runs('imagenet-b16', COMPARED)}"


# ------------------------------------------------------------------------------------- running

# What --short leaves out, and the values that it gives instead.
FULL_ONLY = ("--protocol", "--data", "--data-root", "--model", "--unseen-file")
SHORT = {
    "--seed": "0",
    "--steps": "2 4",
    "--batch-size": "8 16",
    "--learning-rate": "1e-4 1e-3",
    "--text-length": "1 8",
    "--num-texts": "10 40",
    "--alphas": "1 0.5",
    "--penalty": "0.1 5",
}
SHORT_SEEDS = {"ViT-B/32": "1", "ViT-L/14": "2"}  # they stand for other models
SHORT_DEFAULTS = {
    "train.py": {"--steps": "24", "--batch-size": "16"},  # 20 steps make a time per step
    "tpgm": {"--steps": "2", "--batch-size": "16"},
}


def commands(name: str, out: Path, short: bool) -> list[str]:
    """Returns the command lines of a recipe, with its files under `out`."""
    lines = [shorten(line) if short else line for line in RECIPES[name]()]
    return [re.sub(r"(?<= )paper/", shlex.quote(f"{out}/").replace("\\", r"\\"), x) for x in lines]


def shorten(line: str) -> str:
    """Returns a command line for a few steps on the embedded benchmark."""
    head, *options = line.split(" --")
    given = {name: value for name, _, value in (option.partition(" ") for option in options)}
    kept = {f"--{name}": value for name, value in given.items() if f"--{name}" not in FULL_ONLY}
    kept = {name: SHORT.get(name, value) for name, value in kept.items()}
    if given.get("model") in SHORT_SEEDS:
        kept["--seed"] = SHORT_SEEDS[given["model"]]
    if "unseen-file" in given:
        kept["--unseen"] = "star heart house"
    for program, defaults in SHORT_DEFAULTS.items():
        if program in head.split():
            kept = defaults | kept
    return " ".join([head, *(f"{name} {value}".rstrip() for name, value in kept.items())])


def run_line(line: str) -> None:
    """Runs a command line with this `python`. Raises InputError if it fails."""
    print(f"+ {line}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(line, shell=True, env=os.environ | {"PATH": path})
    if ended.returncode:
        raise InputError(f"the command above ended with {ended.returncode}: mend it, and run again")


def main(
    name: tyro.conf.Positional[Literal[*RECIPES, ""]] = "",  # pyrefly: ignore[invalid-literal]
    run: bool = False,
    short: bool = False,
    out: Path | None = None,
) -> None:
    """Print the commands that make a table or figure of the paper.

    Args:
        name: The recipe, such as table-10. Without it: the list of all.
        run: Run them one after the other. Finished runs are kept.
        short: A few steps on the embedded benchmark instead.
        out: Folder of the runs and figures. None: paper, with --short paper-short.
    """
    if not name:
        for each, lines in RECIPES.items():
            print(f"{each:10} {lines.__doc__}")
        return
    command_lines = commands(name, out or Path("paper-short" if short else "paper"), short)
    if run:
        check_environment(command_lines)
    for line in command_lines:
        run_line(line) if run else print(line)


def check_environment(lines: Sequence[str]) -> None:
    """Raises InputError if a variable with the folder of a data set is missing."""
    for variable in sorted(set(re.findall(r"\$(\w+)", " ".join(lines)))):
        if variable not in os.environ:
            raise InputError(
                f"{variable} is not set: export {variable}=DIR, the folder of the data"
            )


if __name__ == "__main__":
    sys.exit(exit_code(lambda: tyro.cli(main, config=COMMAND_LINE)))
