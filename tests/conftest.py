"""Strict JAX, shapes checked at run time, eight fake CPU devices."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Models here are so small that compiling them takes far longer than running them. The older of XLA's two ways to
# compile for CPUs is three times as fast, and so small a program is compiled faster as a whole than in parts. Processes
# that tests start do the same.
jax.config.update("jax_disable_most_optimizations", True)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if FLAGS not in os.environ.get("XLA_FLAGS", ""):
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"}
    if subprocess.run(command, env=environment, capture_output=True).returncode == 0:
        os.environ |= environment  # a version of XLA that lacks a flag would end the process

# What one module, worker or process has compiled, the others load.
COMPILED = (
    "" if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="lipsum-tests-")
)
if COMPILED:
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": COMPILED,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    jax.config.update("jax_compilation_cache_dir", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Loopback is the only network that tests, and the processes they start, reach.
os.environ |= {"https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}

with install_import_hook(
    ["clip", "lipsum", "data", "eval", "train", "support", "tools"], "beartype.beartype"
):
    import train  # noqa: F401 (imports the others)
    from support.run import setup
    from tools import bench  # noqa: F401

# The garbage collector took a fifteenth of the time: it need not look at what was imported, nor often.
gc.freeze()
gc.set_threshold(50_000)

# The longest come first, so that two workers end together.
LONGEST = [
    f"test_{name}.py" for name in ("tour", "lipsum", "train", "resume", "scaling", "clip", "eval")
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # of pytest-xdist
        items.sort(
            key=lambda item: (
                LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
            )
        )


def pytest_unconfigure() -> None:
    """Removes the compiled programs, at the end of the process that started the others."""
    if COMPILED:
        shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_do_not_pile_up() -> Iterator[None]:
    """A step on eight devices takes over a thousand memory maps; Linux allows 65,530, and at the next XLA crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def texts_of_a_model_are_embedded_once() -> Iterator[None]:
    """Many tests open the same model. Its C2, over 10,000 random texts, would take longer than their runs."""
    computed, second_moment = {}, setup.Model.second_moment

    def remembered(model: setup.Model, length: int = 8) -> np.ndarray:
        key = model.checksum, length
        if key not in computed:
            computed[key] = second_moment(model, length)
        return computed[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(setup.Model, "second_moment", remembered)
        yield


pytest_plugins = ["helpers"]

REFERENCE = Path(__file__).parent / "reference"
# Real images and weights for development; tests that need them skip where they are absent.
SHARED = Path(os.environ.get("LIPSUM_SHARED", Path(__file__).parents[2] / "shared"))


def shared(name: str) -> Path:
    """A path under the shared folder; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is missing (set LIPSUM_SHARED to the folder that holds {name})")
    return path


# Mutations to try: few by default, many with `-m slow`.
EXAMPLES = pytest.mark.parametrize("examples", [60, pytest.param(2_000, marks=pytest.mark.slow)])
