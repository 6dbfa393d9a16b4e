"""What is imported is declared, and constraints.txt has one version of it for every Python."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
RENAMED = {"PIL": "pillow", "sklearn": "scikit-learn"}  # imported under another name


def requirements(texts: list[str]) -> dict[str, Requirement]:
    """Requirements by name, without the project's own extras."""
    found = {canonicalize_name(each.name): each for each in map(Requirement, texts)}
    return {name: each for name, each in found.items() if name != PROJECT["name"]}


INSTALLED = requirements(
    [*PROJECT["dependencies"], *EXTRAS["plots"], *EXTRAS["tensorboard"], *EXTRAS["test"]]
)


def test_what_is_imported_is_declared() -> None:
    paths = [*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py"), *ROOT.glob("tools/*.py")]
    imported: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    own = {path.stem for path in ROOT.glob("*.py")} | {"support", "tools"}
    others = imported - own - sys.stdlib_module_names
    declared = INSTALLED.keys() | requirements(EXTRAS["reference"] + EXTRAS["decode"]).keys()
    assert {canonicalize_name(RENAMED.get(name, name)) for name in others} <= declared


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_constraints_have_one_version_of_each_dependency(python: str, platform: str) -> None:
    """One that pyproject.toml allows. CONTRIBUTING.md has the command that renews them."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": platform,
        "implementation_name": "cpython",
    }
    versions: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        constraint = Requirement(line)
        if constraint.marker is None or constraint.marker.evaluate(environment):
            assert constraint.name not in versions, "two versions"
            versions[constraint.name] = str(constraint.specifier).removeprefix("==")
    for name, requirement in INSTALLED.items():
        assert versions[name] in requirement.specifier, name
    assert not versions.keys() & requirements(EXTRAS["reference"] + EXTRAS["lint"]).keys()


def test_both_commands_of_the_readme_use_the_constraints() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"<!-- (?:main|test) command -->\n```sh\n(.*?)```", text, re.DOTALL)
    assert [command.count("pip install -q -c constraints.txt ") for command in commands] == [1, 1]


def test_linters_have_one_version() -> None:
    """The hooks of a commit run the linters of .ci/run."""
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"additional_dependencies: \[(.*)\]", hooks)) == set(EXTRAS["lint"])
    assert all("==" in linter for linter in EXTRAS["lint"])
