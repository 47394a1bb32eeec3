"""The settings of an algorithm (`Training`), its state (`State`), its results (`Info`), and the algorithm itself (`Algorithm`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from ..estimators import Calls
from ..parallel import ONE_DEVICE, Layout
from ..process import Cond, Params
from ..rollout import Transitions
from ..summaries import summary
from ..trust import AbstractTrustRegion


class Learned(NamedTuple):
    """Everything that updates change: parameters of policy and value, states of both optimisers, the policy's running average."""

    params: Params
    value_params: Params
    optimizer: Any
    value_optimizer: Any
    average: Params = ()


class State(NamedTuple):
    """The state of an algorithm: everything that a resume needs.

    Attributes:
        learned: everything that updates change.
        reference: parameters of the reference policy.
        buffer: paths of earlier iterations, if there is a replay buffer.
        kl_weight: the temperature lambda, reward units per nat of path KL.
    """

    learned: Learned
    reference: Params
    buffer: Any
    kl_weight: Float[Array, ""]

    def __repr__(self) -> str:
        return summary(self)

    @property
    def params(self) -> Params:
        """Parameters of the policy."""
        return self.learned.params

    @property
    def value_params(self) -> Params:
        """Parameters of the value."""
        return self.learned.value_params

    @property
    def average(self) -> Params:
        """The running average of the policy's parameters; `()` if none is kept."""
        return self.learned.average


class Info(NamedTuple):
    """Results of one iteration: scalar metrics, and the final states with their rewards and conditions."""

    metrics: dict[str, Float[Array, ""]]
    samples: Float[Array, "b *x"]
    rewards: Float[Array, " b"]
    cond: Cond = None


class TimeSampling(NamedTuple):
    """Trains on a few random times of every path. The work per path is less, and the expected policy gradient is the same.

    Attributes:
        number: transitions per path, drawn with replacement, anew in every iteration.
        density: relative frequency of the control intervals, a positive function `(left ends of intervals [n]) -> [n]`. The policy's loss
            weighs a transition by one over its frequency, so the density changes the variance of the policy gradient and not its mean.
            A critic is regressed on the transitions as they are drawn, without these weights.
    """

    number: int
    density: Callable[[Float[Array, " n"]], Float[Array, " n"]] = jnp.ones_like

    def __call__(self, key: Key[Array, ""], t: Float[Array, " s"], columns: Transitions) -> Transitions:
        """Draw `[number, b]` of the transitions `[s, b, ...]` at times `t`, and set their weights."""
        density = self.density(t) / jnp.sum(self.density(t))
        batch = columns.j.shape[1]
        chosen = jax.random.choice(key, len(t), (self.number, batch), p=density)
        transitions = jax.tree.map(lambda v: v[chosen, jnp.arange(batch)], columns)
        return transitions._replace(weight=transitions.weight / (len(t) * density[chosen]))


class AdaptiveKL(NamedTuple):
    r"""Adapts the KL coefficient towards a target path KL: `lambda <- lambda (1 + rate clip(KL / target - 1, -bound, bound))`.

    The update is made after every iteration; `KL` is the mean path KL of the iteration's paths to the reference. Ziegler et al. 2019,
    section 2.2, with `rate` 0.1 and `bound` 0.2. The objective changes with the temperature: compare runs at the temperature that they
    end with, `State.kl_weight`.

    Attributes:
        target: path KL to aim at, nats.
        rate: relative change of the temperature per iteration and unit of relative error.
        bound: largest relative error that counts.

    ??? cite "Reference"
        ```bibtex
        @article{ziegler2019finetuning, title={Fine-Tuning Language Models from Human Preferences}, author={Ziegler, Daniel M. and
          Stiennon, Nisan and Wu, Jeffrey and Brown, Tom B. and Radford, Alec and Amodei, Dario and Christiano, Paul and Irving,
          Geoffrey}, journal={arXiv:1909.08593}, year={2019}}
        ```
    """

    target: float
    rate: float = 0.1
    bound: float = 0.2

    def __call__(self, kl_weight: Float[Array, ""], path_kl: Float[Array, ""]) -> Float[Array, ""]:
        """The temperature after an iteration whose paths had this path KL."""
        error = jnp.clip(path_kl / self.target - 1, -self.bound, self.bound)
        return kl_weight * (1 + self.rate * error)

    def check(self) -> None:
        """Raise `ValueError` if a number is out of its range."""
        if not (0 < self.target < float("inf") and self.rate > 0 and self.bound > 0 and self.rate * self.bound < 1):
            raise ValueError(
                f"kl_target={self}: target is a path KL in nats and must be positive and finite; rate and bound must be positive, and "
                "their product below 1, which keeps the temperature positive."
            )


