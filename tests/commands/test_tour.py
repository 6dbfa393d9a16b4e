"""The notebook tour.ipynb, executed: it prints what it is stored with, and the answers to its
exercises hold.

`python tests/test_tour.py` stores the outputs again.
"""

import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
TOUR = ROOT / "tour.ipynb"
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")


def execute(notebook: NotebookNode) -> None:
    """Replaces the outputs by those of a new kernel, which runs in the repository's root."""
    kernels = KernelSpecManager(
        kernel_dirs=[]
    )  # no installed kernel, but the one of the running interpreter
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels)
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(
        notebook, km=manager, resources={"metadata": {"path": str(ROOT)}}, **options
    )
    client.execute(cleanup_kc=True)


def answers(notebook: NotebookNode) -> list[str]:
    """The code in the notebook's answers."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return [code for text in texts for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def printed(cell: NotebookNode) -> str:
    """What a cell shows as text, with single spaces: columns are as wide as their numbers."""
    texts = [
        output.get("text", "")
        for output in cell.get("outputs", ())
        if output.get("name") != "stderr"
    ]
    texts += [
        output.data["text/plain"]
        for output in cell.get("outputs", ())
        if "data" in output and "image/png" not in output.data
    ]
    return " ".join(" ".join(texts).split())


def assert_equal_numbers(stored: str, found: str) -> None:
    """Integers are equal; decimals differ by at most 1 %, or by one in the last place.

    Training amplifies the rounding of other CPUs. With weights changed by 1e-6, ten times float32's
    rounding, decimals differ by at most 0.2 %, and no accuracy does. 1 % of an accuracy is up to
    two images of 300.
    """
    for old, new in zip(NUMBER.findall(stored), NUMBER.findall(found), strict=True):
        if "." not in old:
            assert old == new, f"{old} is now {new} in:\n{found}"
            continue
        mantissa, _, exponent = old.partition("e")
        last_place = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert float(new) == pytest.approx(float(old), rel=0.01, abs=1.01 * last_place), (
            f"{old} is now {new}:\n{found}"
        )


@pytest.mark.parametrize("with_answers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_tour_prints_what_it_is_stored_with(
    with_answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")  # there is more to compute than to compile
    stored = nbformat.read(TOUR, as_version=4)
    nbformat.validate(stored)
    found = nbformat.read(TOUR, as_version=4)
    if with_answers:
        found.cells += [nbformat.v4.new_code_cell(code) for code in answers(found)]
    execute(found)  # raises if a cell does
    for old, new in zip(stored.cells, found.cells[: len(stored.cells)], strict=True):
        for output in old.get("outputs", ()):
            assert output.output_type != "error" and output.get("name") != "stderr"
        assert NUMBER.sub("#", printed(old)) == NUMBER.sub("#", printed(new))
        assert_equal_numbers(printed(old), printed(new))


if __name__ == "__main__":
    tour = nbformat.read(TOUR, as_version=4)
    metadata = dict(tour.metadata)
    execute(tour)
    tour.metadata = metadata  # without the version of the interpreter
    nbformat.write(tour, TOUR)
