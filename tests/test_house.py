"""The rules of the house: what may import what."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
           for path in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")) if path.name != "__init__.py"}  # fmt: skip


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
    assert {name for name in MODULES if "." not in name} == {"clip", "lipsum", "data", "eval", "train"}


def test_who_may_import_what() -> None:
    """The paper's files import nothing of support but its errors; support imports neither eval nor train."""
    for name in ("clip", "lipsum", "data"):
        assert {other for other in IMPORTS[name] if other.startswith("support.")} <= {"support.errors"}, name
        assert not IMPORTS[name] & {"eval", "train"}, name
    for name in (name for name in MODULES if name.startswith("support.")):
        allowed = {"eval"} if name in ("support.pretrain", "support.bench") else set()
        assert IMPORTS[name] & {"eval", "train"} <= allowed, name


def test_no_circles() -> None:
    """Modules can be taken away one by one, each when all that it imports is gone."""
    left = dict(IMPORTS)
    while ready := [name for name, others in left.items() if not others & left.keys()]:
        for name in ready:
            del left[name]
    assert not left
