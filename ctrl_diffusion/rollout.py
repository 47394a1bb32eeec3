"""The recorded paths of an iteration (`Rollout`), and the transitions that a loss is computed on (`Transitions`).

A state-sized array is kept only if an estimator, a value or a critic declares that it reads it. A field that nothing reads is `None`.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from .parallel import WHOLE
from .process import Cond


class Transitions(NamedTuple):
    """The arguments of a loss: `[m]` (time, sample) pairs, or `[m, n]` whole paths. Fields that nothing reads are `None`.

    Attributes:
        j: the control interval.
        x: the state at its start `[m, *x]`.
        weight: the weight of the transition in the loss; 1, unless times are sampled unevenly.
        policy_target: what the estimator computed for the policy's loss: advantages `[m]`, target actions `[m, *x]`, or `None`.
        x_next: the state at the end of the interval `[m, *x]`.
        noise, a_old, a_ref: standard normals of the interval, actions of the sampling policy and of the reference `[m, *x]`.
        x_hat, r_hat: the x0 prediction `[m, *x]` and its reward `[m]`.
        value_target: the regression target of the value `[m]`.
        cond: conditions, arrays `[m, ...]`.
    """

    j: Int[Array, "..."]
    x: Float[Array, "..."]
    weight: Float[Array, "..."]
    policy_target: Any = None
    x_next: Any = None
    noise: Any = None
    a_old: Any = None
    a_ref: Any = None
    x_hat: Any = None
    r_hat: Any = None
    value_target: Any = None
    cond: Cond = None


class Rollout(NamedTuple):
    """A batch of paths that an old policy sampled, with their rewards and penalties; `n = K - 1` intervals.

    Attributes:
        t: control times `[K]`.
        x: states `[K, b, *x]`.
        reward: of the final states `[b]`.
        penalty: the KL of each interval, or the function `Objective.penalty` of it, nats, `[n, b]`.
        log_ratio: `log dP^old / dP^ref` of each interval `[n, b]`, summed over state dimensions.
        noise, a_old, a_ref: standard normals of the intervals, actions of the old policy and of the reference `[n, b, *x]`; `None` if
            nothing reads them.
        x_hat, r_hat: x0 predictions `[n, b, *x]` and their rewards `[n, b]`; `None` if the value uses none.
        cond: the conditions of the paths, arrays `[b, ...]`; `None` if there are none.
    """

    t: Float[Array, " K"]
    x: Float[Array, "K b *x"]
    reward: Float[Array, " b"]
    penalty: Float[Array, "n b"]
    log_ratio: Float[Array, "n b"]
    noise: Any = None
    a_old: Any = None
    a_ref: Any = None
    x_hat: Any = None
    r_hat: Any = None
    cond: Cond = None


AXES = Rollout(WHOLE, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0)  # pyright: ignore[reportArgumentType]
"""The axis of every field of a `Rollout` that counts paths."""


def over_paths(fn, *rollouts: Rollout) -> Rollout:
    """Apply `fn(axis, *arrays)` to every field with an axis of paths; `t` is taken from the first rollout."""

    def field(axis, *values):
        return values[0] if axis == WHOLE else jax.tree.map(lambda *v: fn(axis, *v), *values)

    return Rollout(*(field(axis, *values) for axis, *values in zip(AXES, *rollouts)))


class Fields(NamedTuple):
    """Names of the recorded fields that an estimator reads: from whole paths (`Rollout`), and from `Transitions`."""

    paths: frozenset[str] = frozenset()
    transitions: frozenset[str] = frozenset()


RECORDED = frozenset({"noise", "a_old", "a_ref"})
"""State-sized fields of a rollout; they are kept only if something declares that it reads them."""
EVERY_FIELD = Fields(RECORDED, RECORDED | {"x_next"})
