"""Time grids: ascending numpy arrays. They are checked once, before tracing, and solvers use them without host callbacks."""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import numpy as np

Clock = Callable[[Any], Any]  # an increasing function of control time, elementwise on arrays


def check_grid(ts) -> np.ndarray:
    """Return `ts` as a float64 numpy array. `ValueError` unless it has at least two times, finite and strictly increasing."""
    ts = np.asarray(ts, np.float64)
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"grid has shape {ts.shape}: it must be one-dimensional with at least two times.")
    if not np.all(np.isfinite(ts)):
        i = int(np.argmin(np.isfinite(ts)))
        raise ValueError(f"grid has a non-finite time at index {i}, {ts[i]}: give finite times.")
    if np.any(np.diff(ts) <= 0):
        i = int(np.argmax(np.diff(ts) <= 0))
        raise ValueError(
            f"grid must increase strictly (control time runs from noise to data), but grid[{i}] = {ts[i]:g} and "
            f"grid[{i + 1}] = {ts[i + 1]:g}. Reverse it if it is in noising time."
        )
    return ts


def uniform(t0: float, t1: float, steps: int) -> np.ndarray:
    """`steps` equal steps from `t0` to `t1`."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1: it is the number of steps of the grid.")
    return check_grid(np.linspace(t0, t1, steps + 1))


def refine(ts, substeps: int) -> np.ndarray:
    """Split every interval of `ts` into `substeps` equal ones."""
    ts = check_grid(ts)
    if substeps < 1:
        raise ValueError(f"substeps={substeps} must be at least 1: it is the number of parts of every interval.")
    inner = ts[:-1, None] + np.diff(ts)[:, None] * np.arange(substeps) / substeps
    return np.append(inner.ravel(), ts[-1])


def cosine_spaced(t0: float, t1: float, steps: int) -> np.ndarray:
    """`t0 + (t1 - t0) sin(pi i / (2 steps))`: steps shrink to zero towards `t1` like a cosine."""
    return check_grid(t0 + (t1 - t0) * np.sin(0.5 * np.pi * uniform(0.0, 1.0, steps)))


def power(t0: float, t1: float, steps: int, exponent: float) -> np.ndarray:
    """`t1 - (t1 - t0) (1 - i / steps)^exponent`. Steps shrink towards `t1` if `exponent` is above 1, and are equal if it is 1."""
    if not exponent > 0:
        raise ValueError(f"exponent={exponent} must be positive: use 1 for equal steps.")
    times = t1 - (t1 - t0) * (1 - uniform(0.0, 1.0, steps)) ** exponent
    times[0] = t0  # not up to rounding
    return check_grid(times)


def clock_uniform(clock: Clock, t0: float, t1: float, steps: int) -> np.ndarray:
    """`steps` equal steps of an increasing `clock(t)`. With the log-SNR as clock it suits exponential integrators."""
    start, end = _ends(clock, t0, t1, "clock_uniform")
    return _at_clock(clock, t0, t1, np.linspace(start, end, steps + 1))


def karras(clock: Clock, t0: float, t1: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Equal steps of `n^(1/rho)`; `clock` is the log-SNR, `n = e^{-clock}` the noise-to-signal ratio (Karras et al. 2022, eq. 5)."""
    if not rho > 0:
        raise ValueError(f"rho={rho} must be positive: use 7, as published, or 1 for equal steps of the noise-to-signal ratio.")
    start, end = _ends(clock, t0, t1, "karras")
    return _at_clock(clock, t0, t1, -rho * np.log(np.linspace(np.exp(-start / rho), np.exp(-end / rho), steps + 1)))


def _ends(clock: Clock, t0: float, t1: float, name: str) -> tuple[float, float]:
    ends = np.asarray(clock(np.asarray([t0, t1])), np.float64)
    if not np.all(np.isfinite(ends)) or ends[1] <= ends[0]:
        raise ValueError(
            f"{name}: clock(t0)={ends[0]:g} and clock(t1)={ends[1]:g} must be finite and increasing. A log-SNR is infinite at zero "
            "noise: end the grid before it (tau_min > 0)."
        )
    return float(ends[0]), float(ends[1])


def _at_clock(clock: Clock, t0: float, t1: float, values: np.ndarray) -> np.ndarray:
    """Times of clock values, by bisection. The ends are exactly `t0` and `t1`."""
    uniform(t0, t1, len(values) - 1)  # checks
    lo, hi = np.full(len(values), float(t0)), np.full(len(values), float(t1))
    for _ in range(64):
        middle = 0.5 * (lo + hi)
        below = np.asarray(clock(middle), np.float64) < values
        lo, hi = np.where(below, middle, lo), np.where(below, hi, middle)
    times = 0.5 * (lo + hi)
    times[0], times[-1] = t0, t1
    return check_grid(times)


def leading(steps: int, train_steps: int = 1000, offset: int = 0, drop_last: bool = False) -> np.ndarray:
    """Descending timesteps `offset + i (train_steps // steps)`: "leading" spacing, which leaves out the noisiest timesteps.

    With `drop_last` it takes one timestep more and leaves out the smallest, as DPM-Solver and UniPC schedulers do.
    """
    count = _count(steps, train_steps) + drop_last
    table = (np.arange(count) * (train_steps // count))[::-1] + offset
    return _timesteps(table[:steps], train_steps)


def trailing(steps: int, train_steps: int = 1000) -> np.ndarray:
    """Descending timesteps from `train_steps - 1` in (rounded) equal steps: "trailing" spacing, which ends above zero."""
    ratio = train_steps / _count(steps, train_steps)
    return _timesteps(np.round(train_steps - ratio * np.arange(steps)).astype(int) - 1, train_steps)


def linspaced(steps: int, train_steps: int = 1000, drop_last: bool = False) -> np.ndarray:
    """Descending timesteps from `train_steps - 1` to 0, rounded: "linspace" spacing. `drop_last` as for `leading`."""
    count = _count(steps, train_steps) + drop_last
    return _timesteps(np.round(np.linspace(0, train_steps - 1, count)).astype(int)[::-1][:steps], train_steps)


def from_timesteps(timesteps, train_steps: int = 1000, horizon: float = 1.0, end: float = 0.0) -> np.ndarray:
    """Control times of discrete timesteps, plus the end: timestep `i` is noising time `horizon (i + 1) / train_steps`.

    Args:
        timesteps: descending, the noisiest first (see `leading`, `trailing`, `linspaced`).
        train_steps: length of the table of betas.
        horizon: horizon of the schedule, noising time.
        end: noising time at which sampling ends. 0 is zero noise; `horizon / train_steps` is the first entry of the table.
    """
    table = _timesteps(np.asarray(timesteps), train_steps)
    return check_grid(horizon - np.append(horizon * (table + 1) / train_steps, end))


def _count(steps: int, train_steps: int) -> int:
    if not 1 <= steps <= train_steps:
        raise ValueError(f"steps={steps} must be between 1 and train_steps={train_steps}.")
    return steps


def _timesteps(table: np.ndarray, train_steps: int) -> np.ndarray:
    if np.any(np.diff(table) >= 0) or table[-1] < 0 or table[0] >= train_steps:
        raise ValueError(f"timesteps {table[0]} ... {table[-1]} must decrease strictly and lie in [0, {train_steps - 1}].")
    return table


class GridSteps(dfx.StepTo):
    """`diffrax.StepTo` without its run-time checks, which are host callbacks. `check_grid` has checked the grid already."""

    def wrap(self, direction):
        return type(self)(ts=self.ts * direction)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.ts[1], 2
