r"""Gradients from an identity of the optimal path law. It holds along every path, of any policy:

    V*(t_0, x_0) + lambda sum_j log (dP*/dP^ref)_j  =  r(X_T) - sum_j cost_j.

The loss is the squared mismatch of a policy. States may come from any policy; no gradient passes through them.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..advantages import to_go
from ..critics import Critic, returns
from ..groups import same_condition, variance_within
from ..objective import Objective
from ..process import Params
from ..rollout import Fields, Rollout, Transitions
from .base import AbstractEstimator, Metrics, Models, per_path, require_kl_weight

LOG_RATIO = Fields(transitions=frozenset({"noise", "a_old", "a_ref"}))


def _tail(objective: Objective, params: Params, transitions: Transitions):
    """`lambda log(dP^a/dP^ref)` of every interval of whole paths, `[m, n]`."""
    pairs, fold = per_path(transitions)
    a = objective.control(params, pairs.j, pairs.x, pairs.cond)
    return objective.kl_weight * fold(objective.step_log_ratio(pairs, a))


class LogVariance(AbstractEstimator):
    r"""`Var(r - costs - lambda log dP^a/dP^ref) / (2 lambda)` over paths; it is zero exactly at the optimum.

    Nuesken and Richter 2021 (VarGrad, log-variance divergence). The variance is over a batch of paths, so `V*(t_0, x_0)` must not
    depend on `x_0`: the start must be fixed or the reference memoryless. Otherwise use `PathConsistency`. With conditions the variance
    is among paths of a minibatch with the same condition: draw several paths for each.
    """

    whole_paths: bool = eqx.field(static=True, default=True, init=False)

    @property
    def is_mean(self) -> bool:
        return False

    def fields(self, objective: Objective) -> Fields:
        return LOG_RATIO

    def check(self, objective: Objective, critic: Critic) -> None:
        require_kl_weight(objective, "the log-variance")

    def policy_target(self, objective: Objective, critic: Critic, models: Models, rollout: Rollout, values):
        """Returns of the paths, without KL: `r - costs`."""
        return returns(objective, rollout)

    def loss(self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions):
        return self.statistic(objective, self.residual(objective, critic, params, models, transitions), transitions)

    def residual(self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions):
        """`r - costs - lambda log dP^a/dP^ref` of every path."""
        return transitions.policy_target[:, 0] - jnp.sum(_tail(objective, params, transitions), axis=1)

    def statistic(self, objective: Objective, residual, transitions: Transitions):
        of_paths = jax.tree.map(lambda v: v[:, 0], transitions.cond)
        loss = 0.5 * variance_within(residual, same_condition(of_paths, residual.dtype)) / objective.kl_weight
        return loss, {"residual": jnp.sqrt(2 * objective.kl_weight * loss)}


class PathConsistency(AbstractEstimator):
    r"""Mean over intervals of `(V(t_e, x_e) - costs - lambda log (dP^a/dP^ref)_{j..e} - V(t_j, x_j))^2 / (2 lambda)`, `e = j + span`.

    This trains the policy by soft path consistency (Nachum et al. 2017; "sub-trajectory balance" of GFlowNets). The value is trained by
    the critic, on `log_ratio_to_go`.

    Args:
        span: intervals of a window; `None` goes to the end of the path, where `V = r`.
    """

    span: int | None = eqx.field(static=True, default=None)
    whole_paths: bool = eqx.field(static=True, default=True, init=False)

    def __check_init__(self):
        if self.span is not None and self.span < 1:
            raise ValueError(f"span={self.span} must be at least 1 interval, or None for the rest of the path.")

    def fields(self, objective: Objective) -> Fields:
        return LOG_RATIO

    def check(self, objective: Objective, critic: Critic) -> None:
        require_kl_weight(objective, "path consistency")

    def policy_target(self, objective: Objective, critic: Critic, models: Models, rollout: Rollout, values):
        """Returns of the windows, without KL: `V_e - V_j - costs`."""
        n = objective.intervals
        end = np.minimum(np.arange(n) + (n if self.span is None else self.span), n)
        costs = to_go(jnp.concatenate([objective.costs(rollout), jnp.zeros_like(values[:1])]))
        return values[end] - values[:-1] - (costs[:-1] - costs[end])

    def loss(self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions):
        paid = jnp.cumsum(_tail(objective, params, transitions), axis=1)
        paid = jnp.concatenate([jnp.zeros_like(paid[:, :1]), paid], axis=1)
        n = objective.intervals
        end = np.minimum(np.arange(n) + (n if self.span is None else self.span), n)
        residual = transitions.policy_target - (paid[:, end] - paid[:, :-1])
        loss = 0.5 * jnp.mean(residual**2) / objective.kl_weight
        metrics: Metrics = {"residual": jnp.sqrt(jnp.mean(residual**2))}
        return loss, metrics
