"""The UNet of Stable Diffusion 1.x and 2.x, which predicts noise or v."""

from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..pretrained.attention import AttentionFn
from ..pretrained.layers import Images, Layers, Resized, recomputed, timestep_features
from ..pretrained.names import Names
from ..pretrained.resnet import ResNetBlock, upsample
from .blocks import SpatialTransformer
from .config import CROSS, UNetConfig

Time = Float[Array, "b t"]
Context = Float[Array, "b n e"]

NAMES = Names(
    renamed=(
        (r"\bto_out\b", "to_out.0"),
        (r"\bff\.enter\b", "ff.net.0.proj"),
        (r"\bff\.leave\b", "ff.net.2"),
        (r"\bdownsampler\b", "downsamplers.0.conv"),
        (r"\bupsampler\b", "upsamplers.0.conv"),
    )
)


class TimestepEmbedding(nnx.Module):
    """Two dense layers on the features of the timestep. They are computed in the type of the parameters."""

    def __init__(self, features: int, width: int, layers: Layers):
        exact = layers._replace(dtype=None)
        self.linear_1 = exact.linear(features, width)
        self.linear_2 = exact.linear(width, width)

    def __call__(self, features: Float[Array, "b f"]) -> Time:
        return self.linear_2(nnx.silu(self.linear_1(features)))


def _resnet(config: UNetConfig, inputs: int, outputs: int, layers: Layers) -> ResNetBlock:
    time = 4 * config.block_out_channels[0]
    return ResNetBlock(inputs, outputs, time, config.norm_num_groups, config.norm_eps, layers)


def _transformer(config: UNetConfig, i: int, layers: Layers) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[i],
        config.cross_attention_dim,
        config.heads[i],
        config.norm_num_groups,
        layers,
        linear=config.use_linear_projection,
        upcast=config.upcast_attention,
    )


def _layer(resnet: ResNetBlock, transformer: SpatialTransformer | None, remat: bool, h, time: Time, context: Context):
    """A ResNet block and, if there is one, a transformer."""

    def layer(h, time, context):
        h = resnet(h, time)
        return h if transformer is None else transformer(h, context)

    return recomputed(layer, remat)(h, time, context)


class DownBlock(nnx.Module):
    """Layers at resolution `i`, then downsampling to half of it, except at the coarsest. All images are kept as skips."""

    def __init__(self, config: UNetConfig, i: int, layers: Layers, remat: bool):
        channels, last = config.block_out_channels, i == len(config.block_out_channels) - 1
        inputs = [channels[max(i - 1, 0)]] + [channels[i]] * (config.layers_per_block - 1)
        attends = config.down_block_types[i] in CROSS
        self.remat = remat
        self.resnets = nnx.List([_resnet(config, n, channels[i], layers) for n in inputs])
        self.attentions = nnx.List([_transformer(config, i, layers) for _ in inputs] if attends else [])
        self.downsampler = None if last else layers.conv(channels[i], channels[i], stride=2)

    def __call__(self, h: Images, time: Time, context: Context) -> tuple[Resized, list[Resized]]:
        skips = []
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            h = _layer(resnet, transformer, self.remat, h, time, context)
            skips.append(h)
        if self.downsampler is not None:
            h = self.downsampler(h)
            skips.append(h)
        return h, skips


class MidBlock(nnx.Module):
    """A ResNet block, a transformer and a ResNet block at the coarsest resolution."""

    def __init__(self, config: UNetConfig, layers: Layers, remat: bool):
        channels = config.block_out_channels[-1]
        self.remat = remat
        self.resnets = nnx.List([_resnet(config, channels, channels, layers) for _ in range(2)])
        self.attentions = nnx.List([_transformer(config, -1, layers)])

    def __call__(self, h: Images, time: Time, context: Context) -> Images:
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            h = _layer(resnet, transformer, self.remat, h, time, context)
        return h


class UpBlock(nnx.Module):
    """Layers at resolution `i`, each on its input and the last unused skip, then upsampling to twice the resolution.

    Args:
        kind: the block's name in the configuration.
        i: resolution; 0 is the finest.
    """

    def __init__(self, config: UNetConfig, kind: str, i: int, layers: Layers, remat: bool):
        channels, coarsest, count = config.block_out_channels, len(config.block_out_channels) - 1, config.layers_per_block + 1
        inputs = [channels[min(i + 1, coarsest)]] + [channels[i]] * (count - 1)
        skips = [channels[i]] * (count - 1) + [channels[max(i - 1, 0)]]
        self.remat = remat
        self.resnets = nnx.List([_resnet(config, n + m, channels[i], layers) for n, m in zip(inputs, skips)])
        self.attentions = nnx.List([_transformer(config, i, layers) for _ in inputs] if kind in CROSS else [])
        self.upsampler = layers.conv(channels[i], channels[i]) if i else None

    def __call__(self, h: Images, skips: list[Resized], time: Time, context: Context) -> Resized:
        """`skips` is consumed from its end."""
        for resnet, transformer in zip_longest(self.resnets, self.attentions):
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = _layer(resnet, transformer, self.remat, h, time, context)
        if self.upsampler is not None:
            h = self.upsampler(upsample(h, *skips[-1].shape[1:3]))
        return h


class UNet(nnx.Module):
    """`unet(x [b, h, w, c], timesteps [b], context [b, n, e]) -> [b, h, w, out]`, in the type of `x`.

    Rombach et al. 2022, as diffusers' `UNet2DConditionModel`. Heights and widths may be any; multiples of
    `2 ** (len(config.block_out_channels) - 1)` lose no pixels when they are halved.

    Args:
        config: the architecture.
        dtype: type of the computation, for example `jnp.bfloat16` (default: the parameters' type). The time embedding, norms and
            softmaxes stay in float32.
        param_dtype: type of the parameters.
        remat: recompute every layer in the backward pass, which then stores one image per layer.
        attention: the function that computes attention; see `Layers`.
        rngs: random keys of the initial parameters.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        attention: AttentionFn = jax.nn.dot_product_attention,
        rngs: nnx.Rngs,
    ):
        layers = Layers(rngs, dtype, param_dtype, attention)
        channels = config.block_out_channels
        resolutions = range(len(channels))
        self.config, self.dtype = config, dtype
        self.time_embedding = TimestepEmbedding(channels[0], 4 * channels[0], layers)
        self.conv_in = layers.conv(config.in_channels, channels[0])
        self.down_blocks = nnx.List([DownBlock(config, i, layers, remat) for i in resolutions])
        self.mid_block = MidBlock(config, layers, remat)
        kinds = zip(config.up_block_types, reversed(resolutions))
        self.up_blocks = nnx.List([UpBlock(config, kind, i, layers, remat) for kind, i in kinds])
        self.conv_norm_out = layers.group_norm(channels[0], config.norm_num_groups, config.norm_eps)
        self.conv_out = layers.conv(channels[0], config.out_channels)

    def __call__(self, x: Images, timesteps: Float[Array, " b"], context: Context) -> Float[Array, "b h w out"]:
        config = self.config
        exact = timesteps.astype(jnp.promote_types(timesteps.dtype, jnp.float32))
        time = self.time_embedding(
            timestep_features(exact, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        )
        h = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            h, more = block(h, time, context)
            skips += more
        h = self.mid_block(h, time, context)
        for block in self.up_blocks:
            h = block(h, skips, time, context)
        return self.conv_out(nnx.silu(self.conv_norm_out(h))).astype(x.dtype)
