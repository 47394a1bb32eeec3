"""What an algorithm is made with and what it is: settings of training, its state, its programs."""

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
    """What updates change: parameters of policy and value, the states of their optimisers, and a running average of the policy's."""

    params: Params
    value_params: Params
    optimizer: Any
    value_optimizer: Any
    average: Params = ()


class State(NamedTuple):
    """Everything a resume needs.

    Attributes:
        learned: what updates change.
        reference: parameters of the reference.
        buffer: paths of earlier iterations, for a replay buffer.
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
        """The running average of the policy's parameters; `()` where none is kept."""
        return self.learned.average


class Info(NamedTuple):
    """What one iteration showed: scalar metrics, and the final states with their rewards and conditions."""

    metrics: dict[str, Float[Array, ""]]
    samples: Float[Array, "b *x"]
    rewards: Float[Array, " b"]
    cond: Cond = None


class TimeSampling(NamedTuple):
    """A few times of every path, drawn anew for each path and iteration: less work per path, the same expected gradient.

    Attributes:
        number: transitions per path, drawn with replacement.
        density: relative frequency of the control intervals, `(left ends of intervals [n]) -> [n]`, positive; a transition counts one over
            its frequency, so that the density changes the variance of the policy's gradient and not its mean. A critic's regression
            is on the transitions as they are drawn.
    """

    number: int
    density: Callable[[Float[Array, " n"]], Float[Array, " n"]] = jnp.ones_like

    def __call__(self, key: Key[Array, ""], t: Float[Array, " s"], columns: Transitions) -> Transitions:
        """`[number, b]` of the columns `[s, b, ...]` at times `t`, with their weights."""
        density = self.density(t) / jnp.sum(self.density(t))
        batch = columns.j.shape[1]
        chosen = jax.random.choice(key, len(t), (self.number, batch), p=density)
        transitions = jax.tree.map(lambda v: v[chosen, jnp.arange(batch)], columns)
        return transitions._replace(weight=transitions.weight / (len(t) * density[chosen]))


class AdaptiveKL(NamedTuple):
    r"""The temperature follows a target path KL: `lambda <- lambda (1 + rate clip(KL / target - 1, -bound, bound))`.

    After every iteration, `KL` being the mean path KL of its paths to the reference. Ziegler et al. 2019, section 2.2, where `rate` is
    0.1 and `bound` 0.2. The objective changes with the temperature: compare results at the temperature that a run ends with,
    `State.kl_weight`.

    Attributes:
        target: path KL, nats.
        rate: relative change per iteration and unit of relative error.
        bound: of the relative error.

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
        """`ValueError` for numbers that cannot work."""
        if not (0 < self.target < float("inf") and self.rate > 0 and self.bound > 0 and self.rate * self.bound < 1):
            raise ValueError(
                f"kl_target={self}: target is a path KL in nats and must be positive and finite; rate and bound must be positive, and "
                "their product below 1, so that the temperature stays positive."
            )


class Training(NamedTuple):
    """How much data an iteration has and how it is used; global numbers.

    Attributes:
        policy: how the policy moves: an optax optimiser, or a trust region such as `NaturalGradient(radius)`.
        batch: paths per iteration.
        epochs: passes over the transitions of an iteration.
        minibatches: updates per pass; must divide the number of transitions: `batch * intervals` (or times), `batch` for whole paths.
        value: optax optimiser of a learned value, on the same transitions; `None`: the value is not changed.
        rollouts: parts that an iteration's paths are sampled in: while a black-box reward judges one on the host, the devices are busy
            with the next. The same paths. What networks tell of whole paths (the lean adjoint) is computed for a part at a time too.
        times: which times of a path make transitions (default: every one that the estimator uses).
        layout: the devices that share the work (default: one). Results do not depend on it beyond rounding.
        accumulation: parts that an update's transitions are worked through in, one after the other: less memory, the same gradient.
            A natural gradient's are all those of an iteration.
        average: decay per update of a running average of the policy's parameters, `State.average`; `None`: none is kept.
        stratified: every `minibatches` consecutive transitions (times of a path, then paths) are dealt out, one to each minibatch,
            instead of all being shuffled. They then stay on their devices, whose exchange otherwise grows with the batch; the
            expected gradient is the same.
        scan_minibatches: a pass is one program, a loop over its minibatches, not two per minibatch; the same numbers up to
            rounding. Temporary memory is then asked for once a pass: a small U-Net's update takes 0.79 of the time on CPUs. But a
            network whose convolutions are not `ctrl_diffusion.convolution` becomes ten times slower there.
        kl_target: the temperature follows a target path KL from iteration to iteration, starting from `Objective.kl_weight`; `None`:
            it stays.
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
    """`state = init(params, value_params)` (`init(params)` without a learned value); `state, info = step(key, state)`.

    `step` consumes its state (buffers are donated).
    """

    init: Callable[..., State]
    step: Callable[[Key[Array, ""], State], tuple[State, Info]]
    fixed: Any
    """The arrays that control and reward hold, which nothing changes: arguments of the programs that need them."""
    recipe: Any
    """What it is composed of, an `algorithms.Recipe`."""
    programs: dict[str, Any]
    """The programs of an iteration by name, each a `programs.Program`."""

    def __repr__(self) -> str:
        return summary(self)

    @property
    def calls(self) -> Calls:
        """What one iteration evaluates, in samples (a value network not counted)."""
        return self.recipe.calls()
