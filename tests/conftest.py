"""Every test runs with the shapes and dtypes in the library's annotations checked, on the CPU unless asked otherwise."""

import importlib.util
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

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
