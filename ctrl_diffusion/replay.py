"""Which paths a policy is trained on: its own, a replay buffer of past ones, or the reference's."""

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
"""Weights, at least 0, of stored paths by their rewards."""


class AbstractBehaviour(eqx.Module):
    """The behaviour policy, which samples, and what is kept of its paths."""

    @property
    def axes(self) -> Any:
        """For every array of the buffer, the axis that counts paths (`parallel.WHOLE`: none); a prefix of its tree."""
        return ()

    def policy(self, params: Params, reference: Params) -> Params:
        """Parameters that sample the next batch of paths."""
        return params

    @abc.abstractmethod
    def init(self, rollout: Rollout) -> Any:
        """An empty buffer for rollouts of these shapes (`jax.ShapeDtypeStruct`s)."""

    @abc.abstractmethod
    def update(self, key: Key[Array, ""], buffer: Any, rollout: Rollout) -> tuple[Any, Rollout]:
        """The new buffer and the paths to train on, as many as `rollout` has."""


class OnPolicy(AbstractBehaviour):
    """The policy's own paths, used in the iteration that made them."""

    def init(self, rollout: Rollout) -> Any:
        return ()

    def update(self, key: Key[Array, ""], buffer: Any, rollout: Rollout) -> tuple[Any, Rollout]:
        return buffer, rollout


class Reference(AbstractBehaviour):
    """Paths of the reference."""

    def policy(self, params: Params, reference: Params) -> Params:
        return reference

    def init(self, rollout: Rollout) -> Any:
        return ()

    def update(self, key: Key[Array, ""], buffer: Any, rollout: Rollout) -> tuple[Any, Rollout]:
        return buffer, rollout


def uniform_priority(rewards: Float[Array, " n"]) -> Float[Array, " n"]:
    """Every path alike."""
    return jnp.ones_like(rewards)


def positive_reward(rewards: Float[Array, " n"]) -> Float[Array, " n"]:
    """In proportion to `max(r, 0)`; every path alike if none is positive."""
    weights = jnp.maximum(rewards, 0)
    return jnp.where(jnp.sum(weights) > 0, weights, jnp.ones_like(weights))


class ReplayBuffer(AbstractBehaviour):
    """The last `capacity` paths, first in first out; each iteration draws from them, with replacement.

    Exact for pathwise, matching and trajectory estimators, which hold for any law of states (`a_old` and `noise` of a stored path
    are those of the policy that made it). Likelihood ratios against old paths are importance-weighted one step at a time only.
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
            raise ValueError(f"capacity={self.capacity} must hold at least one batch of {rollout.reward.shape[0]} paths.")

        def empty(axis, like):
            return jnp.zeros(like.shape[:axis] + (self.capacity,) + like.shape[axis + 1 :], like.dtype)

        return over_paths(empty, rollout)._replace(t=jnp.zeros(rollout.t.shape, rollout.t.dtype)), jnp.zeros((), jnp.int32)

    def update(self, key: Key[Array, ""], buffer: Any, rollout: Rollout) -> tuple[Any, Rollout]:
        stored, count = buffer
        batch = rollout.reward.shape[0]
        transitions = (count + jnp.arange(batch)) % self.capacity

        def put(axis, old, new):
            return jnp.moveaxis(jnp.moveaxis(old, axis, 0).at[transitions].set(jnp.moveaxis(new, axis, 0)), 0, axis)

        stored = over_paths(put, stored, rollout)._replace(t=rollout.t)
        filled = jnp.arange(self.capacity) < count + batch
        weights = jnp.where(filled, self.priority(jnp.where(filled, stored.reward, -jnp.inf)), 0)
        chosen = jax.random.choice(key, self.capacity, (batch,), p=weights / jnp.sum(weights))
        drawn = over_paths(lambda axis, v: jnp.take(v, chosen, axis=axis), stored)._replace(t=rollout.t)
        return (stored, count + batch), drawn
