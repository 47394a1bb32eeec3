r"""Critics: the value of a state, the targets that it is regressed on, and the loss of the regression.

    target                              squared error converges to                      soft error converges to
    `returns`         r - costs         E^a[r - costs | x]                              -
    `kl_to_go`        ... - lambda KL   the policy's own value V^a                      -
    `log_ratio_to_go` ... - lambda log  V^a, with less noise near the optimum           V* = lambda log E^ref exp(. / lambda)

The last line holds for every policy `a`: `E^a[exp((r - costs)/lambda) dP^ref/dP^a | x] = exp(V*(t, x)/lambda)`. The variance is zero
at the optimum.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .advantages import advantages, to_go, value_increments
from .objective import Objective
from .process import Cond, Params
from .rollout import Rollout, Transitions
from .values import AbstractValue

Target = Callable[[Objective, Rollout], Float[Array, "n b"]]
Temperature = float | Float[Array, ""]
ValueLoss = Callable[[Float[Array, " m"], Float[Array, " m"], Temperature], Float[Array, ""]]


def returns(objective: Objective, rollout: Rollout) -> Float[Array, "n b"]:
    """`r(X_T) - sum_{l >= j} cost_l`, without KL. A policy trained on it has another fixed point than the maximiser of J."""
    return rollout.reward - to_go(objective.costs(rollout))


def kl_to_go(objective: Objective, rollout: Rollout) -> Float[Array, "n b"]:
    """`r(X_T) - sum_{l >= j} (cost_l + lambda kl_l)`: Monte Carlo returns of J."""
    return rollout.reward - to_go(objective.costs(rollout) + objective.kl_weight * rollout.penalty)


def log_ratio_to_go(objective: Objective, rollout: Rollout) -> Float[Array, "n b"]:
    """`r(X_T) - sum_{l >= j} (cost_l + lambda log (dP^a/dP^ref)_l)`: realised log-ratios replace their means, the KL."""
    return rollout.reward - to_go(objective.costs(rollout) + objective.kl_weight * rollout.log_ratio)


def squared_error(value: Float[Array, " m"], target: Float[Array, " m"], kl_weight: Temperature) -> Float[Array, ""]:
    """Mean of `(value - target)^2`: its minimiser is the arithmetic mean of the target given the state."""
    return jnp.mean((value - target) ** 2)


def soft_error(
    value: Float[Array, " m"], target: Float[Array, " m"], kl_weight: Temperature, largest: Float[Array, ""] | None = None
) -> Float[Array, ""]:
    r"""Mean of `lambda^2 (e^d - 1 - d)`, `d = (target - value)/lambda`: its minimiser is `lambda log E exp(target / lambda)`.

    To second order in `d` it is half the squared error. If the largest `d` of the batch exceeds 1, all terms are divided by `e^(d - 1)` of
    that `d`: nothing overflows, and the gradient changes its scale but not its zero. If `value` and `target` are only a part of a batch,
    give `largest`, the largest `d` of the whole batch.
    """
    d = (target - value) / kl_weight
    shift = jax.lax.stop_gradient(jnp.maximum((jnp.max(d) if largest is None else largest) - 1, 0))
    return kl_weight**2 * jnp.mean(jnp.exp(d - shift) - jnp.exp(-shift) * (1 + d))


class Critic(eqx.Module):
    """A value and how it is learned.

    Args:
        value: the function of time and state, with `V(t1, x) = r(x)`.
        target: the regression target, `(objective, rollout) -> [n, b]` (default `kl_to_go`).
        loss: `(value, target, kl_weight) -> scalar`, a mean over transitions (default `squared_error`).
        horizon: decay time of the targets, control time. `inf` is Monte Carlo. A finite horizon replaces the rest of the path by the
            value, `V_j + advantages(increments of the value, horizon)`: TD(lambda) with a decay per unit time.
        frozen: keep the value's parameters as they are given to `init`. Otherwise a value with parameters needs an optimiser,
            `Training(value=...)`.
    """

    value: AbstractValue
    target: Target = eqx.field(static=True, default=kl_to_go)
    loss: ValueLoss = eqx.field(static=True, default=squared_error)
    horizon: float = eqx.field(static=True, default=float("inf"))
    frozen: bool = eqx.field(static=True, default=False)

    @property
    def learns(self) -> bool:
        """Whether the value has parameters, and they are learned."""
        return self.value.has_parameters and not self.frozen

    def values(self, params: Params, rollout: Rollout) -> Float[Array, "K b"]:
        """Values of all recorded states; at the last time they are the rewards."""

        def value(at_time):
            t, x, x_hat, r_hat = at_time
            return self._value(params, t, x, x_hat, r_hat, rollout.cond)

        values = jax.lax.map(value, (rollout.t[:-1], rollout.x[:-1], rollout.x_hat, rollout.r_hat))
        return jnp.concatenate([values, rollout.reward[None]])

    def targets(self, objective: Objective, rollout: Rollout, values: Float[Array, "K b"]) -> Float[Array, "n b"]:
        """Regression targets of the value at every recorded state but the last."""
        target = self.target(objective, rollout)
        if self.horizon == float("inf"):
            return target
        paid = jnp.concatenate([target[1:], rollout.reward[None]]) - target
        increments = value_increments(values, paid)
        return values[:-1] + advantages(increments, jnp.diff(rollout.t), self.horizon)

    def error(
        self, params: Params, objective: Objective, transitions: Transitions, largest: Float[Array, ""] | None = None
    ) -> Float[Array, ""]:
        """Loss of the regression on transitions `[m]`; `largest`: see `largest_exponent`."""
        value = self._value_of(params, objective, transitions)
        return self._loss(value, transitions.value_target, objective.kl_weight, largest)

    def largest_exponent(self, params: Params, objective: Objective, transitions: Transitions) -> Float[Array, ""]:
        """The largest `(target - V) / lambda` of transitions `[m]`, which the soft error of a part of a minibatch needs of all of it."""
        value = self._value_of(params, objective, transitions)
        return jnp.max((transitions.value_target - value) / objective.kl_weight)

    def _value_of(self, params: Params, objective: Objective, transitions: Transitions) -> Float[Array, " m"]:
        t, v = objective.sampler.ts[transitions.j], transitions
        return self._value(params, t, v.x, v.x_hat, v.r_hat, v.cond)

    def _value(self, params: Params, t, x, x_hat, r_hat, cond: Cond) -> Float[Array, " m"]:
        """The value of recorded states. Unused estimates, which are `None`, are replaced by `x` and 0."""
        x_hat = x if x_hat is None else x_hat
        return self.value(params, t, x, x_hat, jnp.zeros(x.shape[0], x.dtype) if r_hat is None else r_hat, cond)

    def _loss(self, value, target, kl_weight: Temperature, largest: Float[Array, ""] | None) -> Float[Array, ""]:
        if self.loss is soft_error:
            return soft_error(value, target, kl_weight, largest)
        return self.loss(value, target, kl_weight)

    def __call__(self, params: Params, objective: Objective, reference: Params, t, x, cond: Cond = None) -> Float[Array, " m"]:
        """`V(t, x)` as a differentiable function of `x` `[m, *x]`, under conditions `[m, ...]`.

        With a black-box reward, this holds only for values that do not use the reward, and only before `t1`.
        """
        x_hat, r_hat = x, jnp.zeros(x.shape[0], x.dtype)
        if self.value.uses_reward:
            action = objective.sampler.control(reference, t, x, cond)
            x_hat = objective.x0_prediction(objective.sampler, reference, t, x, action, cond)
        if objective.reward.differentiable:
            r_hat = objective.reward(x_hat, cond)
        return self.value(params, t, x, x_hat, r_hat, cond)


class MartingaleCritic(Critic):
    r"""The martingale loss of Jia and Zhou (2022, "Policy evaluation and temporal-difference learning in continuous time"):

        E int_t0^t1 (target - V(t, X_t))^2 dt / (t1 - t0)  =  mean over transitions of (dt_j / mean dt) (target - V)^2

    Its minimiser is the conditional mean of the target at every time. `Critic` with `squared_error` has the same minimiser, and on a
    uniform grid the same loss. On other grids the martingale loss weighs intervals by their length.
    """

    loss: ValueLoss = eqx.field(static=True, default_factory=lambda: squared_error, init=False)

    def error(
        self, params: Params, objective: Objective, transitions: Transitions, largest: Float[Array, ""] | None = None
    ) -> Float[Array, ""]:
        dt = jnp.diff(objective.sampler.ts)
        weight = jnp.sqrt(dt / jnp.mean(dt))[transitions.j]
        value = self._value_of(params, objective, transitions)
        return self.loss(weight * value, weight * transitions.value_target, objective.kl_weight)
