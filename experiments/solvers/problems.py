"""Exact problems on which solvers are held to their orders, and drivers that measure them with one compilation a solver."""

from functools import cache, partial
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ctrl_diffusion.exact.mixture import Components
from ctrl_diffusion.predictions import X0
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.schedules import VPLinear
from ctrl_diffusion.solvers import clock_uniform, integrate, terms_for

SCHEDULE = VPLinear(tau_min=0.02)
MEAN, STD = 1.2, 0.4  # Gaussian data
MIDDLE = 0.4  # a start at which the data is seen: the control varies, and start-up errors show
NO_ARGS = (None, None)


@jax.jit
def clock(t):
    """The log-SNR at control time `t`."""
    return SCHEDULE.log_snr(SCHEDULE.horizon - jnp.asarray(t))


def mixture() -> Components:
    """Three modes in the plane."""
    means = jnp.asarray([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]])
    return Components(jnp.log(jnp.asarray([0.5, 0.3, 0.2])), means, jnp.asarray(0.15))


def mixture_score(params, t, x, cond):
    tau = SCHEDULE.horizon - t
    return mixture().noised(SCHEDULE.alpha(tau), SCHEDULE.sigma_squared(tau)).score(x)


def gaussian_marginal(t):
    """Mean and variance of the noised Gaussian data."""
    tau = SCHEDULE.horizon - t
    return SCHEDULE.alpha(tau) * MEAN, SCHEDULE.alpha(tau) ** 2 * STD**2 + SCHEDULE.sigma_squared(tau)


def gaussian_score(params, t, x, cond):
    mean, variance = gaussian_marginal(t)
    return -(x - mean) / variance


def both_scores(params, t, x, cond):
    """Mixture data in the first half of the batch, Gaussian data in the second."""
    half = x.shape[0] // 2
    return jnp.concatenate([mixture_score(params, t, x[:half], cond), gaussian_score(params, t, x[half:], cond)])


def gaussian_flow(t0, t1, x):
    """The probability flow of Gaussian data keeps the standardised state."""
    (m0, v0), (m1, v1) = gaussian_marginal(t0), gaussian_marginal(t1)
    return m1 + jnp.sqrt(v1 / v0) * (x - m0)


def process(eta=0.0, frozen=X0) -> DiffusionProcess:
    return DiffusionProcess(SCHEDULE, eta=eta, frozen=frozen)


@cache
def _clock_uniform(t0, t1, steps):
    return clock_uniform(clock, t0, t1, steps)


def grids(counts, make=clock_uniform, t0=None):
    """Grids of `counts` steps as rows, padded at their end to equal length."""
    t0, t1 = process().t0 if t0 is None else t0, process().t1
    rows = [_clock_uniform(t0, t1, n) if make is clock_uniform else make(t0, t1, n) for n in counts]
    longest = max(counts) + 1
    return jnp.asarray(np.stack([np.append(row, np.full(longest - len(row), row[-1])) for row in rows]))


def endpoint(term, solver):
    """`run(x0, ts, n)`: the state after `n` steps on a (padded) grid; one compilation for every `n`."""
    terms = terms_for(solver, term)

    @jax.jit
    def run(x, ts, n):
        def body(i, carry):
            x, state = carry
            x, _, _, state, _ = solver.step(terms, ts[i], ts[i + 1], x, NO_ARGS, state, False)
            return x, state

        return jax.lax.fori_loop(0, n, body, (x, solver.init(terms, ts[0], ts[1], x, NO_ARGS)))[0]

    return run


def slope(counts, errors) -> float:
    """Order of convergence: least squares of log error on log step."""
    return float(-np.polyfit(np.log(counts), np.log(np.asarray(errors, float)), 1)[0])


class BasisPath(dfx.AbstractBrownianPath):
    """Row j of the batch gets the j-th standard normal of the path alone: increments first, then Levy areas.

    A solve with it, of a term that is affine in the state, gives the whole affine map from noise to endpoint.
    """

    ts: jax.Array
    longest: int = eqx.field(static=True)
    levy_area: Any = eqx.field(static=True, default=dfx.SpaceTimeLevyArea)

    @property
    def t0(self):
        return self.ts[0]

    @property
    def t1(self):
        return self.ts[-1]

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        t1 = self.t1 if t1 is None else t1
        i = jnp.searchsorted(self.ts, 0.5 * (t0 + t1)) - 1
        rows = jnp.arange(2 * self.longest + 2)[:, None]
        dt = self.ts[i + 1] - self.ts[i]
        w = jnp.where(rows == i, jnp.sqrt(dt), 0.0)
        if not use_levy:
            return w
        return dfx.SpaceTimeLevyArea(dt=dt, W=w, H=jnp.where(rows == self.longest + i, jnp.sqrt(dt / 12), 0.0))


