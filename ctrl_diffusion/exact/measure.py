r"""The distance of a control from the optimum, for problems whose optimal action is known.

Integrals over time use the trapezoidal rule on all grid times, ends included. The grid is finer than the training grid: by default it
has four times the problem's own steps. The default solver is `ExponentialEuler`, which for a drift process is Euler-Maruyama. Its bias
is of first order in the step, so state the number of steps.
"""

import functools
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
    """The gap `J* - J >= 0` of a control and of the reference, in reward units, and their ratio: 1 at the reference, 0 at the optimum."""

    gap: Estimate
    reference: Estimate
    relative: Estimate


class PathIntegrals(NamedTuple):
    """Per path: `lambda int k |a - other|^2 dt` and `r - int f dt`, float64 `[b]`, and the final states `[b, *shape]`."""

    penalty: np.ndarray
    returns: np.ndarray
    final: np.ndarray


class GapEvaluator:
    """Evaluates controls `control(params, t, x, cond)` of one problem, all with the same random numbers.

    Results that depend on the problem only are computed once. Errors are standard errors over paths.

    Args:
        problem: the problem, with its optimal action.
        keys: one per path, at least two.
        steps: equal steps of the grid (default: four times the problem's).
        solver: any diffrax solver (default `ExponentialEuler`).
        chunk: paths held in memory at once.
    """

    def __init__(
        self,
        problem: AbstractControlProblem,
        keys: Key[Array, " b"],
        *,
        steps: int | None = None,
        solver: dfx.AbstractSolver | None = None,
        chunk: int = 512,
    ):
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1: it is the number of paths in memory.")
        self.problem, self.keys, self.solver, self.chunk = problem, keys, solver, chunk
        self.steps = FINE * problem.steps if steps is None else steps

    def gap(self, control: ControlFn, params: Params) -> FineGap:
        """`J* - J(a) = lambda E^a int k |a - a*|^2 dt`, along paths of the control itself.

        It is not negative and has no noise from the reward. The error of the ratio is first order and includes the correlation of the
        two gaps.
        """
        gap, reference = self.integrals(control, params, self.problem.optimal_action).penalty, self._reference_gap
        ratio = gap.mean() / reference.mean()
        residual = mean_and_error((gap - ratio * reference) / reference.mean())
        return FineGap(mean_and_error(gap), mean_and_error(reference), Estimate(float(ratio), residual.se))

    def control_l2_error(self, control: ControlFn, params: Params) -> Estimate:
        """The literature's error `E_{P*} int |u* - u|^2 dt / (t1 - t0)`, along paths of the optimal control.

        `u = sqrt(lambda) (B/G) (a - a_ref)`, so `lambda KL = E int |u|^2 / 2 dt`; the norm sums over dimensions. Published numbers
        are means over grid times, which differ from the integral if `u*` changes fast near the end (docs/problems.md).
        """
        span = self.problem.process.t1 - self.problem.process.t0
        best = self.problem.optimal_action
        return mean_and_error(2 / span * self._integrals(best, best, control, params).penalty)

    @functools.cached_property
    def zero_control_l2_error(self) -> Estimate:
        """`control_l2_error` of the reference."""
        return self.control_l2_error(self.problem.reference_action, None)

    def objective(self, control: ControlFn, params: Params) -> Estimate:
        """`J(a) = E^a[ r - int f dt - lambda int k |a - a_ref|^2 dt ]`, the mean over paths."""
        found = self.integrals(control, params)
        return mean_and_error(found.returns - found.penalty)

    def integrals(self, control: ControlFn, params: Params, other: ControlFn | None = None) -> PathIntegrals:
        """KL penalty against `other` (default: the reference), return and final state of every path of a control."""
        return self._integrals(control, control, self.problem.reference_action if other is None else other, params)

    @functools.cached_property
    def _reference_gap(self) -> np.ndarray:
        return self.integrals(self.problem.reference_action, None, self.problem.optimal_action).penalty

    def _integrals(self, drive: ControlFn, control: ControlFn, other: ControlFn, params: Params) -> PathIntegrals:
        """`lambda int k |control - other|^2 dt` and `r - int f dt` along paths of `drive`, and their ends."""
        total = len(self.keys)
        size = -(-total // -(-total // self.chunk))  # as few chunks as possible, all of one size: one compilation
        parts = []
        for start in range(0, total, size):
            first = min(start, total - size)  # the last chunk overlaps the one before
            keys = self.keys[first : first + size]
            path = _paths(self.problem, drive, params, keys, self.steps, self.solver)
            done = _along(self.problem, control, other, params, path)
            parts.append([np.asarray(z, np.float64)[start - first :] for z in done])
        return PathIntegrals(*(np.concatenate(column) for column in zip(*parts)))


@eqx.filter_jit
def _paths(problem, drive, params, keys, steps, solver):
    """Sample paths. This is a program of its own, because its compilation is slow and the same for all integrands."""
    sampler = Sampler(problem.process, drive, problem.shape, grid=problem.grid(steps), solver=solver, dtype=jnp.zeros(()).dtype)
    return sampler.trajectory(params, keys)


@eqx.filter_jit
def _along(problem, control, other, params, path):
    process = problem.process

    def rates(tx):
        t, x = tx
        return process.kl_rate(t, control(params, t, x, None), other(params, t, x, None)), process.running_cost(t, x)

    kl, cost = (jnp.trapezoid(rate, path.t, axis=0) for rate in jax.lax.map(rates, (path.t, path.x)))
    return problem.kl_weight * kl, problem.reward(path.x[-1]) - cost, path.x[-1]
