"""Exact problems on which solvers are held to their orders, and drivers that measure them with one compilation a solver."""

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
from ctrl_diffusion.solvers import KeyedPath, clock_uniform, levy_area_for, sample_keys, terms_for

SCHEDULE = VPLinear(tau_min=0.02)
MEAN, STD = 1.2, 0.4  # Gaussian data
NO_ARGS = (None, None)


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


def grids(counts, make=clock_uniform, t0=None):
    """Grids of `counts` steps as rows, padded at their end to equal length."""
    t0, t1 = process().t0 if t0 is None else t0, process().t1
    rows = [make(clock, t0, t1, n) if make is clock_uniform else make(t0, t1, n) for n in counts]
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


# A small noisy problem, for everything but accuracy.
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
        path = BasisPath(ts, longest)
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
