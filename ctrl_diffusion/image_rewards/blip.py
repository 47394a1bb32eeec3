"""BLIP as in ImageReward: a vision transformer, and a BERT that reads the text and attends to the image."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ..pretrained.attention import AttentionFn
from ..pretrained.clip import PatchEmbeddings
from ..pretrained.clip_config import BOOKKEEPING, VisionConfig
from ..pretrained.config import Fixed
from ..pretrained.layers import Layers, Sequence, erf_gelu, recomputed
from ..pretrained.transformer import Attention, TransformerEncoder
from .linear import LinearLayers
from .pixels import Images


@dataclasses.dataclass(frozen=True)
class BERTConfig:
    """BERT with cross-attention, in the names of BLIP's `med_config.json`; the defaults are ImageReward's."""

    vocab_size: int = 30524
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12

    absent: ClassVar[Mapping[str, Any]] = {}
    fixed: ClassVar[Fixed] = {
        "model_type": ("bert",),
        "hidden_act": ("gelu",),
        "pad_token_id": (0,),
        "position_embedding_type": ("absolute",),
    }
    ignored: ClassVar[tuple[str, ...]] = (
        *BOOKKEEPING,
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "type_vocab_size"),
        "encoder_width",  # is overwritten by the width of the vision transformer
    )

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}.")


@dataclasses.dataclass(frozen=True)
class BLIPConfig:
    """Both parts; the defaults are ImageReward's: ViT-L/16 with erf GELU and a BERT of the base size, 446 million parameters."""

    vision: VisionConfig = VisionConfig(patch_size=16, hidden_act="gelu", layer_norm_eps=1e-6)
    text: BERTConfig = BERTConfig()


IMAGE_REWARD = BLIPConfig()


class BLIPVision(nnx.Module):
    """`vision(pixels [b, size, size, 3]) -> [b, m, e]`: all vectors after the last layer and a norm."""

    def __init__(self, config: VisionConfig, layers: Layers, remat: bool):
        self.embeddings = PatchEmbeddings(config, layers, bias=True)
        self.encoder = TransformerEncoder(config, layers, remat, causal=False)
        self.post_layernorm = layers.layer_norm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, pixels: Images) -> Sequence:
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))


class BERTLayer(nnx.Module):
    """Self-attention, attention to the image, and an MLP. Each is added to its input, and a norm follows."""

    def __init__(self, config: BERTConfig, image: int, layers: Layers):
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.attention = Attention(width, width, heads, layers, bias=True)
        self.crossattention = Attention(width, image, heads, layers, bias=True)
        self.intermediate = layers.linear(width, config.intermediate_size)
        self.output = layers.linear(config.intermediate_size, width)
        self.attention_norm, self.crossattention_norm, self.output_norm = (layers.layer_norm(width, eps) for _ in range(3))

    def __call__(self, x: Sequence, seen: Bool[Array, "b n"], image: Float[Array, "b m e"]) -> Sequence:
        x = self.attention_norm(x + self.attention(x, x, seen))
        x = self.crossattention_norm(x + self.crossattention(x, image))
        return self.output_norm(x + self.output(erf_gelu(self.intermediate(x))))


class BERT(nnx.Module):
    """`bert(ids [b, n], image [b, m, e]) -> [b, n, d]`. Padding (id 0) is masked."""

    def __init__(self, config: BERTConfig, image: int, layers: Layers, remat: bool):
        embed = dict(dtype=layers.dtype, param_dtype=layers.param_dtype, rngs=layers.rngs)
        self.positions, self.remat = config.max_position_embeddings, remat
        self.word_embeddings = nnx.Embed(config.vocab_size, config.hidden_size, **embed)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, config.hidden_size, **embed)
        self.embeddings_norm = layers.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.layer = nnx.List([BERTLayer(config, image, layers) for _ in range(config.num_hidden_layers)])

    def __call__(self, ids: Int[Array, "b n"], image: Float[Array, "b m e"]) -> Sequence:
        if ids.shape[1] > self.positions:
            raise ValueError(
                f"ids has {ids.shape[1]} tokens a row, but BERT has {self.positions} positions: truncate the text."
            )
        x = self.embeddings_norm(self.word_embeddings(ids) + self.position_embeddings(jnp.arange(ids.shape[1])))
        for layer in self.layer:
            x = recomputed(layer, self.remat)(x, ids != 0, image)
        return x


class ImageRewardNetwork(nnx.Module):
    """`network(pixels, ids) -> [b]`: five linear layers on BERT's first vector.

    Args:
        config: the architecture.
        dtype, param_dtype, remat, attention, rngs: as for `CLIP`.
    """

    def __init__(
        self,
        config: BLIPConfig,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
        attention: AttentionFn = jax.nn.dot_product_attention,
        rngs: nnx.Rngs,
    ):
        layers = Layers(rngs, dtype, param_dtype, attention)
        self.config, self.out_dtype = config, param_dtype
        self.visual_encoder = BLIPVision(config.vision, layers, remat)
        self.text_encoder = BERT(config.text, config.vision.hidden_size, layers, remat)
        self.mlp = LinearLayers(config.text.hidden_size, layers._replace(dtype=None))

    def __call__(self, pixels: Images, ids: Int[Array, "b n"]) -> Float[Array, " b"]:
        features = self.text_encoder(ids, self.visual_encoder(pixels))
        return self.mlp(features[:, 0].astype(self.out_dtype))
