r"""Gaussian data and a quadratic reward: every quantity of the control problem in closed form, at any `eta > 0` and schedule.

The data is `N(m0, s0^2)` in every dimension, independently; `r(x) = -k |x - a|^2 / 2`. The noised law is `N(m, v)` with `m = alpha m0`,
`v = alpha^2 s0^2 + sigma^2`. The reference, whose action is the true score `-(x - m) / v`, is a linear Gaussian process:

    dX = A_cl (X - m) dt + m' dt + eta g dW,        A_cl = -f - (1 + eta^2)/2 g^2 / v.

In control time `v' = -2 f v - g^2`, hence with `w = v / alpha^2`

    A_cl = (log v)'/2 - eta^2 g^2 / (2 v),          g^2 / v = -(log w)',

so that `X(t1)` given `X(t) = x` is `N(mu, S)` with

    mu = m_1 + Phi (x - m),    Phi = sqrt(v_1 / v) (w_1 / w)^(eta^2 / 2),    S = v_1 (1 - (w_1 / w)^(eta^2)).

The index 1 means at `t1`. A Gaussian integral gives the soft value, with `D = 1 + k S / lambda`:

    V*(t, x) = lambda log E^ref[exp(r / lambda) | X_t = x] = -k (mu - a)^2 / (2 D) - (lambda / 2) log D,
    grad V*  = -k Phi (mu - a) / D,        a* = -(x - m) / v + 2 eta^2 / (lambda (1 + eta^2)) grad V*.

As `V* = -P x^2/2 + Q x + R` it solves the Riccati equation `P' = -2 A_cl P + (eta^2 g^2 / lambda) P^2`, `P(t1) = k`.
The optimal path law is the reference reweighted by `exp((r(X_{t1}) - V*(t0, X_{t0})) / lambda)`: given `X(t0)`, the final
state is `N((mu + k S a / lambda) / D, S / D)`, and the path KL is `(E* r - J*) / lambda`.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ..predictions import expand
from ..process import Cond, DiffusionProcess, Params, State, Time
from ..solvers import standard_normal
from .problem import AbstractControlProblem, Number, total


class TerminalLaw(NamedTuple):
    """`X(t1)` given `X(t) = x` under the reference is `N(shift + phi x, variance)` in every dimension."""

    phi: Time
    shift: Time
    variance: Time


class GaussianQuadratic(eqx.Module):
    r"""Data `N(data_mean, data_std^2)` per dimension, and the reward `-curvature |x - target|^2 / 2` of `X(t1)`.

    It is exact for every schedule, `tau_min >= 0` and `eta > 0`; the reference law of `X(t1)` is the data noised to `tau_min`. States may
    have any shape. Values of states sum over its dimensions; other numbers (`optimal_value`, `path_kl`, ...) are per state dimension.

    Args:
        process: the diffusion process, `eta > 0`.
        data_mean, data_std, curvature, target: the numbers `m0`, `s0 > 0`, `k > 0`, `a` of the module's docstring.
        kl_weight: the temperature `lambda > 0`.
        noise_start: whether `X(t0)` is pure noise `N(0, sigma(tau_max)^2)`, which `DiffusionProcess.initial` draws; else (default) it is
            the noised data `N(m, v)`. The law of `X(t0)` is not controlled.
    """

    process: DiffusionProcess
    data_mean: float = eqx.field(static=True)
    data_std: float = eqx.field(static=True)
    curvature: float = eqx.field(static=True)
    target: float = eqx.field(static=True)
    kl_weight: float = eqx.field(static=True)
    noise_start: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        self.process.require_noise("the path-KL control problem", "Use eta > 0.")
        for name in ("data_std", "curvature", "kl_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")

    def reward(self, x: State) -> Float[Array, " b"]:
        """`-curvature |x - target|^2 / 2`, summed over state dimensions."""
        return -0.5 * self.curvature * total((x - self.target) ** 2)

    def marginal(self, t: Time) -> tuple[Time, Time]:
        """Mean and variance `(m, v)` of the noised data at control time `t`."""
        schedule, tau = self.process.schedule, self.process.tau(t)
        alpha = schedule.alpha(tau)
        return alpha * self.data_mean, alpha**2 * self.data_std**2 + schedule.sigma_squared(tau)

    def terminal_law(self, t: Time) -> TerminalLaw:
        """The reference law of `X(t1)` given `X(t)`, by `Phi`, `m_1 - Phi m` and `S` of the module's docstring."""
        end = jnp.asarray(self.process.t1, t.dtype)
        (m, v), (m1, v1) = self.marginal(t), self.marginal(end)
        eta_squared = self.process.eta**2
        log_w = jnp.log(v1 / v) - 2 * (self._log_alpha(end) - self._log_alpha(t))
        phi = jnp.sqrt(v1 / v) * jnp.exp(0.5 * eta_squared * log_w)
        return TerminalLaw(phi, m1 - phi * m, -v1 * jnp.expm1(eta_squared * log_w))

    def value(self, t: Time, x: State) -> Float[Array, " b"]:
        """Soft value `V*(t, x)`; equal to `reward(x)` at `t1`."""
        miss, shrink, _ = self._miss(t, x)
        variance_cost = expand(0.5 * self.kl_weight * jnp.log(shrink), x)
        return total(-0.5 * self.curvature * miss**2 / expand(shrink, x) - variance_cost)

    def value_gradient(self, t: Time, x: State) -> State:
        """`grad V*(t, x)`."""
        miss, shrink, phi = self._miss(t, x)
        return -self.curvature * expand(phi / shrink, x) * miss

    def reference_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """The true score of the noised data, `-(x - m) / v`."""
        m, v = self.marginal(t)
        return -(x - expand(m, x)) / expand(v, x)

    def optimal_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """`a* = a_ref + 2 eta^2 / (lambda (1 + eta^2)) grad V*`."""
        eta_squared = self.process.eta**2
        gain = 2 * eta_squared / (self.kl_weight * (1 + eta_squared))
        return self.reference_action(params, t, x, cond) + gain * self.value_gradient(t, x)

    @property
    def start(self) -> tuple[Number, Number]:
        """Mean and variance of `X(t0)`."""
        t0 = jnp.asarray(self.process.t0, float)
        if self.noise_start:
            return jnp.zeros_like(t0), self.process.schedule.sigma_squared(self.process.tau(t0))
        return self.marginal(t0)

    @property
    def reference_terminal(self) -> tuple[Number, Number]:
        """Mean and variance of `X(t1)` under the reference action."""
        mean, variance = self.start
        phi, shift, s = self.terminal_law(jnp.asarray(self.process.t0, float))
        return shift + phi * mean, phi**2 * variance + s

    @property
    def optimal_terminal(self) -> tuple[Number, Number]:
        """Mean and variance of `X(t1)` under the optimal action."""
        mean, variance = self.start
        phi, shift, s = self.terminal_law(jnp.asarray(self.process.t0, float))
        shrink = 1 + self.curvature * s / self.kl_weight
        pull = self.curvature * s * self.target / self.kl_weight
        return (shift + phi * mean + pull) / shrink, s / shrink + variance * (phi / shrink) ** 2

    @property
    def tilted_law(self) -> tuple[Number, Number]:
        """Mean and variance of the reweighted law `p_ref(x) exp(r(x) / lambda)` of `X(t1)`; it is the optimum if memoryless."""
        mean, variance = self.reference_terminal
        shrink = 1 + self.curvature * variance / self.kl_weight
        return (mean + self.curvature * variance * self.target / self.kl_weight) / shrink, variance / shrink

    @property
    def optimal_value(self) -> Number:
        """`J* = E V*(t0, X(t0))`, per state dimension."""
        mean, variance = self.start
        t0 = jnp.asarray(self.process.t0, float)
        miss, shrink, phi = self._miss(t0, mean)
        return -0.5 * self.curvature * (miss**2 + phi**2 * variance) / shrink - 0.5 * self.kl_weight * jnp.log(shrink)

    @property
    def reference_value(self) -> Number:
        """`J(a_ref) = E^ref r`, per state dimension."""
        return self._expected_reward(*self.reference_terminal)

    @property
    def optimal_reward(self) -> Number:
        """`E* r` at the optimum, per state dimension."""
        return self._expected_reward(*self.optimal_terminal)

    @property
    def path_kl(self) -> Number:
        """Path KL of the optimum from the reference, `(E* r - J*) / lambda`, nats per state dimension."""
        return (self.optimal_reward - self.optimal_value) / self.kl_weight

    @property
    def terminal_kl(self) -> Number:
        """KL between the optimal and the reference law of `X(t1)`, nats per state dimension; at most `path_kl`."""
        (mean, variance), (ref_mean, ref_variance) = self.optimal_terminal, self.reference_terminal
        ratio = variance / ref_variance
        return 0.5 * (ratio - 1 - jnp.log(ratio) + (mean - ref_mean) ** 2 / ref_variance)

    def _log_alpha(self, t: Time) -> Time:
        return self.process.schedule.log_alpha(self.process.tau(t))

    def _miss(self, t: Time, x):
        """`mu - a`, `D = 1 + k S / lambda` and `Phi`."""
        phi, shift, s = self.terminal_law(t)
        return expand(phi, x) * x + expand(shift, x) - self.target, 1 + self.curvature * s / self.kl_weight, phi

    def _expected_reward(self, mean: Number, variance: Number) -> Number:
        return -0.5 * self.curvature * ((mean - self.target) ** 2 + variance)


class GaussianControl(AbstractControlProblem):
    """`GaussianQuadratic` over states of a given shape, with all numbers summed over dimensions.

    Args:
        quadratic: the problem of one dimension, with `noise_start=True`, because simulations start from pure noise.
        shape: shape of one state.
        steps: the usual number of steps.
    """

    quadratic: GaussianQuadratic
    shape: tuple[int, ...] = eqx.field(static=True, default=(1,))
    steps: int = eqx.field(static=True, default=50)

    def __check_init__(self):
        if not self.quadratic.noise_start:
            raise ValueError(
                "noise_start=False: the process starts from pure noise; use GaussianQuadratic(..., noise_start=True)."
            )

    @property
    def process(self) -> DiffusionProcess:
        return self.quadratic.process

    @property
    def kl_weight(self) -> float:
        return self.quadratic.kl_weight

    def reward(self, x: State) -> Float[Array, " b"]:
        return self.quadratic.reward(x)

    def reference_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        return self.quadratic.reference_action(params, t, x, cond)

    def optimal_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        return self.quadratic.optimal_action(params, t, x, cond)

    def value(self, t: Time, x: State) -> Float[Array, " b"]:
        return self.quadratic.value(t, x)

    def value_gradient(self, t: Time, x: State) -> State:
        return self.quadratic.value_gradient(t, x)

    def optimal_value(self) -> Number:
        return math.prod(self.shape) * self.quadratic.optimal_value

    def sample_optimal(self, keys: Key[Array, " b"]) -> Float[Array, "b *x"]:
        mean, variance = self.quadratic.optimal_terminal
        return mean + jnp.sqrt(variance) * standard_normal(keys, 0, self.shape, mean.dtype)
