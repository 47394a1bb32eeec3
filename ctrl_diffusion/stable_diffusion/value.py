"""A small value network of latents: what a half-made picture of a prompt is worth."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ..convolutions import convolution
from ..networks import TimeEmbedding


class LatentValue(nnx.Module):
    """`network(x [b, h, w, c], t [b], prompt [b]) -> [b]`: strided convolutions, time, and a learned vector for every prompt.

    The output starts at zero. Prompts are told apart by number, so that the value is for those that are trained on.

    Args:
        channels: of `x`.
        prompts: how many there are.
        width: channels after the first convolution; each of the `depth` convolutions halves height and width.
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
