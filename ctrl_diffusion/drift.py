r"""The controlled SDE of the stochastic-control literature. The action is the drift, and the noise is constant.

    dX = a(t, X) dt + G dW on [0, T],        KL(P^a || P^ref) = E^a int |a - a_ref|^2 / (2 G^2) dt

The literature writes `dX = (b + sigma u) dt + sqrt(lambda) sigma dB` and minimises `E[int (|u|^2/2 + f) dt + g(X_T)]`. This is
the process here with `G = sqrt(lambda) sigma`, reference action `a_ref = b`, action `a = b + sigma u`, running cost `f`, reward
`r = -g` and `kl_weight = lambda`: then `lambda KL = E int |u|^2/2 dt`, `J = -cost` and `V* = -V`.
"""

from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .process import AbstractControlledSDE, Args, ControlFn, State, Time, check_shape
from .solvers import AbstractSemilinearTerm, Transition, gaussian_transition, standard_normal

RunningCost = Callable[[Time, State], Float[Array, " b"]]


class DriftProcess(AbstractControlledSDE):
    """`dX = a dt + noise dW` on `[0, horizon]`: `A = 0`, `B = 1`, `G = noise`. It starts at a fixed point or from a Gaussian.

    If the drift is frozen over a step, the exact step is that of Euler-Maruyama. So `ExponentialEuler` and `diffrax.Euler` agree.

    Args:
        noise: the noise level `G > 0`, per square root of time.
        horizon: the end `T > 0` of control time, which starts at 0.
        start: mean of `X(0)`, one number for all dimensions.
        start_std: standard deviation of `X(0)` in every dimension; 0 is a fixed point.
        cost: running cost rate `f(t, x) -> [b]`, `t` a scalar or `[b]`; None is zero.
    """

    noise: float = eqx.field(static=True, default=1.0)
    horizon: float = eqx.field(static=True, default=1.0)
    start: float = eqx.field(static=True, default=0.0)
    start_std: float = eqx.field(static=True, default=0.0)
    cost: RunningCost | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        for name in ("noise", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if not self.start_std >= 0:
            raise ValueError(f"start_std={self.start_std} must be at least 0 (0: a fixed start).")

    @property
    def t0(self) -> float:
        return 0.0

    @property
    def t1(self) -> float:
        return self.horizon

    def coefficients(self, t: Time) -> tuple[Time, Time, Time]:
        return jnp.zeros_like(t), jnp.ones_like(t), jnp.full_like(t, self.noise)

    def initial(self, keys, shape: tuple[int, ...], dtype: Any = jnp.float32) -> State:
        """`N(start, start_std^2)` in every dimension."""
        return self.start + self.start_std * standard_normal(keys, 0, shape, dtype)

    def term(self, control: ControlFn, path: dfx.AbstractBrownianPath | None) -> AbstractSemilinearTerm:
        if path is None:
            raise ValueError(f"path=None, but the process has noise={self.noise}: pass a Brownian path, such as KeyedPath.")
        return DriftTerm(self, control, path)

    def running_cost(self, t: Time, x: State) -> Float[Array, " b"]:
        return jnp.zeros(x.shape[0], x.dtype) if self.cost is None else self.cost(t, x)

    def transition(self, solver: dfx.AbstractSolver, t0: Time, t1: Time) -> Transition:
        return gaussian_transition(solver, DriftTerm(self, _no_action, None), t0, t1)


class DriftTerm(AbstractSemilinearTerm):
    """A drift process under a control. The frozen variable is the drift itself."""

    process: DriftProcess
    action: ControlFn
    path: dfx.AbstractBrownianPath | None

    def control(self, t, x, args: Args) -> State:
        params, cond = args
        action = self.action(params, t, x, cond)
        check_shape("the control", action, x)
        return action

    def coefficients(self, t):
        return self.process.coefficients(t)

    def propagator(self, t0, t1) -> Transition:
        dt = t1 - t0
        return Transition(jnp.ones_like(dt), dt, self.process.noise * jnp.sqrt(dt))

    def rate(self):
        """The drift enters with a constant weight."""
        return 0.0


def _no_action(params, t, x, cond):
    raise RuntimeError("this term was made for its coefficients only and has no action.")
