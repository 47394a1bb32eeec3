"""Attention with projections, and the transformer of the towers of CLIP and BLIP."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from .layers import Layers, Sequence, erf_gelu, quick_gelu, recomputed

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": erf_gelu}
Config = Any  # `CLIPTextConfig`, or another description with the same entries: hidden_size, intermediate_size, hidden_act, ...


class Attention(nnx.Module):
    """`out(concat over heads of softmax(q k^T / sqrt(d)) v)`, with queries from `x`, keys and values from `context`.

    Args:
        width: width of `x`, and of all heads together: a head has `d = width / heads`.
        context: width of the context.
        bias: whether the three input projections have a bias; the output projection always has one.
        causal: position `n` attends to the context up to `n` only.
        upcast: compute the heads in float32.
    """

    def __init__(
        self,
        width: int,
        context: int,
        heads: int,
        layers: Layers,
        *,
        bias: bool = False,
        causal: bool = False,
        upcast: bool = False,
    ):
        self.heads, self.causal, self.upcast, self.attention = heads, causal, upcast, layers.attention
        self.to_q = layers.linear(width, width, bias)
        self.to_k = layers.linear(context, width, bias)
        self.to_v = layers.linear(context, width, bias)
        self.to_out = layers.linear(width, width)

    def __call__(self, x: Sequence, context: Float[Array, "b m e"], seen: Bool[Array, "b m"] | None = None) -> Sequence:
        """`seen`: the positions of the context that are attended to (default: all)."""
        q, k, v = self._split(self.to_q(x)), self._split(self.to_k(context)), self._split(self.to_v(context))
        options = {} if seen is None else dict(mask=seen[:, None, None, :])
        heads = self.attention(q, k, v, is_causal=self.causal, **options)
        return self.to_out(heads.reshape(x.shape).astype(x.dtype))

    def _split(self, x: Sequence) -> Float[Array, "b n k d"]:
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32)) if self.upcast else x
        return x.reshape(*x.shape[:2], self.heads, -1)


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


class TransformerEncoder(nnx.Module):
    """The stack of layers. If `causal`, position `n` attends to positions up to `n` only."""

    def __init__(self, config: Config, layers: Layers, remat: bool, causal: bool = True):
        self.remat = remat
        self.layers = nnx.List([EncoderLayer(config, layers, causal) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Sequence) -> Sequence:
        for layer in self.layers:
            x = recomputed(layer, self.remat)(x)
        return x
