"""Every test runs with the shapes and dtypes in the library's annotations checked, on the CPU unless asked otherwise."""

import importlib.util
import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxtyping

if "ctrl_diffusion" in sys.modules:
    raise RuntimeError("ctrl_diffusion was imported before tests/conftest.py: its annotations would go unchecked.")
if importlib.util.find_spec("beartype"):  # without it test_static.py fails, and the other tests still run
    jaxtyping.install_import_hook(["ctrl_diffusion"], "beartype.beartype")  # covers ctrl_diffusion.solvers
