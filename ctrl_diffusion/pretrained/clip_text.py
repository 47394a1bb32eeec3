"""The text tower of CLIP."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .attention import AttentionFn
from .clip_config import CLIPTextConfig
from .layers import Layers, Sequence
from .transformer import TransformerEncoder


class TextFeatures(NamedTuple):
    """`last_hidden_state [b, n, e]`, which Stable Diffusion attends to, and `pooled [b, e]`, its row at the end of the text."""

    last_hidden_state: Sequence
    pooled: Float[Array, "b e"]


class Embeddings(nnx.Module):
    """The vector of the token plus the vector of its position."""

    def __init__(self, config: CLIPTextConfig, layers: Layers):
        embed = dict(dtype=layers.dtype, param_dtype=layers.param_dtype, rngs=layers.rngs)
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **embed)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, **embed)

    def __call__(self, ids: Int[Array, "b n"]) -> Sequence:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class CLIPText(nnx.Module):
    """`text_encoder(ids [b, n]) -> TextFeatures`, float32 features of token ids.

    Radford et al. 2021, as transformers' `CLIPTextModel`. Attention is causal and there is no mask: padding after the end of the
    text is encoded, too, and Stable Diffusion attends to it.

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
        config: CLIPTextConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        attention: AttentionFn = jax.nn.dot_product_attention,
        rngs: nnx.Rngs,
    ):
        layers = Layers(rngs, dtype, param_dtype, attention)
        self.config, self.dtype, self.out_dtype = config, dtype, param_dtype
        self.embeddings = Embeddings(config, layers)
        self.encoder = TransformerEncoder(config, layers, remat)
        self.final_layer_norm = layers.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, ids: Int[Array, "b n"]) -> TextFeatures:
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"ids has {ids.shape[1]} tokens a row, but the text encoder has {self.config.max_position_embeddings} positions: "
                "truncate the text."
            )
        features = self.final_layer_norm(self.encoder(self.embeddings(ids))).astype(self.out_dtype)
        return TextFeatures(features, features[jnp.arange(ids.shape[0]), self._end(ids)])

    def _end(self, ids: Int[Array, "b n"]) -> Int[Array, " b"]:
        """Position of the first end-of-text token."""
        old_file = self.config.eos_token_id == 2  # says 2 where the end of text is the last word of the vocabulary
        return jnp.argmax(ids if old_file else ids == self.config.eos_token_id, axis=-1)
