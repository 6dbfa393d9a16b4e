"""XLA in the tests: programs are compiled fast rather than well, and each once for all processes.

conftest.py calls both functions before anything is compiled. What they set reaches the processes
that tests start, too.
"""

import os
import subprocess
import sys
import tempfile

import jax

# The older of XLA's two ways to compile for CPUs is three times as fast, and so small a program is
# compiled faster as a whole than in parts.
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def compile_fast() -> None:
    """Leaves optimizations out: small models take longer to compile than to run."""
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    given = os.environ.get("XLA_FLAGS", "")
    if FLAGS in given:
        return
    environment = os.environ | {"XLA_FLAGS": f"{given} {FLAGS}"}
    # A version of XLA that lacks a flag ends the process, so another one tries them.
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    if subprocess.run(command, env=environment, capture_output=True).returncode == 0:
        os.environ |= environment


def share_compiled_programs() -> str:
    """Lets modules, workers and processes load what one of them has compiled.

    Returns the new folder of compiled programs, or "" if JAX_COMPILATION_CACHE_DIR names one.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return ""
    folder = tempfile.mkdtemp(prefix="lipsum-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder
