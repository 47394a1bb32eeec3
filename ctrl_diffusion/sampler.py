"""The sampler: a process, its control, a solver and a grid. It turns random keys into samples."""

from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from .predictions import expand
from .process import AbstractControlledSDE, Cond, ControlFn, Params, State
from .solvers import ExponentialEuler, KeyedPath, RecordedPath, Transition, integrate, levy_area_for


class Trajectory(NamedTuple):
    """A batch of paths on the control grid: times, states and noise. Everything else is recomputed from them.

    `noise[j]` holds the standard normals of interval `j` that its likelihood depends on: the Brownian increment over `sqrt(dt)`, or the
    action noise over its standard deviation.
    """

    t: Float[Array, " K"]
    x: Float[Array, "K b *x"]
    noise: Float[Array, "K-1 b *x"]


class Sampler(eqx.Module):
    """Integrates the controlled SDE. Sample `i` depends only on `keys[i]` and its own condition.

    Args:
        process: the controlled SDE.
        control: `control(params, t, x, cond) -> action`, batched; a function, or a callable pytree that holds fixed arrays.
        shape: shape of one sample.
        grid: control times, ascending from `process.t0` to `process.t1` (default: 50 equal steps).
        solver: any diffrax solver; one step per grid interval (default `ExponentialEuler`).
        dtype: type of states and times.
    """

    process: AbstractControlledSDE
    control: ControlFn
    shape: tuple[int, ...] = eqx.field(static=True)
    times: tuple[float, ...] = eqx.field(static=True)
    solver: dfx.AbstractSolver
    dtype: Any = eqx.field(static=True)

    def __init__(self, process, control, shape, *, grid=None, solver=None, dtype=jnp.float32):
        for name, value in (("process", process), ("control", control), ("solver", solver)):
            if isinstance(value, type):
                raise TypeError(f"{name}={value.__name__} is a class: pass an instance, {value.__name__}(...).")
        self.process, self.control, self.shape, self.dtype = process, control, tuple(shape), dtype
        self.times = tuple(process.check_grid(process.grid(50) if grid is None else grid).tolist())
        self.solver = ExponentialEuler() if solver is None else solver

    @property
    def grid(self) -> np.ndarray:
        """The control grid, float64 `[K]`."""
        return np.asarray(self.times)

    @property
    def ts(self) -> Float[Array, " K"]:
        """The grid as an array of the state's dtype."""
        return jnp.asarray(self.grid, self.dtype)

    @property
    def is_stochastic(self) -> bool:
        """Whether the process has noise anywhere on the grid."""
        with jax.ensure_compile_time_eval():
            return bool(jax.jit(lambda ts: jnp.any(self.process.coefficients(ts)[2] > 0))(self.ts[:-1]))

    def start(self, keys: Key[Array, " b"]) -> tuple[State, Key[Array, " b"]]:
        """Initial states and the keys of the driving noise."""
        keys = jax.vmap(jax.random.split)(keys)
        return self.process.initial(keys[:, 0], self.shape, self.dtype), keys[:, 1]

    def sample(
        self,
        params: Params,
        keys: Key[Array, " b"],
        cond: Cond = None,
        *,
        adjoint: dfx.AbstractAdjoint | None = None,
    ) -> State:
        """Final states `X(t1)`, `[b, *shape]`. States at other times are not stored."""
        x0, keys = self.start(keys)
        path = self.brownian(self.ts, keys) if self.is_stochastic else None
        term = self.process.term(self.control, path)
        return integrate(term, self.solver, self.grid, x0, (params, cond), adjoint=adjoint)

    def trajectory(self, params: Params, keys: Key[Array, " b"], cond: Cond = None) -> Trajectory:
        """The paths of `sample`, with states and noise at every grid time. The noise of an ODE is zero."""
        x0, keys = self.start(keys)
        path = noise = None
        if self.is_stochastic:
            path = self.brownian(self.ts, keys)
            noise = path.tabulate()
            if path.levy_area is dfx.BrownianIncrement:  # replay, rather than draw twice
                path = RecordedPath(ts=self.ts, noise=noise)
        term = self.process.term(self.control, path)
        x = integrate(term, self.solver, self.grid, x0, (params, cond), every_step=True)
        return Trajectory(self.ts, x, jnp.zeros_like(x[1:]) if noise is None else noise)

    def transitions(self) -> Transition:
        """The coefficients of the chain's steps, Gaussian and affine in the action, one number per interval.

        Raises `TypeError` for solvers without a Gaussian transition.
        """
        with jax.ensure_compile_time_eval():
            return _transitions(self.process, self.solver, self.ts)

    def chain_scales(self) -> Float[Array, " n"]:
        """`scale_j = psi / std` of every step: the change of its mean in units of its noise, per unit of action.

        The chain's own path KL is `sum_j |scale_j (a_j - a_ref_j)|^2 / 2`. Raises `TypeError` for solvers without a Gaussian
        transition, and `ValueError` if a step has no noise.
        """
        with jax.ensure_compile_time_eval():
            step = self.transitions()
            scales = step.psi / step.std
            if not bool(jnp.all(jnp.isfinite(scales))):
                j = int(jnp.argmin(jnp.isfinite(scales)))
                raise ValueError(
                    f"the step from t={self.grid[j]:g} to t={self.grid[j + 1]:g} has no noise, so a change of its mean has infinite "
                    "KL. Use eta > 0, and end the grid before zero noise (schedule with tau_min > 0)."
                )
        return scales

    def girsanov_scales(self) -> Float[Array, " n"]:
        """`(B/G) sqrt(dt)` at the left ends: scales of Girsanov's path KL, for any solver, to first order in the step."""
        with jax.ensure_compile_time_eval():
            return jax.jit(lambda ts: self.process.control_scale_rate(ts[:-1]) * jnp.sqrt(jnp.diff(ts)))(self.ts)

    def brownian(self, ts, keys) -> KeyedPath:
        """Brownian motion on `ts`, one path per key, with the Levy area that the solver needs."""
        return KeyedPath(ts=ts, keys=keys, shape=self.shape, levy_area=levy_area_for(self.solver))


