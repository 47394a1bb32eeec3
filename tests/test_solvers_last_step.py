"""A grid that ends at zero noise, as those of Stable Diffusion do: the last step of solvers of each kind, against the exact law.

The denoised state of one-point data is in `test_solvers_api.py`, for all of them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_diffusion import solvers as cds
from ctrl_diffusion.process import DiffusionProcess, DiffusionTerm
from ctrl_diffusion.schedules import VPTable
from experiments.solver_registry import OWN_ODE, OWN_SDE
from experiments.solvers.problems import affine_map

SCHEDULE, VARIANCE = VPTable(tau_min=0.0), 0.25
COUNTS = (5, 50)
ERSDE_2 = OWN_SDE[0]._replace(name="ERSDE(2)", make=lambda path, steps: cds.ERSDE(2))
OTHERS = ("ExponentialAdamsBashforth(2)", "DPMSolverPP3M", "UniPC(3)", "DPMSolver2S", "ExponentialSRA")
CASES = [
    *(case for case in OWN_SDE if case.name in ("ERSDE(3)", *OTHERS)),
    next(case for case in OWN_ODE if case.name == "ERSDE(3)"),
    ERSDE_2,
    ERSDE_2._replace(eta=0.5),
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def score(params, t, x, cond):
    tau = SCHEDULE.horizon - t
    return -x / (SCHEDULE.alpha(tau) ** 2 * VARIANCE + SCHEDULE.sigma_squared(tau))


def deviations(case) -> np.ndarray:
    """The standard deviation in which a solver ends after each of `COUNTS` equal steps, over the exact one."""
    model = DiffusionProcess(SCHEDULE, case.eta, case.frozen)

    def term(path):
        return DiffusionTerm(model, score, path if case.eta > 0 else None)

    run = affine_map(term, lambda path: case.make(path, 0), COUNTS[-1])
    sigma = SCHEDULE.sigma_squared(jnp.asarray(1.0))
    start, found = (1 - sigma) * VARIANCE + sigma, []
    for n in COUNTS:
        grid = np.linspace(model.t0, model.t1, n + 1)
        chain = run(jnp.asarray(np.append(grid, np.full(COUNTS[-1] - n, grid[-1]))), n)
        found.append(float(jnp.sqrt(chain.response**2 * start + chain.variance) / VARIANCE**0.5))
    return np.asarray(found)


@functools.cache
def of_first_order(eta):
    return deviations(OWN_SDE[0]._replace(eta=eta))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.eta:g}")
def test_the_last_step_to_zero_noise_keeps_the_law(case):
    """No further from it than `ExponentialEuler`, whose last step is the denoised state. An extrapolation of noisy states is."""
    error = np.abs(deviations(case) - 1)
    assert np.all(error <= 1.1 * np.abs(of_first_order(case.eta) - 1))
