r"""Linear drift with a quadratic or linear cost. The value is quadratic or linear in the state.

In the literature's terms (see `ctrl_diffusion.drift`) `dX = (a X + sigma u) dt + sqrt(lambda) sigma dB` in `d` dimensions, cost
`E[int (|u|^2/2 + p |X|^2) dt + q |X_T|^2 + w sum_i X_T,i]`, `sigma^2 = G^2 / lambda`. Here `V* = -V` and everything is per
dimension; `s = T - t` is the remaining time.

*Quadratic.* `V = F x^2 + R` solves the HJB equation if `F' + 2 a F - 2 sigma^2 F^2 + p = 0`, `F(T) = q`, and `R' = -G^2 F`,
`R(T) = 0`. With `D = sqrt(a^2 + 2 sigma^2 p)`, `F_+- = (a +- D) / (2 sigma^2)`, `c = (q - F_+) / (q - F_-)`, `e = c e^{-2 D s}`

    F = (F_+ - F_- e) / (1 - e),        sigma^2 int_t^T F = sigma^2 F_+ s + log((1 - e(t)) / (1 - c)) / 2.

The optimal drift is `(a - 2 sigma^2 F) x`, and `a - 2 sigma^2 F_+ = -D`, so from 0 to t a deviation is multiplied by
`Phi = e^{-D t} (1 - e(t)) / (1 - e(0))`, and the noise adds the variance `G^2 (1 - e(t)) (1 - e^{-2 D t}) / (2 D (1 - e(0)))`.

*Linear.* `V = h x + R`, `h = w e^{a s}`, `R = -(sigma^2 / 2) int_t^T h^2`. The optimal drift is `a x - sigma^2 h`.

Domingo-Enrich et al., Stochastic Optimal Control Matching (2024), appendix on experiments.
"""

import math

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..drift import DriftProcess
from ..predictions import expand
from ..process import Cond, Params, State, Time
from ..solvers import standard_normal
from .problem import AbstractControlProblem, Number, total


class QuadraticCost(eqx.Module):
    """`f(t, x) = weight |x|^2`."""

    weight: float = eqx.field(static=True)

    def __call__(self, t: Time, x: State) -> Float[Array, " b"]:
        return self.weight * total(x**2)


class QuadraticOU(AbstractControlProblem):
    r"""Drift `rate x`, running cost `state_cost |x|^2`, reward `-terminal_cost |x|^2`, `kl_weight lambda`, noise `G`.

    Args:
        rate: `a` of the reference drift `a x`.
        state_cost, terminal_cost: `p >= 0` and `q >= 0`, without a factor 1/2.
        dim: number of independent dimensions.
        start, start_std: `X(0) ~ N(start, start_std^2)` in every dimension.
        noise, kl_weight, horizon: `G`, `lambda` and `T`.
        steps: the usual number of steps.
    """

    rate: float = eqx.field(static=True)
    state_cost: float = eqx.field(static=True)
    terminal_cost: float = eqx.field(static=True)
    dim: int = eqx.field(static=True, default=20)
    start: float = eqx.field(static=True, default=0.5)
    start_std: float = eqx.field(static=True, default=0.0)
    noise: float = eqx.field(static=True, default=1.0)
    kl_weight: float = eqx.field(static=True, default=1.0)
    horizon: float = eqx.field(static=True, default=1.0)
    steps: int = eqx.field(static=True, default=50)

    def __check_init__(self):
        _positive(dim=self.dim, noise=self.noise, kl_weight=self.kl_weight, horizon=self.horizon)
        if not (self.state_cost >= 0 and self.terminal_cost >= 0):
            raise ValueError(f"state_cost={self.state_cost} and terminal_cost={self.terminal_cost} must be at least 0.")
        if self._d == 0:
            raise ValueError(
                "rate=0.0 and state_cost=0.0: the closed form divides by D = 0. Choose another value for one of them."
            )
        if not self.terminal_cost > self._f_minus:
            raise ValueError(f"rate={self.rate}, state_cost=0.0, terminal_cost=0.0: the value is constant. Give it a cost.")

    @property
    def process(self) -> DriftProcess:
        cost = QuadraticCost(self.state_cost) if self.state_cost else None
        return DriftProcess(self.noise, self.horizon, self.start, self.start_std, cost)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def reward(self, x: State) -> Float[Array, " b"]:
        """`-terminal_cost |x|^2`."""
        return -self.terminal_cost * total(x**2)

    def reference_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """`rate x`."""
        return self.rate * x

    def optimal_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """`(rate - 2 sigma^2 F) x`, that is `u* = -2 sigma F x`."""
        return self.process.improved_action(t, self.rate * x, self.value_gradient(t, x), self.kl_weight)

    def value(self, t: Time, x: State) -> Float[Array, " b"]:
        return total(-expand(self.curvature(t), x) * x**2 - expand(self._remainder(t), x))

    def value_gradient(self, t: Time, x: State) -> State:
        return -2 * expand(self.curvature(t), x) * x

    def curvature(self, t: Time) -> Time:
        """`F(t)` of the module's docstring, by the closed form: `V* = -F |x|^2 - R`."""
        e = self._e(t)
        return (self._f_plus - self._f_minus * e) / (1 - e)

    def optimal_value(self) -> Number:
        t0 = jnp.asarray(0.0, float)
        second = self.start**2 + self.start_std**2
        return -self.dim * (self.curvature(t0) * second + self._remainder(t0))

    def optimal_marginal(self, t: Time) -> tuple[Time, Time]:
        """Mean and variance of every dimension of `X(t)` under the optimal action."""
        shrink = (1 - self._e(t)) / (1 - self._e(jnp.zeros_like(t)))
        phi = jnp.exp(-self._d * t) * shrink
        added = -(self.noise**2) * shrink * jnp.expm1(-2 * self._d * t) / (2 * self._d)
        return phi * self.start, phi**2 * self.start_std**2 + added

    def sample_optimal(self, keys: Key[Array, " b"]) -> Float[Array, "b d"]:
        return _gaussian(self, keys)

    @property
    def _d(self) -> float:
        return math.sqrt(self.rate**2 + 2 * self.state_cost * self._sigma_squared)

    @property
    def _sigma_squared(self) -> float:
        return self.noise**2 / self.kl_weight

    @property
    def _f_plus(self) -> float:
        return (self.rate + self._d) / (2 * self._sigma_squared)

    @property
    def _f_minus(self) -> float:
        return (self.rate - self._d) / (2 * self._sigma_squared)

    @property
    def _c(self) -> float:
        return (self.terminal_cost - self._f_plus) / (self.terminal_cost - self._f_minus)

    def _e(self, t: Time) -> Time:
        return self._c * jnp.exp(-2 * self._d * (self.horizon - t))

    def _remainder(self, t: Time) -> Time:
        """`R(t) = G^2 int_t^T F`, per dimension."""
        logarithm = jnp.log1p(-self._e(t)) - math.log1p(-self._c)
        return self.kl_weight * (self._sigma_squared * self._f_plus * (self.horizon - t) + 0.5 * logarithm)


