"""The interface of estimators of the policy gradient: transitions to train on, policy targets, and a loss."""

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
    """Numbers of calls, per sample: network without derivative, network with a derivative, reward with or without derivative."""

    network: int = 0
    gradient: int = 0
    reward: int = 0


class Models(NamedTuple):
    """Parameters of reference and value, which the policy's loss does not differentiate."""

    reference: Params
    value: Params


class AbstractEstimator(eqx.Module):
    """Estimates the gradient of `-J` by the gradient of a loss on transitions.

    Transitions are (time, sample) pairs `[m]`, or whole paths `[m, n]` if `whole_paths`.
    """

    whole_paths: AbstractVar[bool]

    @property
    def needs_likelihood(self) -> bool:
        """Whether the loss uses the likelihood of the sampled paths, or the noise that they were sampled with."""
        return True

    @property
    def is_mean(self) -> bool:
        """Whether the loss is a mean over transitions; else it is a `statistic` of one `residual` per transition."""
        return True

    def fields(self, objective: Objective) -> Fields:
        """The state-sized fields that `policy_target` reads from whole paths, and that `loss` and `value_error` read from transitions.

        The default is all of them.
        """
        return EVERY_FIELD

    @property
    def policy_target_is_of_paths(self) -> bool:
        """Whether `policy_target` evaluates networks and treats paths independently. It is then computed for a few paths at a time."""
        return False

    def starts(self, objective: Objective) -> np.ndarray:
        """The control intervals that transitions are taken from; the default is all of them."""
        return np.arange(objective.intervals)

    def check(self, objective: Objective, critic: Critic) -> None:
        """Raise `ValueError` if the estimator cannot serve this objective and critic; the message says why and what to do."""

    def policy_target(
        self, objective: Objective, critic: Critic, models: Models, rollout: Rollout, values: Float[Array, "K b"]
    ) -> Float[Array, "s b ..."] | None:
        """Quantities that are computed once per iteration from whole paths, for the intervals `starts`; `None` if there are none."""
        return None

    def policy_target_calls(self, critic: Critic) -> Calls:
        """Calls of `policy_target`, per recorded state."""
        return Calls()

    def loss_calls(self, objective: Objective, critic: Critic) -> Calls:
        """Calls of one evaluation of `loss` with its gradient, per transition."""
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
        """Loss of the value on the same transitions; the default is the critic's (`largest`: see `Critic.largest_exponent`)."""
        return critic.error(value_params, objective, per_path(transitions)[0] if self.whole_paths else transitions, largest)

    def residual(
        self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions
    ) -> Float[Array, " m"]:
        """One number per transition, the argument of `statistic`. Only a loss that is no mean (`is_mean`) has residuals."""
        raise TypeError(f"the loss of {type(self).__name__} is a mean over transitions: it has no residuals.")

    def statistic(
        self, objective: Objective, residual: Float[Array, " m"], transitions: Transitions
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss as a function of all residuals of a minibatch, for a loss that is no mean."""
        raise TypeError(f"the loss of {type(self).__name__} is a mean over transitions: it has no statistic.")

    @abc.abstractmethod
    def loss(
        self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions
    ) -> tuple[Float[Array, ""], Metrics]:
        """An estimate of `-J` (in reward units, up to a constant) whose gradient in `params` is the policy gradient."""


def require_differentiable(objective: Objective, name: str) -> None:
    """Raise `ValueError` if the reward is a black box; `name` is the part that differentiates it."""
    if not objective.reward.differentiable:
        raise ValueError(
            f"reward={objective.reward.name!r} is a black box, and {name} differentiates it. Wrap a JAX function in "
            "ctrl_diffusion.differentiable, or use an algorithm that needs values only: score_as_action, ddpo, dpok, flow_grpo, "
            "rwr, vidd, log_variance, path_consistency, or vard with a plain value."
        )


def require_kl_weight(objective: Objective, name: str) -> None:
    """Raise `ValueError` if the temperature is 0; `name` is the part that divides by it."""
    if not objective.penalised:
        raise ValueError(f"kl_weight={objective.kl_weight:g}: {name} divides by it and needs a positive temperature.")


def per_path(transitions: Transitions) -> tuple[Transitions, Any]:
    """Transitions of whole paths `[m, n]` as pairs `[m n]`, and the function that reshapes `[m n, ...]` to `[m, n, ...]`."""
    m, n = transitions.j.shape

    def fold(v: Float[Array, "..."]) -> Float[Array, "..."]:
        return v.reshape((m, n) + v.shape[1:])

    def flat(v: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return v.reshape((m * n,) + v.shape[2:])

    return jax.tree.map(flat, transitions), fold
