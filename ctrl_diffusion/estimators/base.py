"""What an estimator of the policy gradient is: which transitions it trains on, what it computes ahead, and its loss."""

import abc
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from ..critics import Critic
from ..objective import Objective
from ..process import Params
from ..rollout import EVERY_FIELD, Fields, Rollout, Transitions

if TYPE_CHECKING:  # to a type checker, a field without a default would have to come first
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar

Metrics = dict[str, Float[Array, ""]]


class Calls(NamedTuple):
    """Calls on one sample: network forward, network with a derivative, reward with or without derivative."""

    network: int = 0
    gradient: int = 0
    reward: int = 0


class Models(NamedTuple):
    """Parameters that a policy's loss does not differentiate."""

    reference: Params
    value: Params


class AbstractEstimator(eqx.Module):
    """Estimates the gradient of `-J` by the gradient of a loss on transitions: (time, sample) pairs `[m]`, or whole paths `[m, n]`."""

    whole_paths: AbstractVar[bool]

    @property
    def is_mean(self) -> bool:
        """Whether the loss is a mean over transitions; else it is a `statistic` of one `residual` per transition."""
        return True

    def fields(self, objective: Objective) -> Fields:
        """The state-sized fields that `policy_target` reads of whole paths, and that `loss` and `value_error` read of transitions.

        All, unless said otherwise.
        """
        return EVERY_FIELD

    @property
    def policy_target_is_of_paths(self) -> bool:
        """Whether `policy_target` evaluates networks and treats paths independently, so that it is worth computing for a few at a time."""
        return False

    def starts(self, objective: Objective) -> np.ndarray:
        """The control intervals that transitions are made of (all, unless said otherwise)."""
        return np.arange(objective.intervals)

    def check(self, objective: Objective, critic: Critic) -> None:
        """Raise, by name and with a remedy, if the estimator cannot serve this objective and critic."""

    def policy_target(
        self, objective: Objective, critic: Critic, models: Models, rollout: Rollout, values: Float[Array, "K b"]
    ) -> Float[Array, "s b ..."] | None:
        """What is computed once per iteration from whole paths, for the intervals `starts`; `None` where nothing is."""
        return None

    def policy_target_calls(self, critic: Critic) -> Calls:
        """What `policy_target` calls, per recorded state."""
        return Calls()

    def loss_calls(self, objective: Objective, critic: Critic) -> Calls:
        """What one evaluation of `loss` with its gradient calls, per transition."""
        return Calls(gradient=objective.intervals if self.whole_paths else 1)

    def value_error(
        self,
        objective: Objective,
        critic: Critic,
        value_params: Params,
        params: Params,
        reference: Params,
        transitions: Transitions,
        largest: Float[Array, ""] | None = None,
    ) -> Float[Array, ""]:
        """Loss of the value on the same transitions: the critic's, unless the estimator has its own (`largest`: see `Critic`)."""
        return critic.error(value_params, objective, per_path(transitions)[0] if self.whole_paths else transitions, largest)

    def residual(
        self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions
    ) -> Float[Array, " m"]:
        """One number per transition that a loss which is not a mean is a `statistic` of."""
        raise TypeError(f"the loss of {type(self).__name__} is a mean over transitions: it has no residuals.")

    def statistic(
        self, objective: Objective, residual: Float[Array, " m"], transitions: Transitions
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss as a function of all residuals of a minibatch."""
        raise TypeError(f"the loss of {type(self).__name__} is a mean over transitions: it has no statistic.")

    @abc.abstractmethod
    def loss(
        self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions
    ) -> tuple[Float[Array, ""], Metrics]:
        """An estimate of `-J` (in reward units, up to a constant) whose gradient in `params` is the policy gradient."""


def require_differentiable(objective: Objective, name: str) -> None:
    """Raise if an estimator that differentiates the reward is given a black box."""
    if not objective.reward.differentiable:
        raise ValueError(
            f"reward={objective.reward.name!r} is a black box, and {name} differentiates it. Wrap a JAX function in "
            "ctrl_diffusion.differentiable, or use an algorithm that needs values only: score_as_action, ddpo, dpok, flow_grpo, "
            "rwr, vidd, log_variance, path_consistency, or vard with a plain value."
        )


def require_kl_weight(objective: Objective, name: str) -> None:
    """Raise if an estimator that divides by the temperature has none."""
    if not objective.penalised:
        raise ValueError(f"kl_weight={objective.kl_weight:g}: {name} divides by it and needs a positive temperature.")


def per_path(transitions: Transitions) -> tuple[Transitions, Any]:
    """Transitions of whole paths `[m, n]` as pairs `[m n]`, and the function that brings `[m n, ...]` back to `[m, n, ...]`."""
    m, n = transitions.j.shape

    def fold(v: Float[Array, "..."]) -> Float[Array, "..."]:
        return v.reshape((m, n) + v.shape[1:])

    def flat(v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return v.reshape((m * n,) + v.shape[2:])

    return jax.tree.map(flat, transitions), fold
