"""Convolutional blocks of UNets and autoencoders, on images `[b, h, w, c]`."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from .layers import Images, Layers
from .transformer import Attention


class ResNetBlock(nnx.Module):
    """`skip(h) + conv(silu(norm(conv(silu(norm(h))) + dense(silu(time)))))`; `skip` is a 1x1 convolution if channels change.

    Args:
        time: width of the time embedding; 0 for a block without one.
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


class PixelAttention(nnx.Module):
    """`h` plus self-attention over its pixels, with one head."""

    def __init__(self, channels: int, groups: int, layers: Layers):
        self.group_norm = layers.group_norm(channels, groups, eps=1e-6)
        self.attention = Attention(channels, channels, 1, layers, bias=True)

    def __call__(self, h: Images) -> Images:
        x = self.group_norm(h).reshape(h.shape[0], -1, h.shape[-1])
        return h + self.attention(x, x).reshape(h.shape)


def upsample(h: Images, height: int, width: int) -> Float[Array, "b H W c"]:
    """Nearest-neighbour upsampling by two, cut to `height` and `width`, since the next finer image may have an odd side."""
    return jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)[:, :height, :width]
