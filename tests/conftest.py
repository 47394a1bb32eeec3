"""Every test runs with the shapes and dtypes in the library's annotations checked, on the CPU unless asked otherwise.

Programs that several tests compile are compiled once: workers and the processes that tests start share a cache on disk that
goes with the run. `JAX_ENABLE_COMPILATION_CACHE=0` does without.
"""

import importlib.util
import os
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers have it from the first process
    CACHE = tempfile.TemporaryDirectory(prefix="ctrl-diffusion-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

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
