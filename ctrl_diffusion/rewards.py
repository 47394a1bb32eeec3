"""Rewards: a batch of final states to one number each, differentiable (JAX) or black box (any Python function, on the host)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Reward(NamedTuple):
    """A reward `fn(x [b, *x]) -> [b]`.

    `differentiable` rewards are JAX functions and get JAX arrays; black boxes get numpy arrays and run on the host.
    """

    name: str
    fn: Callable[[Any], Any]
    differentiable: bool


class RewardError(ValueError):
    """A reward that returned something other than one finite number per sample, or raised."""


def differentiable(fn: Callable[[Float[Array, "b *x"]], Float[Array, " b"]], name: str | None = None) -> Reward:
    """A JAX reward; compiled once."""
    return Reward(name or _name(fn), jax.jit(fn), True)


def black_box(fn: Callable[[np.ndarray], Any], name: str | None = None) -> Reward:
    """Any Python function from a numpy batch `[b, *x]` to `b` numbers."""
    return Reward(name or _name(fn), fn, False)


def as_reward(reward: Reward | Callable) -> Reward:
    """A `Reward` unchanged; a plain function as a black box (always valid: use `differentiable` to promise more)."""
    if isinstance(reward, Reward):
        return reward
    if not callable(reward):
        raise TypeError(f"reward={reward!r} must be a function from a batch of samples to one number each.")
    return black_box(reward)


def evaluate(reward: Reward, x: Float[Array, "b *x"]) -> Float[Array, " b"]:
    """Evaluate and check: one finite number per sample, else a `RewardError` that says which sample and what to do."""
    try:
        values = reward.fn(x if reward.differentiable else np.asarray(x))
    except Exception as error:
        raise RewardError(f"reward {reward.name!r} raised {type(error).__name__} on a batch of {x.shape}: {error}") from error
    values = np.asarray(values)
    if values.shape != (x.shape[0],):
        raise RewardError(
            f"reward {reward.name!r} returned shape {values.shape} for a batch of {x.shape[0]} samples: "
            f"return one number per sample, shape ({x.shape[0]},)."
        )
    if not np.issubdtype(values.dtype, np.number):
        raise RewardError(f"reward {reward.name!r} returned {values.dtype} values: return real numbers.")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise RewardError(
            f"reward {reward.name!r} returned {values[bad[0]]} for sample {bad[0]} ({len(bad)} of {len(values)} samples are not "
            "finite): return a finite number for every sample, for example by bounding a logarithm."
        )
    return jnp.asarray(values, x.dtype)


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
