"""The Gaussian-quadratic problem of the literature table, and what follows without sampling.

Affine actions on Gaussian data make a Gaussian chain: its moments and its KL are recursions, in the limit equations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate

from ctrl_diffusion.exact import GaussianQuadratic
from ctrl_diffusion.exploration import shift
from ctrl_diffusion.predictions import X0
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.sampler import log_ratio
from ctrl_diffusion.schedules import RectifiedFlow, VarianceExploding, VPCosine, VPLinear, VPTable

SCHEDULES = [VPLinear(), VPCosine(), VPTable(), VarianceExploding(), RectifiedFlow()]
WEIGHT = 0.7


def constant_rate(tau_min):
    return VPLinear(beta_min=4.0, beta_max=4.0, horizon=2.0, tau_min=tau_min, tau_max=2.0)


def table(eta=0.5, schedule=None, frozen=X0):
    """The Gaussian-quadratic problem of the table, started from pure noise as samplers are."""
    process = DiffusionProcess(schedule or constant_rate(0.05), eta, frozen)
    return GaussianQuadratic(process, 1.0, 0.5, 1.0, -0.5, WEIGHT, noise_start=True)


def tilted(problem):
    """An action between reference and optimum, and beyond in another direction."""

    def control(params, t, x, cond):
        reference = problem.reference_action(None, t, x)
        return reference + 0.5 * (problem.optimal_action(None, t, x) - reference) + 0.3 * jnp.cos(t) - 0.1 * x

    return control


def affine(control, t):
    """`offset, gain` of an affine action."""
    offset, top = (control(None, t, jnp.full((1, 1), x), None)[0, 0] for x in (0.0, 1.0))
    return offset, top - offset


class Chain(NamedTuple):
    """What a chain does, per dimension."""

    mean: float
    variance: float
    kl: float  # path KL from the reference chain
    gradient: float  # see `chains`


def chains(problem, solver, cases, start=None):
    r"""The exact final mean and variance, and the path KL, of the chains that `solver` makes for cases `(control, steps)`.

    `start` is the mean and variance of the initial state, the problem's by default.

    `gradient` is the likelihood-ratio gradient along a constant shift of the action, with the critic `V*`:
    `E sum_j [scale_j xi_j (V*_{j+1} - V*_j)] - lambda sum_j grad kl_j`, where `E[xi V*(t', x')] = std E grad V*(t', x')`.
    """

    def run(control, ts):
        def step(state, interval):
            mean, variance, kl, gradient = state
            phi, psi, std = problem.process.transition(solver, *interval)
            (offset, gain), (offset_ref, gain_ref) = (affine(f, interval[0]) for f in (control, problem.reference_action))
            d0, d1 = offset - offset_ref, gain - gain_ref
            scale = psi / std
            new = (phi + psi * gain) * mean + psi * offset
            slope = problem.value_gradient(interval[1], jnp.full((1, 1), new))[0, 0]
            gradient = gradient + psi * slope - WEIGHT * scale**2 * (d0 + d1 * mean)
            kl = kl + 0.5 * scale**2 * ((d0 + d1 * mean) ** 2 + d1**2 * variance)
            return (new, (phi + psi * gain) ** 2 * variance + std**2, kl, gradient), None

        return jax.lax.scan(step, (*(problem.start if start is None else start), 0.0, 0.0), (ts[:-1], ts[1:]))[0]

    grids = [problem.process.grid(steps) for _, steps in cases]
    ends = jax.jit(lambda: [run(control, jnp.asarray(grid)) for (control, _), grid in zip(cases, grids)])()
    return [Chain(*map(float, end)) for end in ends]


def moments(problem, control):
    """Continuous-time mean, variance, path KL from the reference and from the optimum, by integrating their equations."""
    process = problem.process

    @jax.jit
    def coefficients(t):
        a, b, g = process.coefficients(t)
        actions = jnp.stack([jnp.stack(affine(f, t)) for f in (control, problem.reference_action, problem.optimal_action)])
        return jnp.concatenate(
            [jnp.stack([a, b, g, process.kl_rate(t, jnp.ones((1, 1)), jnp.zeros((1, 1)))[0]]), actions.ravel()]
        )

    def slope(t, y):
        a, b, g, k, offset, gain, *others = np.asarray(coefficients(jnp.asarray(t)))
        costs = []
        for other_offset, other_gain in (others[:2], others[2:]):
            d0, d1 = offset - other_offset, gain - other_gain
            costs.append(k * ((d0 + d1 * y[0]) ** 2 + d1**2 * y[1]))
        return [a * y[0] + b * (gain * y[0] + offset), 2 * (a + b * gain) * y[1] + g**2, *costs]

    start = [*map(float, problem.start), 0.0, 0.0]
    return scipy.integrate.solve_ivp(slope, (process.t0, process.t1), start, "DOP853", rtol=1e-10, atol=1e-12).y[:, -1]


def path_log_ratio(scales, new, old, noise):
    """`log dP_new/dP_old` of whole paths, from the library's one-step form."""
    return jnp.sum(jax.vmap(log_ratio)(jax.vmap(shift)(scales, new, old), noise), axis=0)


def within(values, expected, errors=4.0):
    """Whether the mean of independent `values` is within `errors` standard errors of a number."""
    values = np.asarray(values, np.float64)
    return abs(values.mean() - expected) < errors * values.std() / np.sqrt(len(values))
