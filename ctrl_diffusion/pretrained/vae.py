"""The autoencoder between images and latents."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .attention import AttentionFn
from .config import Fixed, check_counts, check_supported, groups_divide, one_per_block
from .layers import Images, Layers, Resized, recomputed
from .names import Names
from .resnet import PixelAttention, ResNetBlock, upsample

EPS = 1e-6  # of every norm
NAMES = Names(
    renamed=(
        (r"\b(attentions\.\d+)\.attention\b", r"\1"),
        (r"\bto_out\b", "to_out.0"),
        (r"\bdownsampler\b", "downsamplers.0.conv"),
        (r"\bupsampler\b", "upsamplers.0.conv"),
    ),
    older=(
        (r"\bquery\b", "to_q"),
        (r"\bkey\b", "to_k"),
        (r"\bvalue\b", "to_v"),
        (r"\bproj_attn\b", "to_out.0"),
    ),
)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """`AutoencoderKL`, in diffusers' names; the defaults are Stable Diffusion 1.5."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4

    absent: ClassVar[Mapping[str, Any]] = {
        "sample_size": 32,
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    }
    fixed: ClassVar[Fixed] = {
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu", "swish"),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    }
    ignored: ClassVar[tuple[str, ...]] = ("force_upcast",)  # the caller chooses the type that is computed in

    def __post_init__(self):
        check_counts(self)
        for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            one_per_block(self, name, getattr(self, name), len(self.block_out_channels))
            check_supported(name, set(getattr(self, name)), {block})
        groups_divide(self)


class Posterior(NamedTuple):
    """The law of the latents `[b, h, w, c]` given the image, a Gaussian with independent entries."""

    mean: Images
    logvar: Images


def _resnets(config: VAEConfig, inputs: int, outputs: int, count: int, layers: Layers) -> list[ResNetBlock]:
    widths = [inputs] + [outputs] * (count - 1)
    return [ResNetBlock(n, outputs, 0, config.norm_num_groups, EPS, layers) for n in widths]


class EncoderBlock(nnx.Module):
    """ResNet blocks, then a convolution to half the resolution: stride 2, padded by one pixel at the right and bottom only."""

    def __init__(self, config: VAEConfig, i: int, layers: Layers, remat: bool):
        channels, last = config.block_out_channels, i == len(config.block_out_channels) - 1
        self.remat = remat
        self.resnets = nnx.List(_resnets(config, channels[max(i - 1, 0)], channels[i], config.layers_per_block, layers))
        self.downsampler = None if last else layers.conv(channels[i], channels[i], stride=2, padding=(0, 1))

    def __call__(self, h: Images) -> Resized:
        for resnet in self.resnets:
            h = recomputed(resnet, self.remat)(h)
        return h if self.downsampler is None else self.downsampler(h)


class DecoderBlock(nnx.Module):
    """ResNet blocks at resolution `i` (0 is the finest), then upsampling to twice the resolution."""

    def __init__(self, config: VAEConfig, i: int, layers: Layers, remat: bool):
        channels, coarsest = config.block_out_channels, len(config.block_out_channels) - 1
        self.remat = remat
        self.resnets = nnx.List(
            _resnets(config, channels[min(i + 1, coarsest)], channels[i], config.layers_per_block + 1, layers)
        )
        self.upsampler = layers.conv(channels[i], channels[i]) if i else None

    def __call__(self, h: Images) -> Resized:
        for resnet in self.resnets:
            h = recomputed(resnet, self.remat)(h)
        return h if self.upsampler is None else self.upsampler(upsample(h, 2 * h.shape[1], 2 * h.shape[2]))


class VAEMidBlock(nnx.Module):
    """A ResNet block, self-attention and a ResNet block at the coarsest resolution."""

    def __init__(self, config: VAEConfig, layers: Layers, remat: bool):
        channels = config.block_out_channels[-1]
        self.remat = remat
        self.resnets = nnx.List(_resnets(config, channels, channels, 2, layers))
        self.attentions = nnx.List([PixelAttention(channels, config.norm_num_groups, layers)])

    def __call__(self, h: Images) -> Images:
        for block in (self.resnets[0], self.attentions[0], self.resnets[1]):
            h = recomputed(block, self.remat)(h)
        return h


class VAEEncoder(nnx.Module):
    """Images to the parameters of the posterior, before `quant_conv`."""

    def __init__(self, config: VAEConfig, layers: Layers, remat: bool):
        channels = config.block_out_channels
        self.conv_in = layers.conv(config.in_channels, channels[0])
        self.down_blocks = nnx.List([EncoderBlock(config, i, layers, remat) for i in range(len(channels))])
        self.mid_block = VAEMidBlock(config, layers, remat)
        self.conv_norm_out = layers.group_norm(channels[-1], config.norm_num_groups, EPS)
        self.conv_out = layers.conv(channels[-1], 2 * config.latent_channels)

    def __call__(self, x: Images) -> Resized:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = block(h)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(h))))


