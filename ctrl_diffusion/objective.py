r"""Parts of the likelihood-ratio form of the control objective.

    J(theta) = E^a[ r(X_T) - lambda sum_j kl_j ],    V(t_j, x) = E^a[ r(X_T) - lambda sum_{l >= j} kl_l | x_j = x ]

An *increment* is integrated over a control interval, `V_{j+1} - V_j - lambda kl_j`; it is the advantage rate times `dt` plus a
martingale increment, which is what correlates with the noise.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def value_increments(values: Float[Array, "K b"], kl: Float[Array, "K-1 b"], kl_weight: float) -> Float[Array, "K-1 b"]:
    """`V_{j+1} - V_j - kl_weight kl_j`: what interval `j` gained, in reward units."""
    return values[1:] - values[:-1] - kl_weight * kl


def advantages(increments: Float[Array, "n b"], dt: Float[Array, " n"], horizon: float) -> Float[Array, "n b"]:
    """`A_j = sum_{l >= j} exp(-(t_l - t_j) / horizon) increment_l`: generalised advantages with a decay per unit *time*.

    Schulman et al. (2016), eq. 16, with `gamma lambda` per step replaced by `exp(-dt / horizon)`, so that the meaning does not
    depend on the step count. `horizon = 0` keeps the increment alone (as in "Score as Action", arXiv 2502.01819);
    `horizon = inf` telescopes to the Monte Carlo return minus the value.
    """
    decay = jnp.exp(-dt / horizon) if horizon > 0 else jnp.zeros_like(dt)

    def backward(following, step):
        increment, decay = step
        advantage = increment + decay * following
        return advantage, advantage

    return jax.lax.scan(backward, jnp.zeros_like(increments[0]), (increments, decay), reverse=True)[1]


def returns_to_go(reward: Float[Array, " b"], kl: Float[Array, "n b"], kl_weight: float) -> Float[Array, "n b"]:
    """`r(X_T) - kl_weight sum_{l >= j} kl_l`: Monte Carlo targets of the value at `t_0 .. t_{K-2}`."""
    return reward - kl_weight * jnp.cumsum(kl[::-1], axis=0)[::-1]


def clipped_surrogate(log_ratio: Float[Array, " n"], advantage: Float[Array, " n"], clip: float) -> Float[Array, " n"]:
    """`min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)` (Schulman et al. 2017, eq. 7); `clip = inf` is `ratio A`."""
    ratio = jnp.exp(log_ratio)
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def centre(advantage: Float[Array, "n b"]) -> Float[Array, "n b"]:
    """Subtract the mean over the batch at every time: the batch's own baseline."""
    return advantage - jnp.mean(advantage, axis=1, keepdims=True)


def standardise(advantage: Float[Array, "n b"], axis: int | None) -> Float[Array, "n b"]:
    """Centre and scale to unit standard deviation over the batch of every time (`axis=1`) or over everything (`None`)."""
    centred = advantage - jnp.mean(advantage, axis=axis, keepdims=True)
    return centred / (jnp.std(centred, axis=axis, keepdims=True) + jnp.finfo(advantage.dtype).tiny)
