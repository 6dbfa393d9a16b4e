"""The rules of the house: what may import what, and documents that say what the code does."""

import ast
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tyro

import clip
import eval as evaluation
import lipsum
from support.errors import InputError
from support.report import figures, recipes, tables
from support.run import options

ROOT = Path(__file__).parents[2]
PATHS = [*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py"), *ROOT.glob("tools/*.py")]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")


MODULES = {module_of(path).removesuffix(".__init__"): path for path in PATHS}
del MODULES["support"]
# From the ground up: a module imports from its own floor and from those below.
FLOORS = [
    {"support.errors"},
    {"support.devices", "support.disk"},
    {"clip", "data"},
    {"lipsum"},
    {"support.weights", "support.layouts"},
    {"support.run"},
    {"support.report"},
    {"eval"},
    {"train"},
    {"tools"},
]


def floor(module: str) -> int:
    """The floor of a module: its own, or that of the folder that it lies in."""
    for number, rooms in enumerate(FLOORS):
        if module in rooms or module.rpartition(".")[0] in rooms:
            return number
    raise AssertionError(f"{module} has no floor")


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # of modules in a folder, or of names in a module
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & MODULES.keys() or {node.module}
    return found & MODULES.keys()


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def test_five_files_at_the_top() -> None:
    top = {name for name in MODULES if "." not in name and MODULES[name].parent == ROOT}
    assert top == {"lipsum", "clip", "data", "eval", "train"}


def test_imports_go_down() -> None:
    """From errors, devices and disk up to tools, which nothing imports."""
    for name, others in IMPORTS.items():
        for other in others:
            assert floor(other) <= floor(name), f"{name} imports {other}"


def test_no_circles() -> None:
    """Modules can be removed one by one, each after all that it imports."""
    left = dict(IMPORTS)
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


# ----------------------------------------------------------------------------------- documents


def code_after(mark: str) -> str:
    """The code block of the README that follows a comment."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_readme_shows_the_code_of_the_idea() -> None:
    assert code_after("lipsum_loss") in (ROOT / "lipsum.py").read_text(encoding="utf-8")


def test_the_readmes_new_method_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is one minus the cosine, which is 0 between equal features and 2 between opposite
    ones.
    """
    monkeypatch.setattr(lipsum, "METHODS", dict(lipsum.METHODS))
    exec(code_after("new method"), vars(lipsum).copy() | {"METHODS": lipsum.METHODS})
    features = clip.normalize(jax.random.normal(jax.random.key(0), (3, 4)))
    loss = lipsum.METHODS["cosine"].loss
    given = lipsum.Given(None, features, features, None, None)
    assert float(loss(given)) == pytest.approx(0, abs=1e-6)
    assert float(loss(given._replace(zero_shot_features=-features))) == pytest.approx(2, abs=1e-6)
    assert jnp.shape(loss(given)) == ()


def understand(line: str) -> None:
    """Raises unless every `python train.py` and `python eval.py` command in a line has options that
    exist.
    """
    for program, text in re.findall(r"python (train|eval)\.py ([^`#&]*)", line):
        if "..." in text or "--help" in text:
            continue
        words = shlex.split(re.sub(r"\{.*\}|\*", "x", text))
        if program == "train":
            options.parse(words)
        else:
            name, *words = words
            with pytest.raises(InputError):  # there are no runs, which comes after the options
                tyro.cli(
                    (tables.COMMANDS | evaluation.COMMANDS)[name],
                    args=words,
                    config=tables.COMMAND_LINE,
                )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_are_understood(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command has options that exist; documents name nothing outside the repository."""
    text = path.read_text(encoding="utf-8")
    assert "../shared" not in text
    for link in re.findall(r"\]\((?!http)([^)]+)\)|src=\"([^\"]+)\"", text):
        assert (path.parent / (link[0] or link[1])).exists(), link
    monkeypatch.chdir(tmp_path)
    for line in text.replace("\\\n", " ").splitlines():
        understand(line)


def test_the_map_of_the_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has every equation, table and figure of the paper, and every recipe.

    The functions that it names exist.
    """
    monkeypatch.chdir(tmp_path)
    found: dict[str, list[int]] = {}
    text = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`((?:table|figure)-\d+|feat-kd|costs)`", text)) == {*recipes.RECIPES}
    for line in text.splitlines():
        match = re.match(r"\| (equation|table|figure|[\d, to]+)\b", line)
        if not match:
            continue
        if match[1].isalpha():
            numbers = found.setdefault(match[1], [])
            continue
        spans = re.findall(r"(\d+)(?: to (\d+))?", match[1])
        numbers += [
            number for first, last in spans for number in range(int(first), int(last or first) + 1)
        ]
        for module, name in re.findall(r"`(lipsum|clip|figures)\.(\w+)`", line):
            assert callable(
                getattr({"lipsum": lipsum, "clip": clip, "figures": figures}[module], name)
            )
    assert {kind: sorted(numbers) for kind, numbers in found.items()} == {
        "equation": list(range(1, 22)), "table": list(range(1, 12)), "figure": list(range(1, 17)),
    }  # fmt: skip
