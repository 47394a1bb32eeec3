"""Time grids: ascending numpy arrays, checked eagerly once, stepped through without host callbacks."""

import diffrax as dfx
import numpy as np


def check_grid(ts) -> np.ndarray:
    """Return `ts` as a float64 numpy array, or say what is wrong with it (needs 2+ finite, strictly increasing times)."""
    ts = np.asarray(ts, np.float64)
    if ts.ndim != 1 or len(ts) < 2:
        raise ValueError(f"grid has shape {ts.shape}: it must be one-dimensional with at least two times.")
    if not np.all(np.isfinite(ts)):
        raise ValueError(f"grid has a non-finite time at index {int(np.argmin(np.isfinite(ts)))}.")
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
        raise ValueError(f"steps={steps} must be at least 1.")
    return check_grid(np.linspace(t0, t1, steps + 1))


def refine(ts, substeps: int) -> np.ndarray:
    """Split every interval of `ts` into `substeps` equal ones."""
    ts = check_grid(ts)
    if substeps < 1:
        raise ValueError(f"substeps={substeps} must be at least 1.")
    inner = ts[:-1, None] + np.diff(ts)[:, None] * np.arange(substeps) / substeps
    return np.append(inner.ravel(), ts[-1])


class GridSteps(dfx.StepTo):
    """`diffrax.StepTo` without its run-time checks, which are host callbacks; `check_grid` has made them already."""

    def wrap(self, direction):
        return type(self)(ts=self.ts * direction)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        return self.ts[1], 2
