"""A small value network of noisy latents and a prompt."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..convolutions import convolution
from ..networks import TimeEmbedding


class LatentValue(nnx.Module):
    """`network(x [b, h, w, c], t [b], prompt [b]) -> [b]`: strided convolutions, with features of time and a vector per prompt.

    The output starts at zero. Prompts are given by number and have learned vectors, so the value is for the prompts of training only.

    Args:
        channels: channels of `x`.
        prompts: number of prompts.
        width: channels after the first convolution.
        depth: number of convolutions; each halves height and width.
    """

    def __init__(self, channels: int, prompts: int, *, width: int = 64, depth: int = 3, rngs: nnx.Rngs):
        self.enter = nnx.Conv(channels, width, (3, 3), conv_general_dilated=convolution, rngs=rngs)
        self.down = nnx.List(
            [nnx.Conv(width, width, (3, 3), strides=(2, 2), conv_general_dilated=convolution, rngs=rngs) for _ in range(depth)]
        )
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(depth)])
        self.time = TimeEmbedding(width, rngs)
        self.prompt = nnx.Embed(prompts, width, rngs=rngs)
        self.inner = nnx.Linear(width, width, rngs=rngs)
        self.leave = nnx.Linear(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], t: Float[Array, " b"], cond: Int[Array, " b"] | Any) -> Float[Array, " b"]:
        given = self.time(t)[:, None, None] + self.prompt(cond)[:, None, None]
        h = self.enter(x)
        for conv, norm in zip(self.down, self.norms):
            h = conv(nnx.silu(norm(h) + given))
        return self.leave(nnx.silu(self.inner(jnp.mean(h, axis=(1, 2)))))[:, 0]
