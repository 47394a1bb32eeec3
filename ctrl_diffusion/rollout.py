"""What is recorded of an iteration's paths, and the transitions of it that a loss is computed on.

State-sized arrays are kept only where an estimator, a value or a critic declares that it reads them; a field that nobody reads is
`None`.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from .parallel import WHOLE
from .process import Cond


class Transitions(NamedTuple):
    """What a loss is computed on: `[m]` (time, sample) pairs, or `[m, n]` whole paths; `j` is the control interval.

    `policy_target` is what the estimator computed ahead: advantages `[m]`, target actions `[m, *x]`, or nothing; `value_target` is
    what the value is regressed on. `x_next` is the state
    at the end of the interval, `weight` what its loss counts (1, unless times are sampled unevenly), `cond` the conditions of the
    transitions, arrays `[m, ...]` (`None` where there are none). Fields that neither the estimator nor the critic reads are `None`.
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
    """A batch of paths made by an old policy, with what is needed to judge them; `n = K - 1` intervals.

    Attributes:
        t: control times `[K]`.
        x: states `[K, b, *x]`.
        reward: of the final states `[b]`.
        penalty: the KL of each interval (or the divergence that `Objective.penalty` makes of it), nats, `[n, b]`.
        log_ratio: `log dP^old / dP^ref` of each interval `[n, b]`, summed over state dimensions.
        noise, a_old, a_ref: standard normals and old and reference actions of the intervals `[n, b, *x]`; `None` where nothing reads them.
        x_hat, r_hat: estimates of the final state `[n, b, *x]` and their rewards `[n, b]`; `None` where the value uses none.
        cond: the conditions of the paths, arrays `[b, ...]` (`None` where there are none).
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
    """Apply `fn(axis, *arrays)` to every field with an axis of paths; `t` is that of the first."""

    def field(axis, *values):
        return values[0] if axis == WHOLE else jax.tree.map(lambda *v: fn(axis, *v), *values)

    return Rollout(*(field(axis, *values) for axis, *values in zip(AXES, *rollouts)))


class Fields(NamedTuple):
    """Names of the recorded fields that something reads: of whole paths (`Rollout`), and of transitions (`Transitions`)."""

    paths: frozenset[str] = frozenset()
    transitions: frozenset[str] = frozenset()


RECORDED = frozenset({"noise", "a_old", "a_ref"})
"""State-sized fields of a rollout, which are kept where they are declared."""
EVERY_FIELD = Fields(RECORDED, RECORDED | {"x_next"})
