"""CLIP: a vision tower and a text tower that map to the same space."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .attention import AttentionFn
from .clip_config import CLIPConfig, VisionConfig
from .clip_text import CLIPText
from .layers import Layers, Sequence
from .transformer import TransformerEncoder

Images = Float[Array, "b h w 3"]


class PatchEmbeddings(nnx.Module):
    """A learned class vector and a linear map of every patch, plus the vectors of the positions."""

    def __init__(self, config: VisionConfig, layers: Layers, bias: bool):
        width, size = config.hidden_size, config.patch_size
        self.size = config.image_size
        self.class_embedding = nnx.Param(jax.random.normal(layers.rngs.params(), (width,), layers.param_dtype) * width**-0.5)
        self.patch_embedding = layers.conv(3, width, size, stride=size, padding=(0, 0), bias=bias)
        embed = dict(dtype=layers.dtype, param_dtype=layers.param_dtype, rngs=layers.rngs)
        self.position_embedding = nnx.Embed(config.patches + 1, width, **embed)

    def __call__(self, pixels: Images) -> Sequence:
        if pixels.shape[1:] != (self.size, self.size, 3):
            raise ValueError(
                f"pixels of shape {pixels.shape} must be [b, {self.size}, {self.size}, 3]: preprocess them to that size."
            )
        patches = self.patch_embedding(pixels)
        patches = patches.reshape(pixels.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(patches.dtype), (pixels.shape[0], 1, patches.shape[-1]))
        return jnp.concatenate([first, patches], axis=1) + self.position_embedding(jnp.arange(patches.shape[1] + 1))


class CLIPVision(nnx.Module):
    """`vision(pixels [b, size, size, 3]) -> [b, e]`: the class vector after the last layer and a norm.

    Radford et al. 2021, as transformers' `CLIPVisionModel`.
    """

    def __init__(self, config: VisionConfig, layers: Layers, remat: bool):
        self.out_dtype = layers.param_dtype
        self.embeddings = PatchEmbeddings(config, layers, bias=False)
        self.pre_layrnorm = layers.layer_norm(config.hidden_size, config.layer_norm_eps)  # the name in the files
        self.encoder = TransformerEncoder(config, layers, remat, causal=False)
        self.post_layernorm = layers.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: Images) -> Float[Array, "b e"]:
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(x[:, 0]).astype(self.out_dtype)


class CLIPImages(nnx.Module):
    """The vision tower with its projection, without the text tower: `features(pixels) -> [b, d]`."""

    def __init__(
        self,
        config: CLIPConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        attention: AttentionFn = jax.nn.dot_product_attention,
        rngs: nnx.Rngs,
    ):
        layers = Layers(rngs, dtype, param_dtype, attention)
        self.config = config
        self.vision_model = CLIPVision(config.vision, layers, remat)
        self.visual_projection = layers.linear(config.vision.hidden_size, config.projection_dim, bias=False)

    def image_features(self, pixels: Images) -> Float[Array, "b d"]:
        """Not normalised."""
        return self.visual_projection(self.vision_model(pixels))


class CLIP(nnx.Module):
    """Both towers; `cosine(pixels, ids) -> [b]` is the similarity of each image and the text of its row.

    Args:
        config: the architecture.
        dtype: type of the computation (default: the parameters' type).
        param_dtype: type of the parameters.
        remat: recompute every layer in the backward pass, to save memory.
        attention: the function that computes attention; see `Layers`.
        rngs: random keys of the initial parameters.
    """

    def __init__(
        self,
        config: CLIPConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        attention: AttentionFn = jax.nn.dot_product_attention,
        rngs: nnx.Rngs,
    ):
        layers = Layers(rngs, dtype, param_dtype, attention)
        options: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention, rngs=rngs)
        self.config = config
        self.text_model = CLIPText(config.text, **options)
        self.vision_model = CLIPVision(config.vision, layers, remat)
        self.text_projection = layers.linear(config.text.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = layers.linear(config.vision.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, param_dtype))  # the initial value of Radford et al.

    def image_features(self, pixels: Images) -> Float[Array, "b d"]:
        """Not normalised."""
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, ids: Int[Array, "b n"]) -> Float[Array, "b d"]:
        """Not normalised."""
        return self.text_projection(self.text_model(ids).pooled)

    def cosine(self, pixels: Images, ids: Int[Array, "b n"]) -> Float[Array, " b"]:
        """The cosine between the features of each image and of the text of its row."""
        return jnp.sum(unit(self.image_features(pixels)) * unit(self.text_features(ids)), axis=-1)


def unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Rows divided by their length, in float32 at least."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