@eqx.filter_jit
def _transitions(process: AbstractControlledSDE, solver: dfx.AbstractSolver, ts: Float[Array, " K"]) -> Transition:
    return jax.vmap(lambda t0, t1: process.transition(solver, t0, t1))(ts[:-1], ts[1:])


def path_actions(control: ControlFn, params: Params, trajectory: Trajectory, cond: Cond = None) -> Float[Array, "n b *x"]:
    """Actions of `control` at every recorded state but the last, one time after the other, in the memory of one network call.

    `cond` has one row per path.
    """
    return jax.lax.map(lambda tx: control(params, tx[0], tx[1], cond), (trajectory.t[:-1], trajectory.x[:-1]))


def step_kl(scales: Float[Array, " n"], a, a_ref) -> Float[Array, "n b"]:
    """KL of every step in nats, `|scale_j (a_j - a_ref_j)|^2 / 2`, summed over state dimensions. The sum over steps is the path KL."""
    z = expand(scales, a) * (a - a_ref)
    return 0.5 * jnp.sum(z**2, axis=tuple(range(2, a.ndim)))


def log_ratio(z: Float[Array, "n *x"], noise: Float[Array, "n *x"]) -> Float[Array, " n"]:
    r"""`log dP_new / dP_old` of steps that the old policy made with `noise`: `z . noise - |z|^2 / 2`, summed over dimensions.

    `z = scale (a_new - a_old)`. Girsanov's formula, exact for Gaussian transitions and for Gaussian action noise.
    """
    axes = tuple(range(1, z.ndim))
    return jnp.sum(z * noise - 0.5 * z**2, axis=axes)
