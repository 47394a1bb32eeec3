"""Functions that compute attention in less memory or time, with the same results."""

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
    """`attention` with at most `size` queries at a time. Memory holds `size` rows of its matrix; results are the same.

    It is for devices without flash attention; in Stable Diffusion 4096 pixels attend to each other in 8 heads. The backward pass computes
    each chunk again. Causal attention, which is short here, is not divided.
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
    """`jax.nn.dot_product_attention` for CPUs, one image and head after the other, with at most `size` queries at a time.

    On CPUs XLA is slow at batches of matrix products. This computes two products of two matrices at a time. By default the number of
    queries is such that their logits (2^21) stay in the caches. Results differ by rounding. The backward pass computes each part again.
    Short attention is computed as usual: if it is masked or causal, or has up to `size` queries (by default 2^17 logits per head). Images
    are computed one after the other, also if a batch is divided over devices: the devices do not share the work.
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
    """`jax.nn.dot_product_attention` for NVIDIA devices, by cuDNN's kernels if they apply. They never store the attention matrix.

    The kernels apply to self-attention in half precision, with an even number of positions, without a mask, and with heads of 8, 16,
    ..., 128 features. All other attention is computed as usual.
    """
    applies = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape == k.shape and q.shape[1] % 2 == 0 and not options
    applies = applies and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    implementation = "cudnn" if applies else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal, implementation=implementation, **options)
