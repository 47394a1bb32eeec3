"""Statistics among paths with the same condition, such as the same prompt.

`same [b, b]` is 1 if two paths have the same condition, else 0. It is `None` if there are no conditions; statistics are then over all
paths.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Same = Float[Array, "b b"] | None


def same_condition(cond: Any, dtype: Any = jnp.float32) -> Same:
    """`same` for the conditions of paths, arrays `[b, ...]`; `None` for `None`."""
    leaves = jax.tree.leaves(cond)
    if not leaves:
        return None
    same = [jnp.all(v[:, None] == v[None], axis=tuple(range(2, v.ndim + 1))) for v in leaves]
    return jnp.all(jnp.stack(same), axis=0).astype(dtype)


def mean_within(v: Float[Array, "*n b"], same: Same) -> Float[Array, "*n b"]:
    """Mean of `v` over paths with the same condition. If a condition occurs only once, the mean is over all paths."""
    of_all = jnp.broadcast_to(jnp.mean(v, axis=-1, keepdims=True), v.shape)
    if same is None:
        return of_all
    count = jnp.sum(same, axis=0)
    return jnp.where(count > 1, _sums(v, same) / count, of_all)


def _sums(v: Float[Array, "*n b"], same: Float[Array, "b b"]) -> Float[Array, "*n b"]:
    """Sums over paths with the same condition. The highest precision keeps accelerators from rounding `v`."""
    return jnp.matmul(v, same, precision=jax.lax.Precision.HIGHEST)


def softmax_within(logits: Float[Array, "*n b"], same: Same) -> Float[Array, "*n b"]:
    """`exp(logits)` divided by its mean over paths with the same condition: 1 on average, and 1 if a condition occurs once."""
    if same is None:
        return jax.nn.softmax(logits, axis=-1) * logits.shape[-1]

    def one(row):
        among = jnp.where(same > 0, row[None, :], -jnp.inf)
        return jnp.exp(row - jax.nn.logsumexp(among, axis=-1)) * jnp.sum(same, axis=0)

    flat = jax.lax.map(one, logits.reshape(-1, logits.shape[-1]))  # one [b, b] at a time
    return flat.reshape(logits.shape)


def variance_within(v: Float[Array, " b"], same: Same) -> Float[Array, ""]:
    """Unbiased variance among paths with the same condition, pooled over conditions; 0 if each condition occurs once."""
    if same is None:
        return jnp.var(v, ddof=1)
    count = jnp.sum(same, axis=0)
    freedom = v.shape[0] - jnp.sum(1 / count)  # paths minus conditions
    return jnp.sum((v - _sums(v, same) / count) ** 2) / jnp.maximum(freedom, 1)