class LinearOU(AbstractControlProblem):
    r"""Drift `rate x`, no running cost, reward `-slope sum_i x_i`, `kl_weight lambda`, noise `G`; arguments as `QuadraticOU`."""

    rate: float = eqx.field(static=True, default=-1.0)
    slope: float = eqx.field(static=True, default=1.0)
    dim: int = eqx.field(static=True, default=10)
    start: float = eqx.field(static=True, default=0.0)
    start_std: float = eqx.field(static=True, default=0.0)
    noise: float = eqx.field(static=True, default=1.0)
    kl_weight: float = eqx.field(static=True, default=1.0)
    horizon: float = eqx.field(static=True, default=1.0)
    steps: int = eqx.field(static=True, default=50)

    def __check_init__(self):
        _positive(dim=self.dim, noise=self.noise, kl_weight=self.kl_weight, horizon=self.horizon)

    @property
    def process(self) -> DriftProcess:
        return DriftProcess(self.noise, self.horizon, self.start, self.start_std)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.dim,)

    def reward(self, x: State) -> Float[Array, " b"]:
        """`-slope sum_i x_i`."""
        return -self.slope * total(x)

    def reference_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """`rate x`."""
        return self.rate * x

    def optimal_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """`rate x - sigma^2 slope e^{rate (T - t)}`."""
        return self.process.improved_action(t, self.rate * x, self.value_gradient(t, x), self.kl_weight)

    def value(self, t: Time, x: State) -> Float[Array, " b"]:
        return total(expand(self._h(t), x) * -x + expand(self._gain(t), x))

    def value_gradient(self, t: Time, x: State) -> State:
        return jnp.zeros_like(x) - expand(self._h(t), x)

    def optimal_value(self) -> Number:
        t0 = jnp.asarray(0.0, float)
        return self.dim * (self._gain(t0) - self._h(t0) * self.start)

    def control_energy(self) -> Number:
        """`int |u*|^2 dt = sigma^2 slope^2 dim int_0^T e^{2 rate s} ds` in the literature's units. It is the same on every path."""
        return 2 * self.dim * self._gain(jnp.asarray(0.0, float))

    def optimal_marginal(self, t: Time) -> tuple[Time, Time]:
        """Mean and variance of every dimension of `X(t)` under the optimal action."""
        grown, spread = jnp.exp(self.rate * t), _integral(2 * self.rate, t)
        mean = grown * self.start - self._sigma_squared * self._h(t) * spread
        return mean, grown**2 * self.start_std**2 + self.noise**2 * spread

    def sample_optimal(self, keys: Key[Array, " b"]) -> Float[Array, "b d"]:
        return _gaussian(self, keys)

    @property
    def _sigma_squared(self) -> float:
        return self.noise**2 / self.kl_weight

    def _h(self, t: Time) -> Time:
        return self.slope * jnp.exp(self.rate * (self.horizon - t))

    def _gain(self, t: Time) -> Time:
        """`-R(t) = (sigma^2 / 2) int_t^T h^2`, per dimension."""
        return 0.5 * self._sigma_squared * self.slope**2 * _integral(2 * self.rate, self.horizon - t)


def _integral(rate: float, s: Time) -> Time:
    """`int_0^s e^{rate r} dr`."""
    return s if rate == 0 else jnp.expm1(rate * s) / rate


def _gaussian(problem: QuadraticOU | LinearOU, keys: Key[Array, " b"]) -> Float[Array, "b d"]:
    mean, variance = problem.optimal_marginal(jnp.asarray(problem.horizon, float))
    return mean + jnp.sqrt(variance) * standard_normal(keys, 0, problem.shape, jnp.asarray(mean).dtype)


def _positive(**arguments: int | float) -> None:
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive.")
