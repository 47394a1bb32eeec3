"""Descriptions of CLIP, from transformers' `config.json` or for one of the two CLIPs of reward models."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .config import Fixed, check_counts, check_supported, parse_config, read_json

# What transformers of some age wrote into every description, of generation and bookkeeping: nothing that a tower computes with.
BOOKKEEPING = (
    *(
        "_name_or_path",
        "add_cross_attention",
        "architectures",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
    ),
    *("cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id"),
    *(
        "forced_eos_token_id",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
    ),
    *(
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
    ),
    *("output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type", "projection_dim", "pruned_heads"),
    *("remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id"),
    *("suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings"),
    *("tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16"),
)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """`CLIPTextModel`, in transformers' names; the defaults are Stable Diffusion 1.5.

    `eos_token_id=2`, as in old files, means the largest token, as it does for transformers.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    absent: ClassVar[Mapping[str, Any]] = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    fixed: ClassVar[Fixed] = {
        "model_type": ("clip_text_model",),
        "architectures": (("CLIPTextModel",), None),
        "attention_dropout": (0,),
        "dropout": (0,),
    }
    ignored: ClassVar[tuple[str, ...]] = (
        *("bos_token_id", "pad_token_id", "projection_dim"),  # the tokenizer adds tokens; CLIPTextModel has no projection
        *("initializer_factor", "initializer_range", "torch_dtype", "dtype", "transformers_version"),
    )

    def __post_init__(self):
        check_counts(self, besides=("vocab_size", "eos_token_id"))
        check_supported("hidden_act", {self.hidden_act}, {"quick_gelu", "gelu"})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}.")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer, in the names of transformers' `CLIPVisionModel`; the defaults are CLIP ViT-L/14."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    absent: ClassVar[Mapping[str, Any]] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
    }
    fixed: ClassVar[Fixed] = {
        "model_type": ("clip_vision_model",),
        "num_channels": (3,),
        "attention_dropout": (0,),
        "dropout": (0,),
    }
    ignored: ClassVar[tuple[str, ...]] = (*BOOKKEEPING, "bos_token_id", "eos_token_id", "pad_token_id")

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self):
        check_counts(self, besides=("vocab_size", "eos_token_id"))
        check_supported("hidden_act", {self.hidden_act}, {"quick_gelu", "gelu"})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}.")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers, and the length of the feature vectors; the defaults are CLIP ViT-L/14."""

    text: CLIPTextConfig = CLIPTextConfig()
    vision: VisionConfig = VisionConfig()
    projection_dim: int = 768


VIT_L_14 = CLIPConfig()
"""Of the aesthetic predictor, 427.6 million parameters."""

VIT_H_14 = CLIPConfig(
    CLIPTextConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu"),
    VisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16, hidden_act="gelu"),
    1024,
)
"""Of PickScore and HPSv2, 986.1 million parameters; heads of the vision tower are 80 wide."""


def read_clip_config(path: Path) -> CLIPConfig:
    """Read the description in the `config.json` of a `CLIPModel`. Errors name the file, the entry, its value and the supported values."""
    values = read_json(path)
    try:
        return parse_clip_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_clip_config(values: Mapping[str, Any]) -> CLIPConfig:
    """Read a description from a dictionary; see `read_clip_config`."""
    if values.get("model_type") != "clip":
        raise ValueError(f"model_type={values.get('model_type')!r} is not supported: it must be 'clip'.")
    dim = values.get("projection_dim", 512)
    if type(dim) is not int:
        raise ValueError(f"projection_dim={dim!r} is not supported: it must be int.")
    return CLIPConfig(_tower(values, "text_config", CLIPTextConfig), _tower(values, "vision_config", VisionConfig), dim)


def _tower(values: Mapping[str, Any], name: str, cls: Any) -> Any:
    """The description of one tower. Old files repeat entries in `<name>_dict`; they must agree."""
    tower, again = values.get(name) or {}, values.get(f"{name}_dict") or {}
    for entry, value in again.items():
        if entry not in BOOKKEEPING and tower.get(entry, value) != value:
            raise ValueError(f"{name} has {entry}={tower[entry]!r}, but {name}_dict has {value!r}: remove one of them.")
    entries = {entry: value for entry, value in {**again, **tower}.items() if entry not in BOOKKEEPING}
    try:
        return parse_config(cls, entries)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
