"""Layers of networks, on images `[b, h, w, c]` and sequences `[b, n, c]`.

Parameters are float32 by default. Convolutions and matrix products are computed in `dtype`. Norms and softmaxes always reduce in float32.
Modules are named after the tensors of published files: a path in a module is a name in a file, up to the few renamings of its `Names`.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..convolutions import convolution
from .attention import AttentionFn

Images = Float[Array, "b h w c"]
Resized = Float[Array, "b _ _ _"]  # images of another size or with other channels
Sequence = Float[Array, "b n c"]

erf_gelu = functools.partial(jax.nn.gelu, approximate=False)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x sigmoid(1.702 x)`, OpenAI CLIP's approximation of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


class Layers(NamedTuple):
    """Makes layers that compute in `dtype`, with random parameters from `rngs`.

    `attention` is the function that computes all attention of a network; use `flash_attention` for NVIDIA devices and bfloat16.
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
        """A convolution with a square kernel; `padding` is pixels (before, after) on both axes (default: `size // 2` on each side)."""
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


def recomputed(block: Callable[..., Any], remat: bool) -> Callable[..., Any]:
    """`block`; if `remat`, it is recomputed in the backward pass."""
    return jax.checkpoint(lambda *arguments: block(*arguments)) if remat else block
