"""Strict JAX, shapes checked at run time, eight fake CPU devices."""

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import compiler
import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
compiler.compile_fast()
COMPILED = compiler.share_compiled_programs()

# Loopback is the only network that tests, and the processes they start, reach.
os.environ |= {"https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}

CHECKED = ["clip", "lipsum", "data", "eval", "train", "support", "tools"]
with install_import_hook(CHECKED, "beartype.beartype"):
    import train  # noqa: F401 (imports the others)
    from support import devices, errors
    from support.run import setup
    from tools import bench  # noqa: F401

# The garbage collector took a fifteenth of the time. What was imported stays: it need not look.
gc.freeze()
gc.set_threshold(50_000)

# The longest come first, so that two workers end together.
LONGEST = ["tour", "lipsum", "train", "resume", "scaling", "clip", "eval"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist
        rank = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def pytest_unconfigure() -> None:
    """Removes the compiled programs when the process that started the others ends."""
    if COMPILED:
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_do_not_pile_up() -> Iterator[None]:
    """Frees them after each module.

    A step on eight devices takes over a thousand memory maps. Linux allows 65,530, and XLA crashes
    at the next.
    """
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def each_test_is_warned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_shown", set())


@pytest.fixture
def small_leaves_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --fsdp, which otherwise copies models as small as those of the tests."""
    monkeypatch.setattr(devices, "SMALLEST_SPLIT", 1)


@pytest.fixture(autouse=True, scope="session")
def texts_of_a_model_are_embedded_once() -> Iterator[None]:
    """Many tests open the same model: its C2, over 10,000 texts, takes longer than their runs."""
    computed, second_moment = {}, setup.Model.second_moment

    def remembered(model: setup.Model, length: int = 8) -> np.ndarray:
        key = model.content["model"], length
        if key not in computed:
            computed[key] = second_moment(model, length)
        return computed[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setup.Model, "second_moment", remembered)
        yield


pytest_plugins = ["helpers"]

REFERENCE = Path(__file__).parent / "reference"
# Real images and weights. Tests that need them skip where they are absent.
SHARED = Path(os.environ.get("LIPSUM_SHARED", Path(__file__).parents[2] / "shared"))


def shared(name: str) -> Path:
    """Returns a path under the shared folder, or skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is missing (set LIPSUM_SHARED to the folder that holds {name})")
    return path


# Mutations to try: few by default, many with `-m slow`.
EXAMPLES = pytest.mark.parametrize("examples", [60, pytest.param(2_000, marks=pytest.mark.slow)])
