r"""The control objective and the quantities that every algorithm computes along a path.

    J(a) = E^a[ r(X_T) - int f dt ] - lambda KL(P^a || P^ref)
         = E^a[ r(X_T) - sum_j cost_j - lambda sum_j kl_j ],      kl_j = |scale_j (a - a_ref)(t_j, x_j)|^2 / 2

    V(t_j, x) = E^a[ r(X_T) - sum_{l >= j} (cost_l + lambda kl_l) | x_j = x ]

The *increment* of a control interval is `V_{j+1} - V_j - cost_j - lambda kl_j`. It is the advantage rate times `dt` plus a martingale
increment. The martingale increment correlates with the noise, and likelihood ratios estimate the gradient from that correlation.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from .exploration import AbstractExploration, Brownian, NoExploration, shift
from .process import Cond, Params, State
from .rewards import Reward, as_reward
from .rollout import Rollout, Transitions
from .sampler import Sampler, log_ratio
from .x0_prediction import X0Prediction, posterior_mean

Penalty = Callable[[Float[Array, "..."]], Float[Array, "..."]]
Paths = Float[Array, "n b *x"]
Conditions = Callable[[Key[Array, ""], int], Cond]


def path_kl(kl: Float[Array, "..."]) -> Float[Array, "..."]:
    """The KL of a step itself: the penalty of the control problem."""
    return kl


def chi_squared(kl: Float[Array, "..."]) -> Float[Array, "..."]:
    """`chi^2 = exp(2 KL) - 1` between Gaussians of equal variance."""
    return jnp.expm1(2 * kl)


def squared_hellinger(kl: Float[Array, "..."]) -> Float[Array, "..."]:
    """`H^2 = 1 - exp(-KL / 4)` between Gaussians of equal variance: bounded by 1 per step."""
    return -jnp.expm1(-0.25 * kl)


class Objective(eqx.Module):
    """`J(a) = E^a[r(X_T) - int f dt] - kl_weight KL(P^a || P^ref)` on the chain that a sampler makes.

    Args:
        sampler: process (with its running cost), control, solver and control grid.
        reward: a `Reward`, or any Python function of a numpy batch.
        kl_weight: the temperature lambda, reward units per nat of path KL; at least 0. Algorithms keep it in their state, as an array.
        exploration: the noise of sampled paths, with its likelihood and its KL. The default is `Brownian()`; for an ODE without a KL
            penalty `NoExploration()`, which serves gradients through the sampler alone.
        penalty: a function from the KL of a step to its penalty (default: the KL itself; others are f-divergences *per step*).
        x0_prediction: the estimate of the final state that values are built on (default `posterior_mean`).
        conditions: a function `(key, n) -> arrays [n, ...]` that draws the conditions of an iteration's paths, such as prompts. Control,
            value and conditional rewards are given the condition of each path. `None`: paths have no conditions.
    """

    sampler: Sampler
    reward: Reward
    kl_weight: float  # inside programs an array
    penalised: bool = eqx.field(static=True)
    exploration: AbstractExploration
    penalty: Penalty = eqx.field(static=True)
    x0_prediction: X0Prediction = eqx.field(static=True)
    conditions: Conditions | None = eqx.field(static=True)
    scales: Float[Array, " n"]
    kl_scales: Float[Array, " n"]

    def __init__(
        self,
        sampler: Sampler,
        reward: Reward | Callable,
        kl_weight: float,
        *,
        exploration: AbstractExploration | None = None,
        penalty: Penalty = path_kl,
        x0_prediction: X0Prediction = posterior_mean,
        conditions: Conditions | None = None,
    ):
        if not 0 <= kl_weight < float("inf"):
            raise ValueError(
                f"kl_weight={kl_weight} must not be negative and must be finite: it is the temperature lambda, in reward units per nat of "
                "path KL. Use 0 for no KL penalty, and a larger number to stay closer to the reference."
            )
        self.sampler, self.reward, self.kl_weight = sampler, as_reward(reward), float(kl_weight)
        self.penalised = self.kl_weight > 0
        if exploration is None:
            exploration = Brownian() if self.penalised or sampler.is_stochastic else NoExploration()
        self.exploration = exploration
        self.penalty, self.x0_prediction, self.conditions = penalty, x0_prediction, conditions
        self.scales, self.kl_scales = self.exploration.scales(sampler), self.exploration.kl_scales(sampler)

    @property
    def intervals(self) -> int:
        """Number of control intervals."""
        return len(self.sampler.times) - 1

    def control(self, params: Params, j: Int[Array, " m"], x: State, cond: Cond = None) -> State:
        """Actions at states `[m, *x]` of intervals `j`, under conditions `[m, ...]`."""
        return self.sampler.control(params, self.sampler.ts[j], x, cond)

    def step_penalty(self, scales: Float[Array, "..."], a: State, a_ref: State) -> Float[Array, " m"]:
        """Penalty of intervals, nats (for the KL): `penalty(|scale (a - a_ref)|^2 / 2)`, the KL summed over state dimensions."""
        z = shift(scales, a, a_ref)
        return self.penalty(0.5 * jnp.sum(z**2, axis=tuple(range(1, z.ndim))))

    def step_log_ratio(self, transitions: Transitions, a: State) -> Float[Array, " m"]:
        """`log dP^a / dP^ref` of recorded intervals of any policy; summed over state dimensions."""
        scale = self.scales[transitions.j]
        return log_ratio(shift(scale, a, transitions.a_old), transitions.noise) + _old_to_reference(
            scale, transitions.a_old, transitions.a_ref, transitions.noise
        )

    def step_log_ratios(self, a_old: Paths, a_ref: Paths, noise: Paths) -> Float[Array, "n b"]:
        """`log dP^old / dP^ref` of every interval `[n, b, *x]`, where `old` is the policy that sampled it; summed over state dimensions."""
        return jax.vmap(_old_to_reference)(self.scales, a_old, a_ref, noise)

    def costs(self, rollout: Rollout) -> Float[Array, "n b"]:
        """Running cost of every interval, `f(t_j, x_j) dt_j`."""
        rate = jax.vmap(self.sampler.process.running_cost)(rollout.t[:-1], rollout.x[:-1])
        return rate * jnp.diff(rollout.t)[:, None]

    def step_penalties(self, a_old: Paths, a_ref: Paths) -> Float[Array, "n b"]:
        """Penalty of every interval `[n, b, *x]` of the old policy, nats (for the KL)."""
        return jax.vmap(self.step_penalty)(self.kl_scales, a_old, a_ref)


def _old_to_reference(scale, a_old, a_ref, noise) -> Float[Array, " m"]:
    return -log_ratio(shift(scale, a_ref, a_old), noise)
