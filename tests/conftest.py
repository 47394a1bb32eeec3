"""Every test runs with the shapes and dtypes in the library's annotations checked, on the CPU unless asked otherwise.

Programs that several tests compile are compiled once: workers and the processes that tests start share a cache on disk that
goes with the run. `JAX_ENABLE_COMPILATION_CACHE=0` does without.

Tests on the CPU spend their time in the compiler, not in what it makes, so machine code is not optimised: compilation then
takes a third of the time. Memory and collectives are decided before. Where numbers of programs on different devices must be
equal bit for bit (`test_parallel.py`) the compiler is as users have it, and everywhere with `XLA_FLAGS=''` in front.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers have it from the first process
    CACHE = tempfile.TemporaryDirectory(prefix="ctrl-diffusion-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
if "XLA_FLAGS" not in os.environ and os.environ["JAX_PLATFORMS"] == "cpu":
    QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    try_them = [sys.executable, "-c", "import jax; jax.devices()"]  # XLA ends a process whose flags it does not know
    known = subprocess.run(try_them, env=os.environ | {"XLA_FLAGS": QUICK}, capture_output=True).returncode == 0
    os.environ["XLA_FLAGS"] = QUICK if known else ""

import jaxtyping
import pytest

if "ctrl_diffusion" in sys.modules:
    raise RuntimeError("ctrl_diffusion was imported before tests/conftest.py: its annotations would go unchecked.")
if importlib.util.find_spec("beartype"):  # without it test_static.py fails, and the other tests still run
    jaxtyping.install_import_hook(["ctrl_diffusion"], "beartype.beartype")  # covers ctrl_diffusion.solvers


def pytest_collection_modifyitems(items):
    """Parallel workers must agree on the names of the tests."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"these test names hold an address, which differs from run to run; give `ids=`: {unstable[:3]}")
