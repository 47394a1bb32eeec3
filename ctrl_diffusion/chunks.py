"""A function of a batch, evaluated on a few rows at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def in_chunks(fn: Callable[..., Float[Array, "m *y"]], size: int) -> Callable[..., Float[Array, "b *y"]]:
    """`fn(x [m, ...], ...) -> [m, ...]` on batches of any length, `size` rows at a time, one after the other.

    Memory is that of one chunk, also for the gradient, for which each chunk is evaluated a second time. `fn` must treat rows
    independently. Every argument has the rows first, or is `None` or a tree of such; the remainder is a smaller chunk. Up to `size` rows
    are just `fn` of them, so that chunks within chunks cost nothing.

    Of `n` chunks the first has the rows `0, n, 2 n, ...`: where the rows of a batch are divided over devices, every device has a part
    of every chunk (of a `size` that their number divides).

    Example: decode and reward four latents at a time.

        score = in_chunks(lambda latents, ids: reward(vae.to_images(latents), ids), 4)
        gradient = jax.grad(lambda latents: score(latents, ids).sum())(latents)
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 (rows).")

    def dealt(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(size, -1, *x.shape[1:]), 0, 1)

    def chunked(*arguments: Any) -> Float[Array, "b *y"]:
        lengths = {x.shape[0] for x in jax.tree.leaves(arguments)}
        if len(lengths) != 1:
            raise ValueError(f"the arguments have {sorted(lengths)} rows: give each the same number.")
        (rows,) = lengths
        if rows <= size:
            return fn(*arguments)
        whole = rows - rows % size
        call = jax.checkpoint(lambda chunk: fn(*chunk), prevent_cse=False)  # a loop keeps its turns apart anyway
        y = jax.lax.map(call, jax.tree.map(lambda x: dealt(x[:whole]), arguments))
        parts = [jnp.swapaxes(y, 0, 1).reshape(whole, *y.shape[2:])]
        if whole < rows:
            parts.append(jax.checkpoint(fn)(*jax.tree.map(lambda x: x[whole:], arguments)))
        return jnp.concatenate(parts)

    return chunked
