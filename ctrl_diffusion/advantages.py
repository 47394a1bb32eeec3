"""Returns to go, value increments and generalised advantages of control intervals, and how they are normalised and clipped."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .groups import Same, mean_within


def to_go(increments: Float[Array, "n b"]) -> Float[Array, "n b"]:
    """`sum_{l >= j} increment_l`."""
    return jnp.cumsum(increments[::-1], axis=0)[::-1]


def value_increments(values: Float[Array, "K b"], paid: Float[Array, "K-1 b"]) -> Float[Array, "K-1 b"]:
    """`V_{j+1} - V_j - paid_j`, reward units: the change of the value over interval `j` less its running cost and KL penalty."""
    return values[1:] - values[:-1] - paid


def advantages(increments: Float[Array, "n b"], dt: Float[Array, " n"], horizon: float) -> Float[Array, "n b"]:
    """`A_j = sum_{l >= j} exp(-(t_l - t_j) / horizon) increment_l`: generalised advantages with a decay per unit *time*.

    Schulman et al. (2016), eq. 16. `exp(-dt / horizon)` replaces `gamma lambda` per step, so the same `horizon` (control time) means the
    same for any number of steps. `horizon = 0` keeps only the increment (as in "Score as Action", arXiv 2502.01819);
    `horizon = inf` telescopes to the Monte Carlo return minus the value.
    """
    decay = jnp.exp(-dt / horizon) if horizon > 0 else jnp.zeros_like(dt)

    def backward(following, step):
        increment, decay = step
        advantage = increment + decay * following
        return advantage, advantage

    return jax.lax.scan(backward, jnp.zeros_like(increments[0]), (increments, decay), reverse=True)[1]


Clip = float | tuple[float, float]
"""How far a likelihood ratio may move below and above 1: the same, or two numbers."""


def clipped_surrogate(log_ratio: Float[Array, " n"], advantage: Float[Array, " n"], clip: Clip) -> Float[Array, " n"]:
    """`min(ratio A, clip(ratio, 1 - below, 1 + above) A)` (Schulman et al. 2017, eq. 7); `clip = inf` is `ratio A`."""
    ratio, (below, above) = jnp.exp(log_ratio), both_sides(clip)
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - below, 1 + above) * advantage)


def both_sides(clip: Clip) -> tuple[float, float]:
    """`(below, above)`."""
    return clip if isinstance(clip, tuple) else (clip, clip)


def centre(advantage: Float[Array, "n b"], same: Same = None) -> Float[Array, "n b"]:
    """Subtract the mean over the batch at every time, as a baseline (with `same`: over paths of the same condition)."""
    return advantage - mean_within(advantage, same)


def standardise_per_time(advantage: Float[Array, "n b"], same: Same = None) -> Float[Array, "n b"]:
    """Mean 0 and standard deviation 1 at every time, over the batch (with `same`: over paths of the same condition)."""
    centred = centre(advantage, same)
    return _divided(centred, mean_within(centred**2, same))


def standardise_all(advantage: Float[Array, "n b"], same: Same = None) -> Float[Array, "n b"]:
    """Mean 0 and standard deviation 1 over times and paths together (with `same`: over paths of the same condition)."""
    centred = advantage - jnp.mean(mean_within(advantage, same), axis=0)
    return _divided(centred, jnp.mean(mean_within(centred**2, same), axis=0))


def _divided(centred: Float[Array, "n b"], variance: Float[Array, "..."]) -> Float[Array, "n b"]:
    return centred / (jnp.sqrt(variance) + jnp.finfo(centred.dtype).tiny)