class Training(NamedTuple):
    """How many paths an iteration samples, and how policy and value are trained on them. Numbers count over all devices together.

    Attributes:
        policy: the policy's optax optimiser, or a trust region such as `NaturalGradient(radius)`.
        batch: paths per iteration.
        epochs: passes over the transitions of an iteration.
        minibatches: updates per pass. It must divide the number of transitions, `batch * intervals` (or `batch * times.number`); for
            estimators of whole paths it must divide `batch`.
        value: optax optimiser of a learned value, which trains on the same transitions; `None`: the value does not change.
        times: the times of a path that are trained on (default: all that the estimator uses).
        rollouts: number of parts in which the paths of an iteration are sampled. While the host computes a black-box reward of one
            part, the devices sample the next. The paths are the same. Networks on whole paths (the lean adjoint) also run by parts.
        layout: the devices that share the work (default: one). It changes results by rounding only.
        accumulation: number of microbatches that an update is computed in, one after the other: less memory, the same gradient.
            A natural gradient divides all transitions of the iteration in this way.
        average: decay per update of a running average of the policy's parameters, `State.average`; `None`: no average is kept.
        stratified: instead of shuffling all transitions, deal every group of `minibatches` consecutive ones (times of a path, then
            paths) out, one to each minibatch. Transitions then stay on their devices; a shuffle exchanges data that grows with the
            batch. The expected gradient is the same.
        scan_minibatches: compile a pass as one program that loops over the minibatches, instead of two programs per minibatch; results
            are the same up to rounding. Temporary memory is then allocated once per pass: on CPUs a small U-Net's update takes 0.79
            of the time. There a network with other convolutions than `ctrl_diffusion.convolution` becomes ten times slower.
        kl_target: adapts the temperature to a target path KL, starting from `Objective.kl_weight`; `None`: the temperature is fixed.
    """

    policy: optax.GradientTransformation | AbstractTrustRegion
    batch: int
    epochs: int = 1
    minibatches: int = 1
    value: optax.GradientTransformation | None = None
    times: TimeSampling | None = None
    rollouts: int = 1
    layout: Layout = ONE_DEVICE
    accumulation: int = 1
    average: float | None = None
    stratified: bool = False
    scan_minibatches: bool = False
    kl_target: AdaptiveKL | None = None


class Algorithm(NamedTuple):
    """A pair of functions: `state = init(params, value_params)` and `state, info = step(key, state)`.

    Without a learned value, call `init(params)`. `step` donates the buffers of its state: do not use the old state again.
    """

    init: Callable[..., State]
    step: Callable[[Key[Array, ""], State], tuple[State, Info]]
    fixed: Any
    """The arrays inside control and reward, which nothing changes. They are arguments of the programs that need them."""
    recipe: Any
    """The parts that it is composed of, an `algorithms.recipe.Recipe`."""
    programs: dict[str, Any]
    """The programs of an iteration by name, each a `programs.Program`."""

    def __repr__(self) -> str:
        return summary(self)

    @property
    def calls(self) -> Calls:
        """Evaluations of policy, reference and reward in one iteration, in samples; the value network is not counted."""
        return self.recipe.calls()
