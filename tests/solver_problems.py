"""A small noisy problem, for everything but accuracy; the exact problems are those of `experiments.solvers.problems`."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np

from ctrl_diffusion.predictions import X0
from ctrl_diffusion.solvers import KeyedPath, levy_area_for, sample_keys
from experiments.solvers.problems import mixture_score, process

STEPS = 8
GRID = np.asarray(process().grid(STEPS))
KEYS = sample_keys(jax.random.key(0), 5)


def label(value):
    return type(value).__name__ if isinstance(value, dfx.AbstractSolver) else None


def noisy_term(solver, control=mixture_score, eta=1.0, frozen=X0):
    path = KeyedPath(jnp.asarray(GRID, float), KEYS, (2,), levy_area_for(solver))
    return process(eta, frozen).term(control, path)


def start():
    return process().initial(sample_keys(jax.random.key(9), 5), (2,), float)
