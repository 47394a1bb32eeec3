r"""Gradients from the likelihood ratios of sampled steps. The reward is never differentiated: it may be a black box.

    grad J = sum_j E[ grad log pi(x_{j+1} | x_j) A_j ] - lambda sum_j E[ grad kl_j ],    log rho_j = z_j . xi_j - |z_j|^2 / 2,

`z_j = scale_j (a_theta - a_old)(t_j, x_j)`, summed over state dimensions.
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..advantages import Clip, advantages, both_sides, clipped_surrogate, value_increments
from ..critics import Critic
from ..exploration import shift
from ..groups import same_condition, softmax_within
from ..objective import Objective
from ..process import Params
from ..rollout import Fields, Rollout, Transitions
from ..sampler import log_ratio
from .base import AbstractEstimator, Metrics, Models, require_kl_weight

Normalise = Callable[..., Float[Array, "n b"]]
Weights = Callable[[Objective, Rollout, Float[Array, "K b"]], Float[Array, "n b"]]


class LikelihoodRatio(AbstractEstimator):
    r"""Maximises `sum_j E[min(rho_j A_j, clip(rho_j) A_j)] - lambda sum_j E[penalty_j]`; advantages `A_j` sum value increments.

    Args:
        horizon: decay time of the advantages, control time (`advantages.advantages`): 0 for single increments, `inf` for returns.
        clip: the ratio is clipped to `1 +- clip` (Schulman et al. 2017), or with a pair to `[1 - below, 1 + above]`; `inf` is no clipping.
        normalise: a function of the advantages `[n, b]` (`advantages.centre`, `standardise_per_time`, ...), or `None`. Dividing
            them changes the KL penalty relative to the reward. With conditions its second argument is `groups.same_condition`.
        max_advantage: largest magnitude of an advantage after normalisation.
        kl_to_go: subtract the KL penalty of an interval from its increment, as in J.
        proximal: weight of the KL of each step to the *old* policy, reward units per nat.
        max_step_kl: a transition whose KL to the old policy exceeds this many nats gives no gradient: a mask instead of a clip.
    """

    horizon: float = eqx.field(static=True, default=0.0)
    clip: Clip = eqx.field(static=True, default=float("inf"))
    normalise: Normalise | None = eqx.field(static=True, default=None)
    max_advantage: float = eqx.field(static=True, default=float("inf"))
    kl_to_go: bool = eqx.field(static=True, default=True)
    proximal: float = eqx.field(static=True, default=0.0)
    max_step_kl: float = eqx.field(static=True, default=float("inf"))
    whole_paths: bool = eqx.field(static=True, default=False, init=False)

    def __check_init__(self):
        remedies = {
            "clip": "use inf for no clipping",
            "horizon": "it is a time: use 0 for single increments, inf for Monte Carlo returns",
            "max_advantage": "use inf for no clamp",
            "proximal": "it is a KL coefficient: use 0 for none",
            "max_step_kl": "use inf for no mask",
        }
        for name, remedy in remedies.items():
            if not np.all(np.asarray(getattr(self, name)) >= 0):
                raise ValueError(f"{name}={getattr(self, name)} must not be negative: {remedy}.")

    def fields(self, objective: Objective) -> Fields:
        return Fields(transitions=frozenset({"noise", "a_old"} | ({"a_ref"} if objective.penalised else set())))

    def policy_target(self, objective: Objective, critic: Critic, models: Models, rollout: Rollout, values):
        """Advantages, after normalisation and clamp."""
        paid = objective.costs(rollout)
        if self.kl_to_go:
            paid = paid + objective.kl_weight * rollout.penalty
        found = advantages(value_increments(values, paid), jnp.diff(rollout.t), self.horizon)
        if self.normalise is not None:
            same = same_condition(rollout.cond, found.dtype)
            found = self.normalise(found) if same is None else self.normalise(found, same)
        return jnp.clip(found, -self.max_advantage, self.max_advantage)

    def loss(self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions):
        a = objective.control(params, transitions.j, transitions.x, transitions.cond)
        z = shift(objective.scales[transitions.j], a, transitions.a_old)
        log_rho = log_ratio(z, transitions.noise)
        step_kl = 0.5 * jnp.sum(z**2, axis=tuple(range(1, z.ndim)))
        inside = jax.lax.stop_gradient(step_kl) <= self.max_step_kl
        gain = (
            jnp.where(inside, clipped_surrogate(log_rho, transitions.policy_target, self.clip), 0.0) - self.proximal * step_kl
        )
        penalty = jnp.zeros(())
        if objective.penalised:
            penalty = objective.kl_weight * objective.step_penalty(objective.kl_scales[transitions.j], a, transitions.a_ref)
        below, above = both_sides(self.clip)
        moved = jnp.expm1(log_rho)
        metrics: Metrics = {
            "update_kl": objective.intervals * jnp.mean(transitions.weight * step_kl),
            "max_log_ratio": jnp.max(jnp.abs(log_rho)),
            "clip_fraction": jnp.mean((moved < -below) | (moved > above)),
        }
        return objective.intervals * jnp.mean(transitions.weight * (penalty - gain)), metrics


def exponential_return(objective: Objective, rollout: Rollout, values: Float[Array, "K b"]) -> Float[Array, "n b"]:
    """`exp((r - costs) / lambda) dP^ref/dP^old` over its mean, the same at every step: weights of the optimal law.

    They hold for paths of any policy. The mean is over paths of the same condition.
    """
    gained = rollout.reward - jnp.sum(objective.costs(rollout), axis=0)
    total = gained / objective.kl_weight - jnp.sum(rollout.log_ratio, axis=0)
    return jnp.broadcast_to(softmax_within(total, same_condition(rollout.cond, total.dtype)), values[:-1].shape)


def exponential_increment(objective: Objective, rollout: Rollout, values: Float[Array, "K b"]) -> Float[Array, "n b"]:
    """`exp((V(t_{j+1}, x_{j+1}) - V(t_j, x_j) - cost_j) / lambda)` over its mean, at every step over paths of the same condition."""
    gained = value_increments(values, objective.costs(rollout))
    return softmax_within(gained / objective.kl_weight, same_condition(rollout.cond, gained.dtype))


class WeightedLikelihood(AbstractEstimator):
    """Minimises `-sum_j E[w_j log pi_theta(x_{j+1} | x_j)]`: maximum likelihood on reweighted paths.

    Args:
        weights: `w`, a function `(objective, rollout, values) -> [n, b]`: `exponential_return` or `exponential_increment`.
    """

    weights: Weights = eqx.field(static=True, default=exponential_return)
    whole_paths: bool = eqx.field(static=True, default=False, init=False)

    def check(self, objective: Objective, critic: Critic) -> None:
        require_kl_weight(objective, "the exponential weight exp(r / kl_weight)")

    def fields(self, objective: Objective) -> Fields:
        return Fields(transitions=frozenset({"noise", "a_old"}))

    def policy_target(self, objective: Objective, critic: Critic, models: Models, rollout: Rollout, values):
        return self.weights(objective, rollout, values)

    def loss(self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions):
        a = objective.control(params, transitions.j, transitions.x, transitions.cond)
        log_rho = log_ratio(shift(objective.scales[transitions.j], a, transitions.a_old), transitions.noise)
        metrics: Metrics = {
            "max_log_ratio": jnp.max(jnp.abs(log_rho)),
            "effective_share": jnp.sum(transitions.policy_target) ** 2
            / (jnp.sum(transitions.policy_target**2) * transitions.policy_target.size),
        }
        return -objective.kl_weight * objective.intervals * jnp.mean(
            transitions.weight * transitions.policy_target * log_rho
        ), metrics
