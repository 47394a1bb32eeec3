"""Blocks that the networks share, on images `[b, h, w, c]` and sequences `[b, n, c]`.

Parameters are float32. `dtype` is what convolutions and matrix products are computed in; norms and softmaxes reduce in float32
whatever it is. Modules are named after the tensors of diffusers' files, so that a path in a module is a name in a file up to
the few renamings in `names.py`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ..chunks import in_chunks
from ..convolutions import convolution

Images = Float[Array, "b h w c"]
Resized = Float[Array, "b _ _ _"]  # images of another size or with other channels
Sequence = Float[Array, "b n c"]
# attention(q [b, n, heads, d], k [b, m, heads, d], v [b, m, heads, d], is_causal=...) -> [b, n, heads, d]; if some positions of the
# context do not count, also mask=[b, 1, 1, m]
AttentionFn = Callable[..., Float[Array, "b n k d"]]

erf_gelu = functools.partial(jax.nn.gelu, approximate=False)


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


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x sigmoid(1.702 x)`, OpenAI CLIP's stand-in for GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


class Layers(NamedTuple):
    """Makes layers that compute in `dtype`, with random parameters from `rngs`.

    `attention` is the function under all heads, `flash_attention` for NVIDIA devices and bfloat16.
    """

    rngs: nnx.Rngs
    dtype: Any = None
    param_dtype: Any = jnp.float32
    attention: AttentionFn = jax.nn.dot_product_attention

    def linear(self, inputs: int, outputs: int, bias: bool = True) -> nnx.Linear:
        return nnx.Linear(inputs, outputs, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs)

    def conv(
        self, inputs: int, outputs: int, size: int = 3, stride: int = 1, padding: Any = None, bias: bool = True
    ) -> nnx.Conv:
        """A square kernel; `padding`: pixels (before, after) on both axes, default `size // 2` on either side."""
        before, after = (size // 2, size // 2) if padding is None else padding
        return nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=stride,
            padding=((before, after), (before, after)),
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            conv_general_dilated=convolution,
            rngs=self.rngs,
        )

    def group_norm(self, channels: int, groups: int, eps: float) -> nnx.GroupNorm:
        return nnx.GroupNorm(
            channels,
            groups,
            epsilon=eps,
            use_fast_variance=False,  # E x^2 - (E x)^2 loses digits
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def layer_norm(self, channels: int, eps: float) -> nnx.LayerNorm:
        return nnx.LayerNorm(
            channels,
            epsilon=eps,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )


def timestep_features(timesteps: Float[Array, " b"], width: int, flip: bool, shift: float) -> Float[Array, "b w"]:
    """`sin(w_i t), cos(w_i t)` with `w_i = 10000^(-i / (width/2 - shift))`, `i < width/2`; `flip`: cosines first."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=timesteps.dtype) / (half - shift))
    angles = timesteps[:, None] * frequencies
    first, second = (jnp.cos, jnp.sin) if flip else (jnp.sin, jnp.cos)
    return jnp.concatenate([first(angles), second(angles)], axis=-1)


class ResNetBlock(nnx.Module):
    """`skip(h) + conv(silu(norm(conv(silu(norm(h))) + dense(silu(time)))))`; `skip` is a 1x1 convolution if channels change.

    Args:
        time: width of the time embedding; 0 for a block without.
    """

    def __init__(self, inputs: int, outputs: int, time: int, groups: int, eps: float, layers: Layers):
        self.norm1 = layers.group_norm(inputs, groups, eps)
        self.conv1 = layers.conv(inputs, outputs)
        self.time_emb_proj = layers.linear(time, outputs) if time else None
        self.norm2 = layers.group_norm(outputs, groups, eps)
        self.conv2 = layers.conv(outputs, outputs)
        self.conv_shortcut = layers.conv(inputs, outputs, size=1) if inputs != outputs else None

    def __call__(self, h: Images, time: Float[Array, "b t"] | None = None) -> Float[Array, "b h w d"]:
        residual = self.conv1(nnx.silu(self.norm1(h)))
        if self.time_emb_proj is not None and time is not None:
            residual = residual + self.time_emb_proj(nnx.silu(time))[:, None, None, :]
        residual = self.conv2(nnx.silu(self.norm2(residual)))
        return residual + (h if self.conv_shortcut is None else self.conv_shortcut(h))


