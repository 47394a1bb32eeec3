"""Which paths a policy is trained on: its own, past ones from a replay buffer, or paths of the reference policy."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .parallel import WHOLE
from .process import Params
from .rollout import AXES, Rollout, over_paths

Priority = Callable[[Float[Array, " n"]], Float[Array, " n"]]
"""A function from rewards of stored paths to weights, at least 0, that paths are drawn with."""


class AbstractBehaviour(eqx.Module):
    """The behaviour policy, which samples paths, and the buffer that keeps them."""

    @property
    def axes(self) -> Any:
        """The axis of every array of the buffer that counts paths (`parallel.WHOLE`: none), as a prefix of the buffer's tree."""
        return ()

    def policy(self, params: Params, reference: Params) -> Params:
        """Parameters that sample the next batch of paths."""
        return params

    @abc.abstractmethod
    def init(self, rollout: Rollout) -> Any:
        """An empty buffer for rollouts with the shapes of `rollout` (`jax.ShapeDtypeStruct`s)."""

    @abc.abstractmethod
    def update(self, key: Key[Array, ""], buffer: Any, rollout: Rollout) -> tuple[Any, Rollout]:
        """The new buffer and the paths to train on, as many as `rollout` has."""


class OnPolicy(AbstractBehaviour):
    """The policy's own paths. Each is used only in the iteration that sampled it."""

    def init(self, rollout: Rollout) -> Any:
        return ()

    def update(self, key: Key[Array, ""], buffer: Any, rollout: Rollout) -> tuple[Any, Rollout]:
        return buffer, rollout


class Reference(AbstractBehaviour):
    """Paths of the reference policy."""

    def policy(self, params: Params, reference: Params) -> Params:
        return reference

    def init(self, rollout: Rollout) -> Any:
        return ()

    def update(self, key: Key[Array, ""], buffer: Any, rollout: Rollout) -> tuple[Any, Rollout]:
        return buffer, rollout


def uniform_priority(rewards: Float[Array, " n"]) -> Float[Array, " n"]:
    """The same weight for every path."""
    return jnp.ones_like(rewards)


def positive_reward(rewards: Float[Array, " n"]) -> Float[Array, " n"]:
    """Weights proportional to `max(r, 0)`; the same weight for every path if no reward is positive."""
    weights = jnp.maximum(rewards, 0)
    return jnp.where(jnp.sum(weights) > 0, weights, jnp.ones_like(weights))


class ReplayBuffer(AbstractBehaviour):
    """The last `capacity` paths, first in first out. Each iteration draws its batch from them, with replacement.

    Replay is exact for pathwise, matching and trajectory estimators, which hold for any law of states: `a_old` and `noise` of a stored
    path belong to the policy that sampled it. Likelihood ratios correct old paths one step at a time only.

    Args:
        capacity: paths to keep, at least one batch.
        priority: weights to draw with, a function of the stored rewards (default: `uniform_priority`).
    """

    capacity: int = eqx.field(static=True)
    priority: Priority = eqx.field(static=True, default=uniform_priority)

    def __check_init__(self):
        if self.capacity < 1:
            raise ValueError(f"capacity={self.capacity} must be at least 1 path.")

    @property
    def axes(self) -> Any:
        return AXES, WHOLE

    def init(self, rollout: Rollout) -> Any:
        if self.capacity < rollout.reward.shape[0]:
            raise ValueError(
                f"capacity={self.capacity} must hold at least one batch of {rollout.reward.shape[0]} paths (Training.batch)."
            )

        def empty(axis, like):
            return jnp.zeros(like.shape[:axis] + (self.capacity,) + like.shape[axis + 1 :], like.dtype)

        return over_paths(empty, rollout)._replace(t=jnp.zeros(rollout.t.shape, rollout.t.dtype)), jnp.zeros((), jnp.int32)

    def update(self, key: Key[Array, ""], buffer: Any, rollout: Rollout) -> tuple[Any, Rollout]:
        stored, count = buffer
        batch = rollout.reward.shape[0]
        slots = (count + jnp.arange(batch)) % self.capacity

        def put(axis, old, new):
            return jnp.moveaxis(jnp.moveaxis(old, axis, 0).at[slots].set(jnp.moveaxis(new, axis, 0)), 0, axis)

        stored = over_paths(put, stored, rollout)._replace(t=rollout.t)
        filled = jnp.arange(self.capacity) < count + batch
        weights = jnp.where(filled, self.priority(jnp.where(filled, stored.reward, -jnp.inf)), 0)
        chosen = jax.random.choice(key, self.capacity, (batch,), p=weights / jnp.sum(weights))
        drawn = over_paths(lambda axis, v: jnp.take(v, chosen, axis=axis), stored)._replace(t=rollout.t)
        return (stored, count + batch), drawn