class VAEDecoder(nnx.Module):
    """Latents after `post_quant_conv` to images."""

    def __init__(self, config: VAEConfig, layers: Layers, remat: bool):
        channels = config.block_out_channels
        self.conv_in = layers.conv(config.latent_channels, channels[-1])
        self.mid_block = VAEMidBlock(config, layers, remat)
        self.up_blocks = nnx.List([DecoderBlock(config, i, layers, remat) for i in reversed(range(len(channels)))])
        self.conv_norm_out = layers.group_norm(channels[0], config.norm_num_groups, EPS)
        self.conv_out = layers.conv(channels[0], config.out_channels)

    def __call__(self, z: Images) -> Resized:
        h = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            h = block(h)
        return self.conv_out(nnx.silu(self.conv_norm_out(h)))


class VAE(nnx.Module):
    """The autoencoder between images `[b, H, W, 3]` in [-1, 1] and latents `[b, h, w, 4]`; for Stable Diffusion `h = H / 8`.

    Kingma and Welling 2014, Rombach et al. 2022, as diffusers' `AutoencoderKL`. `encode` and `decode` use the autoencoder's own
    units. The diffusion model's latents are `config.scaling_factor` times those.

    Args:
        config: the architecture.
        dtype: type of the computation (default: the parameters' type).
        param_dtype: type of the parameters.
        remat: recompute every block in the backward pass, to save memory.
        attention: the function that computes attention; see `Layers`.
        rngs: random keys of the initial parameters.
    """

    def __init__(
        self,
        config: VAEConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        attention: AttentionFn = jax.nn.dot_product_attention,
        rngs: nnx.Rngs,
    ):
        layers = Layers(rngs, dtype, param_dtype, attention)
        self.config, self.dtype = config, dtype
        self.encoder = VAEEncoder(config, layers, remat)
        self.quant_conv = layers.conv(2 * config.latent_channels, 2 * config.latent_channels, size=1)
        self.post_quant_conv = layers.conv(config.latent_channels, config.latent_channels, size=1)
        self.decoder = VAEDecoder(config, layers, remat)

    def encode(self, images: Images) -> Posterior:
        """The posterior of the latents. Its `logvar` is clipped to [-30, 20], as in the reference implementations."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(images)).astype(images.dtype), 2, axis=-1)
        return Posterior(mean, jnp.clip(logvar, -30, 20))

    def decode(self, z: Images) -> Resized:
        """Images in about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z)).astype(z.dtype)

    def to_latents(self, images: Images) -> Resized:
        """The diffusion model's latents of images, the scaled mean of the posterior."""
        return self.config.scaling_factor * self.encode(images).mean

    def to_images(self, latents: Images) -> Resized:
        """Images from the diffusion model's latents."""
        return self.decode(latents / self.config.scaling_factor)