class FinePath(dfx.AbstractBrownianPath):
    """One Brownian motion per entry of the batch, drawn on `[t0, t1]` in `cells` equal cells: exact on every coarser grid."""

    ends: tuple[float, float] = eqx.field(static=True)
    cells: int = eqx.field(static=True)
    motion: jax.Array  # W at the ends of cells
    integral: jax.Array  # int W ds up to the ends of cells
    levy_area: Any = eqx.field(static=True, default=dfx.SpaceTimeLevyArea)

    def __init__(self, t0, t1, cells, key, shape):
        dt = (t1 - t0) / cells
        w, h = (
            jax.random.normal(key, (2, cells, *shape), jnp.float64)
            * jnp.sqrt(dt)
            * jnp.asarray([1, 12**-0.5]).reshape(2, 1, 1, 1)
        )
        motion = jnp.concatenate([jnp.zeros((1, *shape)), jnp.cumsum(w, axis=0)])
        integral = jnp.cumsum(dt * (motion[:-1] + w / 2 + h), axis=0)
        self.ends, self.cells, self.levy_area = (t0, t1), cells, dfx.SpaceTimeLevyArea
        self.motion, self.integral = motion, jnp.concatenate([jnp.zeros((1, *shape)), integral])

    @property
    def t0(self):
        return self.ends[0]

    @property
    def t1(self):
        return self.ends[1]

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        t1 = self.t1 if t1 is None else t1
        dt = (self.ends[1] - self.ends[0]) / self.cells
        i, j = (jnp.round((t - self.ends[0]) / dt).astype(int) for t in (t0, t1))
        w = self.motion[j] - self.motion[i]
        if not use_levy:
            return w
        span = (j - i) * dt
        area = (self.integral[j] - self.integral[i]) / span - self.motion[i] - w / 2
        return dfx.SpaceTimeLevyArea(dt=span, W=w, H=area)


class AffineMap(NamedTuple):
    """`x1 = offset + response x0 + N(0, variance)`."""

    offset: jax.Array
    response: jax.Array
    variance: jax.Array


def affine_map(make_term, make_solver, longest):
    """`run(ts, n)`: the chain of a solver on Gaussian data, exactly.

    The last two rows carry no noise and start at 0 and 1; all others start at 0.
    """

    @eqx.filter_jit
    def run(ts, n):
        path = BasisPath(ts=ts, longest=longest)
        x0 = jnp.zeros((2 * longest + 2, 1)).at[-1].set(1.0)
        x1 = endpoint(make_term(path), make_solver(path))(x0, ts, n)[:, 0]
        return AffineMap(x1[-2], x1[-1] - x1[-2], jnp.sum((x1[:-2] - x1[-2]) ** 2))

    return run


def exact_affine_map(eta, t0, t1) -> AffineMap:
    """The law of `X(t1)` given `X(t0)` for Gaussian data: the deviation from the mean decays with `int g^2 / v`."""
    (m0, v0), (m1, v1) = gaussian_marginal(t0), gaussian_marginal(t1)
    level0, level1 = v0 / SCHEDULE.alpha(SCHEDULE.horizon - t0) ** 2, v1 / SCHEDULE.alpha(SCHEDULE.horizon - t1) ** 2
    response = jnp.sqrt(v1 / v0) * (level1 / level0) ** (eta**2 / 2)
    return AffineMap(m1 - response * m0, response, v1 - response**2 * v0)


def ode_reference(x0, t0):
    """The mixture's flow by an eighth-order method on a fine grid for the first half of the batch, the Gaussian's in closed form."""
    half = x0.shape[0] // 2
    fine = np.asarray(grids([600], t0=t0)[0])
    term = process().term(mixture_score, None)
    flow = gaussian_flow(jnp.asarray(fine[0]), jnp.asarray(fine[-1]), x0[half:])
    return jnp.concatenate([integrate(term, dfx.Dopri8(), fine, x0[:half], NO_ARGS), flow])


def weak_errors(eta, frozen, make_solver, counts, perturbed=True) -> list[float]:
    """Errors of the mean plus the variance of the endpoint, propagated exactly: the chain is affine in state and noise.

    A law other than the marginal at the start makes the mean informative; solvers that promise marginals alone get those.
    `make_solver(path, steps)` makes the solver for each of the numbers of steps `counts`.
    """
    t0, t1 = jnp.asarray(MIDDLE), jnp.asarray(process().t1)
    mean, variance = gaussian_marginal(t0)
    if perturbed:
        mean, variance = mean + 1.0, 0.5 * variance

    def law(chain):
        return jnp.stack([chain.offset + chain.response * mean, chain.response**2 * variance + chain.variance])

    def make_term(path):
        return process(eta, frozen).term(gaussian_score, path if eta > 0 else None)

    exact, longest = law(exact_affine_map(eta, t0, t1)), max(counts)
    shared = isinstance(make_solver, dfx.AbstractSolver)
    makers = [lambda path: make_solver] * len(counts) if shared else [partial(make_solver, steps=n) for n in counts]
    runs = (
        [affine_map(make_term, makers[0], longest)] * len(counts)
        if shared
        else [affine_map(make_term, m, longest) for m in makers]
    )
    chains = [run(grid, jnp.asarray(n)) for run, grid, n in zip(runs, grids(counts, t0=MIDDLE), counts)]
    return [float(jnp.sum(jnp.abs(law(chain) - exact))) for chain in chains]
