"""The transformer of the UNet. It attends to the pixels of an image and to a context."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..pretrained.layers import Images, Layers, Sequence, erf_gelu
from ..pretrained.transformer import Attention


class FeedForward(nnx.Module):
    """`leave(a * gelu(g))`, where `a, g` are the halves of `enter(x)`, each four times as wide as `x` (Shazeer 2020, GEGLU)."""

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
        linear: whether files store the projections as dense layers (Stable Diffusion 2) and not as 1x1 convolutions (1).
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
