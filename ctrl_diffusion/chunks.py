"""Evaluates a function of a batch on a few rows at a time, to save memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def in_chunks(fn: Callable[..., Float[Array, "m *y"]], size: int) -> Callable[..., Float[Array, "b *y"]]:
    """`fn(x [m, ...], ...) -> [m, ...]` on batches of any length, `size` rows at a time, one after the other.

    Memory is that of one chunk, also for the gradient, which evaluates each chunk a second time. `fn` must treat rows independently.
    Arguments are arrays with rows first, trees of such arrays, or `None`. A batch of at most `size` rows is passed to `fn` as it is. If
    `size` does not divide the number of rows, the last chunk is smaller.

    The first of `n` chunks has the rows `0, n, 2 n, ...`. If a batch is divided over devices, every device thus has a part of every chunk
    (for a `size` that the number of devices divides).

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
