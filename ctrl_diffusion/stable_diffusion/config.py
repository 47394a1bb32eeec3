"""Descriptions of the networks, read from their `config.json`: whatever is not implemented is refused by name and value.

Each class has the entries that are free; `fixed` lists those that must have one of the given values (the first is what a file
without the entry means), and `ignored` those that change nothing here. An entry in none of the three is refused unless it is
null.
"""

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin

Config = TypeVar("Config")
Fixed = Mapping[str, tuple[Any, ...]]
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """`UNet2DConditionModel` of Stable Diffusion 1.x and 2.x, in diffusers' names; the defaults are Stable Diffusion 1.5.

    `attention_head_dim` is the *number* of heads (per block if a list), as it is in every such file, against its name.
    """

    sample_size: int | tuple[int, int] | None = 64
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool = False

    absent: ClassVar[Mapping[str, Any]] = {"sample_size": None, "cross_attention_dim": 1280}  # diffusers' defaults differ here
    fixed: ClassVar[Fixed] = {
        "_class_name": ("UNet2DConditionModel",),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "act_fn": ("silu", "swish"),
        "transformer_layers_per_block": (1,),
        "only_cross_attention": (False,),
        "dual_cross_attention": (False,),
        "center_input_sample": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "dropout": (0,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1,),
        "time_embedding_type": ("positional",),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "num_attention_heads": (None,),
    }
    ignored: ClassVar[tuple[str, ...]] = ("addition_embed_type_num_heads",)  # of an addition that is refused

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each resolution, finest first."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads

    def __post_init__(self):
        blocks = len(self.block_out_channels)
        _one_per_block(self, "down_block_types", self.down_block_types, blocks)
        _one_per_block(self, "up_block_types", self.up_block_types, blocks)
        _one_per_block(self, "attention_head_dim", self.heads, blocks)
        for name, index in (("down_block_types", 0), ("up_block_types", 1)):
            check_supported(name, set(getattr(self, name)), {CROSS[index], PLAIN[index]})
        for channels, heads in zip(self.block_out_channels, self.heads):
            if channels % heads:
                raise ValueError(f"attention_head_dim={heads} (the number of heads) must divide block_out_channels={channels}.")
        _groups_divide(self)


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
        for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            _one_per_block(self, name, getattr(self, name), len(self.block_out_channels))
            check_supported(name, set(getattr(self, name)), {block})
        _groups_divide(self)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """`CLIPTextModel`, in transformers' names; the defaults are Stable Diffusion 1.5.

    `eos_token_id=2` is what old files say and means "the largest token", as transformers does for them.
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
        check_supported("hidden_act", {self.hidden_act}, {"quick_gelu", "gelu"})
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}.")


def read_config(cls: type[Config], path: Path) -> Config:
    """The description in a `config.json`; errors name the file, the entry, its value and what is supported."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it must hold a JSON object.")
        return parse_config(cls, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The same from a dictionary."""
    description: Any = cls
    free = {field.name: field.type for field in dataclasses.fields(description)}
    fixed, arguments = description.fixed, dict(description.absent)
    for name, value in values.items():
        value = _tuples(value)
        if name in free:
            if not _fits(value, free[name]):
                raise ValueError(f"{name}={value!r} is not supported: it must be {_spell(free[name])}.")
            arguments[name] = float(value) if free[name] is float else value
        elif name in fixed:
            if value not in fixed[name]:
                raise ValueError(f"{name}={value!r} is not supported: it must be {_either(fixed[name])}.")
        elif value is not None and name not in description.ignored and not (name.startswith("_") and name != "_class_name"):
            raise ValueError(
                f"{name}={value!r} is not supported: this library does not know the entry. Set it to null or remove it if the "
                "network does not depend on it."
            )
    return cls(**arguments)


def config_values(config: UNetConfig | VAEConfig | CLIPTextConfig) -> dict[str, Any]:
    """What to write into a `config.json`: every free and every fixed entry."""
    return {name: values[0] for name, values in config.fixed.items()} | dataclasses.asdict(config)


def _one_per_block(config: Any, name: str, values: tuple, blocks: int) -> None:
    if len(values) != blocks:
        raise ValueError(f"{name}={values} must have one entry per entry of block_out_channels={config.block_out_channels}.")


def check_supported(name: str, values: set, supported: set) -> None:
    for value in sorted(values - supported):
        raise ValueError(f"{name} has {value!r}, which is not supported: it must be {_either(sorted(supported))}.")


def _groups_divide(config: UNetConfig | VAEConfig) -> None:
    for channels in config.block_out_channels:
        if channels % config.norm_num_groups:
            raise ValueError(f"norm_num_groups={config.norm_num_groups} must divide block_out_channels={channels}.")


def _either(values: Any) -> str:
    return " or ".join(map(repr, values))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _spell(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def _fits(value: Any, annotation: Any) -> bool:
    """Whether a value from a JSON file is of the annotated type; an int may stand for a float, a bool not for an int."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(annotation))
    if get_origin(annotation) is tuple:
        each = get_args(annotation)
        each = each[:1] * len(value) if isinstance(value, tuple) and each[-1] is Ellipsis else each
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
