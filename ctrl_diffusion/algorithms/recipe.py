"""The parts of an algorithm, their checks, and the numbers that follow from them."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np

from ..critics import Critic, soft_error
from ..estimators import AbstractEstimator, Calls
from ..estimators.base import require_kl_weight
from ..exploration import AbstractExploration
from ..objective import Objective
from ..parallel import Layout
from ..process import Cond
from ..replay import AbstractBehaviour
from ..sampler import Sampler
from ..trust import AbstractTrustRegion, FirstOrder
from .training import Training


class Sampling(NamedTuple):
    """Everything that the program `sample` depends on.

    Attributes:
        sampler: the sampler, without the arrays of its control.
        exploration: the exploration noise.
        size: number of paths.
        layout: the devices.
    """

    sampler: Sampler
    exploration: AbstractExploration
    size: int
    layout: Layout

    def bound(self, fixed: Any) -> Sampler:
        """The sampler with the arrays of `Recipe.fixed`."""
        control = self.layout.gathering(eqx.combine(fixed[0], self.sampler.control))
        return eqx.tree_at(lambda sampler: sampler.control, self.sampler, control)


class Division(NamedTuple):
    """Everything that the programs `shuffle` and `select` depend on: how transitions are divided into minibatches.

    Attributes:
        batch: number of paths of an iteration.
        of_a_path: number of transitions per path.
        transitions: number of transitions of all paths.
        minibatches: number of minibatches.
        stratified: see `Training.stratified`.
        whole_paths: whether each transition is a whole path.
    """

    batch: int
    of_a_path: int
    transitions: int
    minibatches: int
    stratified: bool
    whole_paths: bool


class Recipe(NamedTuple):
    """The parts of an algorithm. `compose` says what each part is.

    It is the first argument of the functions of an iteration. Those that depend on a part of it only get that part instead (`Sampling`,
    `Division`), so that algorithms share their compiled programs.
    """

    objective: Objective
    estimator: AbstractEstimator
    critic: Critic
    training: Training
    behaviour: AbstractBehaviour
    denoise_with_policy: bool = False

    @property
    def layout(self) -> Layout:
        """The devices that share the work."""
        return self.training.layout

    @property
    def trust_region(self) -> AbstractTrustRegion:
        """How the policy is updated: `Training.policy`, or the first-order optimiser in it."""
        policy = self.training.policy
        return policy if isinstance(policy, AbstractTrustRegion) else FirstOrder(policy)

    @property
    def starts(self) -> np.ndarray:
        """The control intervals that transitions are taken from."""
        return self.estimator.starts(self.objective)

    @property
    def declared(self) -> frozenset[str]:
        """The state-sized fields of a rollout that something reads."""
        paths, transitions = self.estimator.fields(self.objective)
        return paths | transitions

    @property
    def learns_value(self) -> bool:
        """Whether updates change the value."""
        return self.critic.learns and self.training.value is not None

    @property
    def transitions_of_a_path(self) -> int:
        """Transitions per path, for estimators that do not train on whole paths."""
        return len(self.starts) if self.training.times is None else self.training.times.number

    @property
    def transitions(self) -> int:
        """Transitions per iteration; whole paths count as one each."""
        return self.training.batch * (1 if self.estimator.whole_paths else self.transitions_of_a_path)

    @property
    def transitions_of_a_minibatch(self) -> int:
        """Transitions per update."""
        return self.transitions // self.training.minibatches

    @property
    def paths_of_a_part(self) -> int:
        """Paths that are sampled at a time, `batch / rollouts`."""
        return self.training.batch // self.training.rollouts

    @property
    def sampling(self) -> Sampling:
        """What sampling depends on."""
        (control, _), objective = _arrays_and_rest(self.objective)[1], self.objective
        sampler = eqx.tree_at(lambda sampler: sampler.control, objective.sampler, control)
        return Sampling(sampler, objective.exploration, self.paths_of_a_part, self.layout)

    @property
    def division(self) -> Division:
        """What the division into minibatches depends on."""
        training, whole = self.training, self.estimator.whole_paths
        return Division(
            training.batch, self.transitions_of_a_path, self.transitions, training.minibatches, training.stratified, whole
        )

    def conditions(self, key: Any) -> Cond:
        """Conditions of an iteration's paths, `[batch, ...]`."""
        return None if self.objective.conditions is None else self.objective.conditions(key, self.training.batch)

    def fixed(self) -> Any:
        """The arrays inside control and reward, placed on the devices. They are arguments of the programs, and nothing changes them."""
        fixed = _arrays_and_rest(self.objective)[0]
        if any(isinstance(v, jax.ShapeDtypeStruct) for v in jax.tree.leaves(fixed)):
            return fixed
        return self.layout.put(fixed, self.layout.parameters)

    def bound(self, fixed: Any, kl_weight: Any) -> Objective:
        """The objective with the arrays `fixed` and the temperature `kl_weight`."""
        control, reward = eqx.combine(fixed, _arrays_and_rest(self.objective)[1])
        where = (self.layout.gathering(control), reward, kl_weight)
        return eqx.tree_at(lambda o: (o.sampler.control, o.reward, o.kl_weight), self.objective, where)

    def calls(self) -> Calls:
        """Evaluations in one iteration, in samples: paths with old and reference actions, the policy target, and the losses."""
        states, uses_reward = self.objective.intervals * self.training.batch, self.critic.value.uses_reward
        estimator = self.estimator
        policy_target, loss = estimator.policy_target_calls(self.critic), estimator.loss_calls(self.objective, self.critic)
        evaluated = self.trust_region.loss_evaluations(self.transitions, self.training.epochs)
        sampled = self.objective.exploration.substeps_per_interval + 2
        return Calls(
            sampled * states + policy_target.network * states + loss.network * evaluated,
            policy_target.gradient * states + loss.gradient * evaluated,
            self.training.batch + (uses_reward + policy_target.reward) * states + loss.reward * evaluated,
        )

    def check(self) -> None:
        """Raise `ValueError` if parts do not go together; the message names them and the remedy."""
        training, estimator = self.training, self.estimator
        counts = {"batch": training.batch, "epochs": training.epochs, "rollouts": training.rollouts}
        for name, number in (counts | ({} if training.times is None else {"times.number": training.times.number})).items():
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1.")
        if estimator.needs_likelihood and not self.objective.exploration.has_likelihood:
            raise ValueError(
                f"the sampler is an ODE, whose paths have no likelihood, and {type(estimator).__name__} needs one: use eta > 0, "
                "Objective(exploration=ActionNoise(...)), or an algorithm that differentiates through the sampler, such as draft."
            )
        estimator.check(self.objective, self.critic)
        if self.critic.loss is soft_error and self.learns_value:
            require_kl_weight(self.objective, "the soft error of a value")
        if training.kl_target is not None:
            training.kl_target.check()
            if not self.objective.penalised:
                raise ValueError(
                    f"kl_weight={self.objective.kl_weight:g}: kl_target={training.kl_target} scales it from iteration to iteration and "
                    "cannot start at 0: give Objective a positive kl_weight."
                )
        if training.times is not None and estimator.whole_paths:
            raise ValueError(f"times={training.times}: {type(estimator).__name__} is trained on whole paths; use times=None.")
        self._check_divisions()

    def _check_divisions(self) -> None:
        """Raise `ValueError` if minibatches, rollouts, microbatches or devices do not divide their numbers evenly."""
        training, layout, batch, parts = self.training, self.layout, self.training.batch, self.training.accumulation
        if training.minibatches < 1 or self.transitions % training.minibatches:
            drawn = "intervals" if training.times is None else "times.number"
            of_times = f"batch * {drawn} = {batch} * {self.transitions_of_a_path} = {self.transitions}"
            what = f"batch = {batch}" if self.estimator.whole_paths else of_times
            raise ValueError(f"minibatches={training.minibatches} must divide {what}.")
        if batch % training.rollouts:
            raise ValueError(f"rollouts={training.rollouts} must divide batch={batch}.")
        name = "batch" if training.rollouts == 1 else f"batch / {training.rollouts} rollouts"
        layout.check_batch(name, self.paths_of_a_part)
        transitions = self.transitions_of_a_minibatch
        layout.check_batch(
            f"transitions of a minibatch over accumulation, {transitions} / {parts}", transitions // max(parts, 1)
        )
        if parts < 1 or transitions % parts:
            raise ValueError(f"accumulation={parts} must divide the transitions of a minibatch, {transitions}.")
        if parts > 1 and self.trust_region.once and not self.estimator.is_mean:
            raise ValueError(
                f"accumulation={parts}: a natural gradient needs a loss that is a mean over transitions, but the loss of "
                f"{type(self.estimator).__name__} is a statistic of a whole minibatch; use accumulation=1."
            )


def _arrays_and_rest(objective: Objective) -> tuple[Any, Any]:
    return eqx.partition((objective.sampler.control, objective.reward), _is_array)


def _is_array(v: Any) -> bool:
    return isinstance(v, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