class Attention(nnx.Module):
    """`out(concat over heads of softmax(q k^T / sqrt(d)) v)`; queries from `x`, keys and values from `context`.

    Args:
        width: of `x` and of all heads together, so that a head has `d = width / heads`.
        context: width of the context.
        bias: whether the three input projections have one; the output projection always has.
        causal: position `n` sees the context up to `n` alone.
        upcast: compute the heads in float32.
    """

    def __init__(
        self,
        width: int,
        context: int,
        heads: int,
        layers: Layers,
        *,
        bias: bool = False,
        causal: bool = False,
        upcast: bool = False,
    ):
        self.heads, self.causal, self.upcast, self.attention = heads, causal, upcast, layers.attention
        self.to_q = layers.linear(width, width, bias)
        self.to_k = layers.linear(context, width, bias)
        self.to_v = layers.linear(context, width, bias)
        self.to_out = layers.linear(width, width)

    def __call__(self, x: Sequence, context: Float[Array, "b m e"], seen: Bool[Array, "b m"] | None = None) -> Sequence:
        """`seen`: which positions of the context count; default: all."""
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(context)), self._split(self.to_v(context))
        options = {} if seen is None else dict(mask=seen[:, None, None, :])
        heads = self.attention(q, k, v, is_causal=self.causal, **options)
        return self.to_out(heads.reshape(x.shape).astype(x.dtype))

    def _split(self, x: Sequence) -> Float[Array, "b n k d"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) if self.upcast else x
        return x.reshape(*x.shape[:2], self.heads, -1)


class FeedForward(nnx.Module):
    """`leave(a * gelu(g))` with `a, g` the halves of `enter(x)`, each four times as wide as `x` (Shazeer 2020, GEGLU)."""

    def __init__(self, width: int, layers: Layers):
        self.enter = layers.linear(width, 8 * width)
        self.leave = layers.linear(4 * width, width)

    def __call__(self, x: Sequence) -> Sequence:
        a, gate = jnp.split(self.enter(x), 2, axis=-1)
        return self.leave(a * erf_gelu(gate))


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the context, and a gated feed-forward layer, each added to its input after a norm."""

    def __init__(self, width: int, context: int, heads: int, layers: Layers, *, upcast: bool = False):
        self.norm1, self.norm2, self.norm3 = (layers.layer_norm(width, eps=1e-5) for _ in range(3))
        self.attn1 = Attention(width, width, heads, layers, upcast=upcast)
        self.attn2 = Attention(width, context, heads, layers, upcast=upcast)
        self.ff = FeedForward(width, layers)

    def __call__(self, x: Sequence, context: Float[Array, "b m e"]) -> Sequence:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nnx.Module):
    """`h` plus a transformer block over its pixels, between two pointwise projections.

    Args:
        linear: the projections are stored as dense layers (Stable Diffusion 2) and not as 1x1 convolutions (1).
    """

    def __init__(
        self, width: int, context: int, heads: int, groups: int, layers: Layers, *, linear: bool, upcast: bool = False
    ):
        project = layers.linear if linear else functools.partial(layers.conv, size=1)
        self.norm = layers.group_norm(width, groups, eps=1e-6)
        self.proj_in = project(width, width)
        self.transformer_blocks = nnx.List([TransformerBlock(width, context, heads, layers, upcast=upcast)])
        self.proj_out = project(width, width)

    def __call__(self, h: Images, context: Float[Array, "b m e"]) -> Images:
        x = self.proj_in(self.norm(h)).reshape(h.shape[0], -1, h.shape[-1])
        for block in self.transformer_blocks:
            x = block(x, context)
        return h + self.proj_out(x.reshape(h.shape))


class PixelAttention(nnx.Module):
    """`h` plus self-attention over its pixels with one head."""

    def __init__(self, channels: int, groups: int, layers: Layers):
        self.group_norm = layers.group_norm(channels, groups, eps=1e-6)
        self.attention = Attention(channels, channels, 1, layers, bias=True)

    def __call__(self, h: Images) -> Images:
        x = self.group_norm(h).reshape(h.shape[0], -1, h.shape[-1])
        return h + self.attention(x, x).reshape(h.shape)


def recomputed(block: Callable[..., Any], remat: bool) -> Callable[..., Any]:
    """`block`, the insides of which are recomputed for the gradient if `remat`."""
    return jax.checkpoint(lambda *arguments: block(*arguments)) if remat else block


def upsample(h: Images, height: int, width: int) -> Float[Array, "b H W c"]:
    """Nearest neighbour at twice the resolution, cut to `height` and `width` (the next finer image may have an odd side)."""
    return jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)[:, :height, :width]
