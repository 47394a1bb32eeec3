"""Linter, formatter and type checker are clean; array shapes in annotations are really checked in this test run."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import pytest

import ctrl_diffusion
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.schedules import VPLinear
from ctrl_diffusion.solvers import sample_keys, standard_normal

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> None:
    # pyright otherwise asks a package registry whether a newer version exists
    env = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_check():
    run("ruff", "check", "--no-cache", "--output-format", "concise")


def test_ruff_format():
    run("ruff", "format", "--check", "--no-cache", "--quiet")


@pytest.mark.slow
def test_pyright():
    run("pyright", "--pythonpath", sys.executable)


def test_wrong_shapes_and_dtypes_are_refused():
    process = DiffusionProcess(VPLinear())
    t, a = jnp.asarray(0.5), jnp.ones((3, 4, 4))
    assert process.kl_rate(t, a, 2 * a).shape == (3,)
    with pytest.raises(jaxtyping.TypeCheckError, match="kl_rate"):
        process.kl_rate(t, a, a[:2])  # another batch
    with pytest.raises(jaxtyping.TypeCheckError, match="kl_rate"):
        process.kl_rate(t, a, a[..., 0])  # another state
    with pytest.raises(jaxtyping.TypeCheckError, match="kl_rate"):
        process.kl_rate(t, a, a.astype(int))


def test_wrong_shapes_are_refused_in_solvers():
    keys = sample_keys(jr.key(0), 3)
    assert standard_normal(keys, 0, (4,), jnp.float32).shape == (3, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match="standard_normal"):
        standard_normal(keys[None], 0, (4,), jnp.float32)


def test_every_module_is_checked():
    for module in pkgutil.walk_packages(ctrl_diffusion.__path__, "ctrl_diffusion.", importlib.import_module):
        loader = importlib.import_module(module.name).__loader__
        assert type(loader).__module__.startswith("jaxtyping"), f"{module.name} was loaded by {loader}"
