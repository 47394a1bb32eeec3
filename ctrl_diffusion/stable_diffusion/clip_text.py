"""The text encoder: CLIP's text transformer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from .blocks import Attention, AttentionFn, Layers, Sequence, erf_gelu, quick_gelu, recomputed
from .config import CLIPTextConfig

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": erf_gelu}
Config = Any  # `CLIPTextConfig`, or another description with the same entries: hidden_size, intermediate_size, hidden_act, ...


class TextFeatures(NamedTuple):
    """`last_hidden_state [b, n, e]` is what Stable Diffusion attends to; `pooled [b, e]` is its row at the end of the text."""

    last_hidden_state: Sequence
    pooled: Float[Array, "b e"]


class Embeddings(nnx.Module):
    """The token's vector plus the position's."""

    def __init__(self, config: CLIPTextConfig, layers: Layers):
        embed = dict(dtype=layers.dtype, param_dtype=layers.param_dtype, rngs=layers.rngs)
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, **embed)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, **embed)

    def __call__(self, ids: Int[Array, "b n"]) -> Sequence:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class MLP(nnx.Module):
    """`fc2(act(fc1(x)))`."""

    def __init__(self, config: Config, layers: Layers):
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = layers.linear(config.hidden_size, config.intermediate_size)
        self.fc2 = layers.linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Sequence) -> Sequence:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Self-attention and an MLP, each added to its input after a norm."""

    def __init__(self, config: Config, layers: Layers, causal: bool):
        width = config.hidden_size
        self.layer_norm1, self.layer_norm2 = (layers.layer_norm(width, config.layer_norm_eps) for _ in range(2))
        self.self_attn = Attention(width, width, config.num_attention_heads, layers, bias=True, causal=causal)
        self.mlp = MLP(config, layers)

    def __call__(self, x: Sequence) -> Sequence:
        y = self.layer_norm1(x)
        x = x + self.self_attn(y, y)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers; `causal`: position `n` sees those up to `n` alone."""

    def __init__(self, config: Config, layers: Layers, remat: bool, causal: bool = True):
        self.remat = remat
        self.layers = nnx.List([EncoderLayer(config, layers, causal) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Sequence) -> Sequence:
        for layer in self.layers:
            x = recomputed(layer, self.remat)(x)
        return x


class CLIPText(nnx.Module):
    """`text_encoder(ids [b, n]) -> TextFeatures`, float32 features of token ids.

    Radford et al. 2021, as transformers' `CLIPTextModel`. Attention is causal and nothing is masked: padding after the end of
    the text is encoded, too, and Stable Diffusion attends to it.

    Args:
        config: the architecture.
        dtype: what is computed in; default: the parameters' type.
        param_dtype: of the parameters.
        remat: recompute the insides of every layer for the gradient.
        attention: see `Layers`.
        rngs: random numbers for the initial parameters.
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
        self.encoder = Encoder(config, layers, remat)
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
