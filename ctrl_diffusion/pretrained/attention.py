"""Functions that compute attention, under all heads of a network: the same numbers, in less memory or time."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..chunks import in_chunks

# attention(q [b, n, heads, d], k [b, m, heads, d], v [b, m, heads, d], is_causal=...) -> [b, n, heads, d]; if some positions of the
# context do not count, also mask=[b, 1, 1, m]
AttentionFn = Callable[..., Float[Array, "b n k d"]]


def chunked_attention(size: int, attention: AttentionFn = jax.nn.dot_product_attention) -> AttentionFn:
    """`attention` with at most `size` queries at a time: the same numbers, memory of `size` rows of its matrix instead of all.

    For devices without flash attention: 4096 pixels attend to each other 8 times over in Stable Diffusion. A gradient computes each
    chunk again. Causal attention, which is short here, is left whole.
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1 (queries).")

    def attend(q, k, v, *, is_causal: bool = False, **options):
        if is_causal or q.shape[1] <= size:
            return attention(q, k, v, is_causal=is_causal, **options)

        def some(queries):  # [m, b, heads, d]
            return jnp.swapaxes(attention(jnp.swapaxes(queries, 0, 1), k, v, **options), 0, 1)

        return jnp.swapaxes(in_chunks(some, size)(jnp.swapaxes(q, 0, 1)), 0, 1)

    return attend


def head_by_head(size: int | None = None) -> AttentionFn:
    """`jax.nn.dot_product_attention` of one image and head after the other, with at most `size` queries at a time. For CPUs.

    There XLA is slow at many products at once; this is two products of two matrices at a time, by default of as many queries as have
    2^21 logits, which stay in the caches. Numbers differ by rounding. A gradient computes each part again. Masked and causal attention and
    that of up to `size` queries (by default 2^17 logits a head), all short here, are computed as without it. Images come one after the
    other, also where a batch is divided over devices: they do not share the work.
    """
    if size is not None and size < 1:
        raise ValueError(f"size={size} must be at least 1 (queries).")

    def attend(q, k, v, *, is_causal: bool = False, **options):
        logits = q.shape[1] * k.shape[1]
        short = logits <= 2**17 if size is None else q.shape[1] <= size
        if is_causal or options or short:
            return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, **options)
        queries = max(1, 2**21 // k.shape[1]) if size is None else size

        def one(head):  # q [n, d], k and v [m, d]
            q, k, v = head

            def some(q):
                logits = jnp.matmul(q, k.T, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
                return jax.nn.softmax(logits).astype(v.dtype) @ v

            whole = q.shape[0] <= queries
            return jax.checkpoint(some, prevent_cse=False)(q) if whole else in_chunks(some, queries)(q)

        b, n, heads, d = q.shape
        separate = [jnp.swapaxes(x, 1, 2).reshape(b * heads, x.shape[1], d) for x in (q, k, v)]
        return jnp.swapaxes(jax.lax.map(one, separate).reshape(b, heads, n, d), 1, 2)

    return attend


def flash_attention(q, k, v, *, is_causal: bool = False, **options) -> Float[Array, "b n k d"]:
    """`jax.nn.dot_product_attention` by cuDNN's kernels where they apply: the matrix of attention is never held. For NVIDIA devices.

    They are for self-attention in half precision, of an even number of positions, without a mask, with heads of 8, 16, ..., 128
    features. All else is computed as without them.
    """
    applies = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape == k.shape and q.shape[1] % 2 == 0 and not options
    applies = applies and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    implementation = "cudnn" if applies else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=implementation, **options)
