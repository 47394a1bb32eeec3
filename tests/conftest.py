"""Every test runs with the shapes and dtypes in the library's annotations checked, on the CPU unless asked otherwise.

Tests spend their time in the compiler, not in what it makes, so machine code is not optimised, but for tests marked `optimised`,
which see the compiler as users have it (`compiling.py`). Programs that several tests compile are compiled once: workers, the
processes that tests start and later runs share a cache on disk, in `.pytest_cache`. `JAX_ENABLE_COMPILATION_CACHE=0` does without.

Workers take whole files, so that what the tests of a file share is made once. After a file its programs are forgotten: those of
all files would take gigabytes.
"""

import ctypes
import gc
import importlib.util
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers have it from the first process
    CACHE = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
    if sum(file.stat().st_size for file in CACHE.glob("*")) > 2**30:  # programs of many versions of the code
        shutil.rmtree(CACHE)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import jaxtyping
import pytest

if "ctrl_diffusion" in sys.modules:
    raise RuntimeError("ctrl_diffusion was imported before tests/conftest.py: its annotations would go unchecked.")
if importlib.util.find_spec("beartype"):  # without it test_static.py fails, and the other tests still run
    jaxtyping.install_import_hook(["ctrl_diffusion"], "beartype.beartype")  # covers ctrl_diffusion.solvers

from tests.compiling import Compiler

COMPILER = Compiler()
LONG = ("test_parallel", "test_text_to_image")
"""Files that begin first, so that no worker ends long before the others."""
# Tracing makes millions of small objects that live as long as a program: looking for cycles among them, and noting the line of
# each operation, took a tenth of the tests' time.
gc.freeze()
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_traceback_in_locations_limit", 0)


def is_unoptimised(item: pytest.Item) -> bool:
    return item.get_closest_marker("optimised") is None


def pytest_configure(config: pytest.Config):
    if config.getoption("dist", "no") == "load":  # what `-n 2` alone means
        config.option.dist, config.option.loadscopereorder = "loadfile", False


def pytest_collection_modifyitems(items: list[pytest.Item]):
    """Parallel workers must agree on the names of the tests; the compiler is changed once."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"these test names hold an address, which differs from run to run; give `ids=`: {unstable[:3]}")
    items.sort(key=lambda item: (is_unoptimised(item), item.path.stem not in LONG))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item):
    """Before what the test needs is made."""
    COMPILER.optimise(not is_unoptimised(item))


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Compiled programs and traces of a file end with it, and their memory goes back to the system."""
    yield
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module")
def classifiers():
    """Classifiers of digits are trained once."""
    from tests.tiny_runs import trained_once

    with pytest.MonkeyPatch.context() as patch:
        for name in ("digits", "discretization"):
            patch.setattr(f"experiments.{name}.experiment.train_classifier", trained_once)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Reports of digits have blank figures."""
    from tests.tiny_runs import blank

    monkeypatch.setattr("experiments.digits.report.png", blank)
