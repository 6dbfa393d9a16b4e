"""The rules of the house: what may import what, how long a file may be, and documents that say what the code does."""

import ast
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import mutants
import pytest

import clip
import lipsum
from support import options

ROOT = Path(__file__).parents[1]
PATHS = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in PATHS}
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MOST_LINES = {"lipsum": 560, "clip": 520, "data": 430, "eval": 470, "train": 380}


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & MODULES.keys()


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def test_five_files_at_the_top() -> None:
    assert {name for name in MODULES if "." not in name} == MOST_LINES.keys()
    for name, most in MOST_LINES.items():
        assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= most, name


def test_who_may_import_what() -> None:
    """The paper's files import nothing of support but its errors; support imports neither eval nor train."""
    for name in ("clip", "lipsum", "data"):
        assert {other for other in IMPORTS[name] if other.startswith("support.")} <= {"support.errors"}, name
        assert not IMPORTS[name] & {"eval", "train"}, name
    for name in (name for name in MODULES if name.startswith("support.")):
        allowed = {"eval"} if name in ("support.pretrain", "support.bench") else set()
        assert IMPORTS[name] & {"eval", "train"} <= allowed, name


def test_no_circles() -> None:
    """Modules can be removed one by one, each after all that it imports."""
    left = dict(IMPORTS)
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    assert not left


def test_no_function_is_longer_than_a_screen() -> None:
    for path in PATHS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_mutants_fit_their_files() -> None:
    """What each replaces occurs exactly once, and the changed file can be parsed."""
    for mutant in mutants.MUTANTS:
        ast.parse(mutant.source())
        assert mutant.new != mutant.old, mutant.what
    assert mutants.TABLE.keys() == mutants.TESTS.keys()


# ----------------------------------------------------------------------------------------------------------- documents


def code_after(mark: str) -> str:
    """The code block of the README that follows a comment."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", text, re.DOTALL)[1]


def test_the_readme_shows_the_code_of_the_idea() -> None:
    assert code_after("lipsum_loss") in (ROOT / "lipsum.py").read_text(encoding="utf-8")


def test_the_readmes_new_method_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss is one minus the cosine, which is 0 between equal features and 2 between opposite ones."""
    monkeypatch.setattr(lipsum, "METHODS", dict(lipsum.METHODS))
    exec(code_after("new method"), vars(lipsum).copy() | {"METHODS": lipsum.METHODS})
    features = clip.normalize(jax.random.normal(jax.random.key(0), (3, 4)))
    loss = lipsum.METHODS["cosine"].loss
    assert float(loss(None, features, features, None, None)) == pytest.approx(0, abs=1e-6)
    assert float(loss(None, features, -features, None, None)) == pytest.approx(2, abs=1e-6)
    assert jnp.shape(loss(None, features, features, None, None)) == ()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_are_understood(path: Path) -> None:
    """Every `python train.py` command has options that exist; documents name nothing outside the repository."""
    text = path.read_text(encoding="utf-8")
    assert "../shared" not in text and len(text.splitlines()) <= 140
    for line in text.replace("\\\n", " ").splitlines():
        command = re.search(r"python train\.py ([^`#&]*)", line)
        if command and "..." not in command[1]:
            words = shlex.split(command[1])
            assert "--help" in words or options.parse(words)
    for link in re.findall(r"\]\((?!http)([^)]+)\)|src=\"([^\"]+)\"", text):
        assert (path.parent / (link[0] or link[1])).exists(), link
