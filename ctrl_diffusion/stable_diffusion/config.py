"""The description of the UNet in its `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ..pretrained.config import Fixed, check_counts, check_supported, groups_divide, one_per_block

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """`UNet2DConditionModel` of Stable Diffusion 1.x and 2.x, in diffusers' names; the defaults are Stable Diffusion 1.5.

    Despite its name, `attention_head_dim` is the *number* of heads (per block if a list), as in every such file.
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
    ignored: ClassVar[tuple[str, ...]] = (
        "addition_embed_type_num_heads",  # of an addition that is refused
        # what diffusers' EMAModel adds when it saves an average of parameters
        *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"),
    )

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads at each resolution, the finest first."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads

    def __post_init__(self):
        check_counts(self)
        blocks = len(self.block_out_channels)
        one_per_block(self, "down_block_types", self.down_block_types, blocks)
        one_per_block(self, "up_block_types", self.up_block_types, blocks)
        one_per_block(self, "attention_head_dim", self.heads, blocks)
        for name, index in (("down_block_types", 0), ("up_block_types", 1)):
            check_supported(name, set(getattr(self, name)), {CROSS[index], PLAIN[index]})
        for channels, heads in zip(self.block_out_channels, self.heads):
            if channels % heads:
                raise ValueError(f"attention_head_dim={heads} (the number of heads) must divide block_out_channels={channels}.")
        groups_divide(self)
