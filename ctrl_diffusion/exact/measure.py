r"""How far a control is from the optimum, where the optimal action is known: fine time integrals along simulated paths.

Every integral over time is the trapezoidal rule over all grid times, ends included, on a grid that is finer than the one the
control was trained on: by default four times the problem's own steps. Paths are made by `ExponentialEuler`, which for a drift
process is Euler-Maruyama, or by another solver; their bias is of first order in the step, so state the number of steps.
"""

from typing import NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from ..optimum import Estimate, mean_and_error
from ..process import ControlFn, Params
from ..sampler import Sampler
from .problem import AbstractControlProblem

FINE = 4  # times the problem's own steps


class FineGap(NamedTuple):
    """`J* - J >= 0` in reward units, that of the reference, and their ratio: 1 at the reference, 0 at the optimum."""

    gap: Estimate
    reference: Estimate
    relative: Estimate


def fine_gap(
    problem: AbstractControlProblem,
    control: ControlFn,
    params: Params,
    keys: Key[Array, " b"],
    *,
    steps: int | None = None,
    solver: dfx.AbstractSolver | None = None,
    chunk: int = 512,
) -> FineGap:
    """`J* - J(a) = lambda E^a int k |a - a*|^2 dt`, along paths of the control itself, one per key.

    Non-negative, and free of the noise of the reward. The reference's gap is by the same rule with the same keys; the error of
    the ratio is to first order and takes the paths' correlation into account.

    Args:
        problem: the problem, whose optimal action is the yardstick.
        control, params: the control `control(params, t, x, cond)`.
        keys: one per path, at least two.
        steps: equal steps of the grid (default: four times the problem's).
        solver: any diffrax solver.
        chunk: paths held in memory at once.
    """
    best, base = problem.optimal_action, problem.reference_action
    gap, _ = _paths(problem, control, control, best, params, keys, steps, solver, chunk)
    reference, _ = _paths(problem, base, base, best, params, keys, steps, solver, chunk)
    ratio = gap.mean() / reference.mean()
    residual = mean_and_error((gap - ratio * reference) / reference.mean())
    return FineGap(mean_and_error(gap), mean_and_error(reference), Estimate(float(ratio), residual.se))


def control_l2_error(
    problem: AbstractControlProblem,
    control: ControlFn,
    params: Params,
    keys: Key[Array, " b"],
    *,
    steps: int | None = None,
    solver: dfx.AbstractSolver | None = None,
    chunk: int = 512,
) -> Estimate:
    """The literature's `E_{P*} int |u* - u|^2 dt / (t1 - t0)`, along paths of the optimal control; arguments as `fine_gap`.

    `u = sqrt(lambda) (B/G) (a - a_ref)`, for which `lambda KL = E int |u|^2 / 2 dt`; the norm sums over dimensions. The published
    rule is the mean over grid times, which differs where `u*` changes fast near the end (docs/problems.md).
    """
    best, span = problem.optimal_action, problem.process.t1 - problem.process.t0
    price, _ = _paths(problem, best, best, control, params, keys, steps, solver, chunk)
    return mean_and_error(2 / span * price)


def objective(
    problem: AbstractControlProblem,
    control: ControlFn,
    params: Params,
    keys: Key[Array, " b"],
    *,
    steps: int | None = None,
    solver: dfx.AbstractSolver | None = None,
    chunk: int = 512,
) -> Estimate:
    """`J(a) = E^a[ r - int f dt - lambda int k |a - a_ref|^2 dt ]` by rewards, running cost included; arguments as `fine_gap`."""
    price, returns = _paths(problem, control, control, problem.reference_action, params, keys, steps, solver, chunk)
    return mean_and_error(returns - price)


class PathIntegrals(NamedTuple):
    """Per path: `lambda int k |a - a_ref|^2 dt` and `r - int f dt`, float64 `[b]`, and the final states `[b, *shape]`."""

    price: np.ndarray
    returns: np.ndarray
    final: np.ndarray


def path_integrals(
    problem: AbstractControlProblem,
    control: ControlFn,
    params: Params,
    keys: Key[Array, " b"],
    *,
    steps: int | None = None,
    solver: dfx.AbstractSolver | None = None,
    chunk: int = 512,
) -> PathIntegrals:
    """What every path of a control pays and earns, and where it ends; arguments as `fine_gap`."""
    return PathIntegrals(*_all(problem, control, control, problem.reference_action, params, keys, steps, solver, chunk))


def squared_distance(
    problem: AbstractControlProblem,
    control: ControlFn,
    other: ControlFn,
    params: Params,
    keys: Key[Array, " b"],
    *,
    steps: int | None = None,
    solver: dfx.AbstractSolver | None = None,
    chunk: int = 512,
) -> Estimate:
    """`lambda E int k |a - other|^2 dt` along the control's own paths, reward units; arguments as `fine_gap`."""
    return mean_and_error(_paths(problem, control, control, other, params, keys, steps, solver, chunk)[0])


def _paths(problem, drive, control, other, params, keys, steps, solver, chunk) -> tuple[np.ndarray, np.ndarray]:
    """The first two of `_all`."""
    return _all(problem, drive, control, other, params, keys, steps, solver, chunk)[:2]


def _all(problem, drive, control, other, params, keys, steps, solver, chunk) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`lambda int k |control - other|^2 dt` and `r - int f dt` along paths of `drive`, and their ends, float64 `[b]`."""
    steps = FINE * problem.steps if steps is None else steps
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1.")
    total = len(keys)
    size = -(-total // -(-total // chunk))  # as few chunks as possible, all of one size: compiled once
    parts = []
    for start in range(0, total, size):
        first = min(start, total - size)  # the last chunk overlaps the one before
        done = _integrals(problem, drive, control, other, params, keys[first : first + size], steps, solver)
        parts.append([np.asarray(z, np.float64)[start - first :] for z in done])
    price, returns, final = (np.concatenate(column) for column in zip(*parts))
    return price, returns, final


@eqx.filter_jit
def _integrals(problem, drive, control, other, params, keys, steps, solver):
    process = problem.process
    sampler = Sampler(process, drive, problem.shape, grid=problem.grid(steps), solver=solver, dtype=jnp.zeros(()).dtype)
    path = sampler.trajectory(params, keys)

    def rates(tx):
        t, x = tx
        return process.kl_rate(t, control(params, t, x, None), other(params, t, x, None)), process.running_cost(t, x)

    kl, cost = (jnp.trapezoid(rate, path.t, axis=0) for rate in jax.lax.map(rates, (path.t, path.x)))
    return problem.kl_weight * kl, problem.reward(path.x[-1]) - cost, path.x[-1]
