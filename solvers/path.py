"""Brownian increments on a fixed grid. They are exact, differentiable, and a pure function of sample key and interval.

Sample `i` of a batch draws from its own key, so its noise does not change if the batch is split, reordered or sharded.
"""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key


def sample_keys(key: Key[Array, ""], batch: int, start: int | Int[Array, ""] = 0) -> Key[Array, " b"]:
    """One key per sample: `fold_in(key, i)` for global sample index `i = start .. start + batch - 1`."""
    return jax.vmap(lambda i: jr.fold_in(key, i))(start + jnp.arange(batch))


def standard_normal(keys: Key[Array, " b"], index, shape: tuple[int, ...], dtype: Any) -> Float[Array, "b *x"]:
    """Standard normals `[b, *shape]`. Sample `i` is drawn from `fold_in(keys[i], index)`."""
    return jax.vmap(lambda k: jr.normal(jr.fold_in(k, index), shape, dtype))(keys)


def minimal_levy_area(solver: dfx.AbstractSolver) -> Any:
    """The abstract class of the increments that `solver`, or the solver inside it, needs."""
    while isinstance(solver, dfx.AbstractWrappedSolver):
        solver = solver.solver
    return getattr(solver, "minimal_levy_area", dfx.AbstractBrownianIncrement)


def levy_area_for(solver: dfx.AbstractSolver) -> Any:
    """The increments that a path must have for `solver`: `diffrax.SpaceTimeLevyArea` or `diffrax.BrownianIncrement`."""
    return dfx.BrownianIncrement if issubclass(dfx.BrownianIncrement, minimal_levy_area(solver)) else dfx.SpaceTimeLevyArea


def interval_index(ts, t0, t1):
    """Index of the grid interval that contains the midpoint of `[t0, t1]`."""
    return jnp.searchsorted(ts, 0.5 * (t0 + t1), method="compare_all") - 1


def _increment(self, dt, w, h, use_levy):
    if not use_levy:
        return w
    if self.levy_area is dfx.BrownianIncrement:
        return dfx.BrownianIncrement(dt=dt, W=w)
    return dfx.SpaceTimeLevyArea(dt=dt, W=w, H=h)


class KeyedPath(dfx.AbstractBrownianPath):
    """Brownian motion on the grid `ts`, one path per key. Increments are drawn on every call and not stored.

    It is valid for solvers that use increments over whole grid intervals only: every fixed-step solver without inner half steps.
    For adaptive steps use `brownian_tree`.
    """

    ts: Float[Array, " n"]
    keys: Key[Array, " b"]
    shape: tuple[int, ...] = eqx.field(static=True)
    levy_area: Any = eqx.field(static=True, default=dfx.BrownianIncrement)

    @property
    def t0(self):
        return self.ts[0]

    @property
    def t1(self):
        return self.ts[-1]

    def noise(self, index) -> Float[Array, "b *x"]:
        """The standard normals of interval `index`, `[b, *shape]`."""
        return standard_normal(self.keys, 2 * index, self.shape, self.ts.dtype)

    def tabulate(self) -> Float[Array, "n b *x"]:
        """All standard normals of the grid, `[n - 1, b, *shape]`, for `RecordedPath`."""
        return jax.lax.map(self.noise, jnp.arange(len(self.ts) - 1))

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        if t1 is None:
            raise ValueError("KeyedPath gives increments over grid intervals: call evaluate(t0, t1) with t1.")
        i = interval_index(self.ts, t0, t1)
        dt = self.ts[i + 1] - self.ts[i]
        h = None
        if use_levy and self.levy_area is not dfx.BrownianIncrement:
            h = standard_normal(self.keys, 2 * i + 1, self.shape, self.ts.dtype) * jnp.sqrt(dt / 12)
        return _increment(self, dt, self.noise(i) * jnp.sqrt(dt), h, use_levy)


class RecordedPath(dfx.AbstractBrownianPath):
    """Brownian motion with given standard normals `noise[j]` in interval `j` of the grid `ts`, to replay a path or to inject noise."""

    ts: Float[Array, " n"]
    noise: Float[Array, "n-1 b *x"]
    levy_area: Any = eqx.field(static=True, default=dfx.BrownianIncrement)

    @property
    def t0(self):
        return self.ts[0]

    @property
    def t1(self):
        return self.ts[-1]

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        if t1 is None:
            raise ValueError("RecordedPath gives increments over grid intervals: call evaluate(t0, t1) with t1.")
        if use_levy and self.levy_area is not dfx.BrownianIncrement:
            raise ValueError("RecordedPath holds no Levy areas: use KeyedPath(levy_area=SpaceTimeLevyArea) for this solver.")
        i = interval_index(self.ts, t0, t1)
        dt = self.ts[i + 1] - self.ts[i]
        return _increment(self, dt, self.noise[i] * jnp.sqrt(dt), None, use_levy)
