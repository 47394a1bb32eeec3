"""What the tensors of reward models are called in files, and how they lie there."""

import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

from ..stable_diffusion.names import Names
from ..stable_diffusion.weights import Stored
from .config import CLIPConfig

# OpenAI's names, which open_clip has kept, to those of transformers.
OPENAI = (
    (r"^module\.", ""),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
# In a module 0, 1, 2, 3, 4; in files dropouts stand in between. The last is renamed first.
LINEAR = (
    (r"\blayers\.4$", "layers.7"),
    (r"\blayers\.3$", "layers.6"),
    (r"\blayers\.2$", "layers.4"),
    (r"\blayers\.1$", "layers.2"),
)
AESTHETIC = Names(renamed=LINEAR)


def image_reward(positions: int) -> Names:
    """Names of ImageReward, whose BERT has so many positions."""
    return Names(
        renamed=(
            *((rf"^mlp\.{pattern}", f"mlp.{replacement}") for pattern, replacement in LINEAR),
            (r"^(visual_encoder\.encoder)\b(.*)\bto_([qkv])$", r"\1\2\3_proj"),
            (r"^(visual_encoder\.encoder)\b(.*)\bto_out$", r"\1\2out_proj"),
            (r"\bto_q$", "self.query"),
            (r"\bto_k$", "self.key"),
            (r"\bto_v$", "self.value"),
            (r"\bto_out$", "output.dense"),
            (r"^(text_encoder\.layer\.\d+)\.(intermediate|output)$", r"\1.\2.dense"),
            (r"attention_norm$", "attention.output.LayerNorm"),
            (r"\boutput_norm$", "output.LayerNorm"),
            (r"^text_encoder\.embeddings_norm$", "text_encoder.embeddings.LayerNorm"),
            (r"^text_encoder\.(word|position)_embeddings$", r"text_encoder.embeddings.\1_embeddings"),
            (r"^text_encoder\.layer\b", "text_encoder.encoder.layer"),
        ),
        older=(
            (r"^module\.", ""),
            (r"^blip\.", ""),
            (r"^visual_encoder\.cls_token$", "visual_encoder.embeddings.class_embedding"),
            (r"^visual_encoder\.pos_embed$", "visual_encoder.embeddings.position_embedding.weight"),
            (r"^visual_encoder\.patch_embed\.proj\.", "visual_encoder.embeddings.patch_embedding."),
            (r"^visual_encoder\.norm\.", "visual_encoder.post_layernorm."),
            (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"visual_encoder.encoder.layers.\1.self_attn.out_proj."),
            (r"^visual_encoder\.blocks\.(\d+)\.attn\.", r"visual_encoder.encoder.layers.\1.self_attn."),
            (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"visual_encoder.encoder.layers.\1.layer_norm\2."),
            (r"^visual_encoder\.blocks\.", "visual_encoder.encoder.layers."),
        ),
        constants=(("text_encoder.embeddings.position_ids", np.arange(positions)[None]),),
    )


# Of BLIP's pre-training: the contrastive and matching heads, the decoder, and the momentum copies. No part of the score.
UNUSED = re.compile(
    r"^(module\.)?blip\.((vision|text)_proj\.|(vision|text)_proj_m\.|(visual|text)_encoder_m\.|text_decoder\.|itm_head\."
    r"|image_queue$|text_queue$|queue_ptr$|ptr_queue$|temp$)"
)


def clip(config: CLIPConfig) -> Names:
    """Names of CLIP: those of transformers today, and OpenAI's."""
    positions = {"text_model": config.text.max_position_embeddings, "vision_model": config.vision.patches + 1}
    return Names(
        renamed=((r"\bto_([qkv])\b", r"\1_proj"), (r"\bto_out\b", "out_proj")),
        older=OPENAI,
        constants=tuple((f"{tower}.embeddings.position_ids", np.arange(n)[None]) for tower, n in positions.items()),
    )


def by_todays_names(found: Mapping[str, Stored], names: Names) -> dict[str, Stored]:
    """Tensors of a file by what they are called today."""
    renamed: dict[str, Stored] = {}
    for name, stored in found.items():
        today = names.today(name)
        if today in renamed:
            raise ValueError(f"{stored.file}: tensors {stored.name!r} and {renamed[today].name!r} are the same one.")
        renamed[today] = stored
    return renamed


def _viewed(stored: Stored, shape: tuple[int, ...], view: Callable[[np.ndarray], np.ndarray]) -> Stored:
    """A tensor that is a view of a stored one."""
    return stored._replace(shape=shape, read=lambda: view(stored.read()))


def transposed(stored: Stored) -> Stored:
    """A matrix with its axes exchanged."""
    return _viewed(stored, stored.shape[::-1], np.transpose)


def thirds(stored: Stored) -> tuple[Stored, Stored, Stored]:
    """Queries, keys and values, which lie in one tensor one after the other."""
    rows = stored.shape[0] // 3
    if stored.shape[0] % 3:
        raise ValueError(
            f"{stored.file}: tensor {stored.name!r} is {list(stored.shape)}: its first axis must be a multiple of 3."
        )

    def part(i: int) -> Stored:
        return _viewed(stored, (rows, *stored.shape[1:]), functools.partial(_rows, i * rows, (i + 1) * rows))

    return part(0), part(1), part(2)


def _rows(begin: int, end: int, array: np.ndarray) -> np.ndarray:
    return array[begin:end]


def openai_tensors(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """OpenAI's tensors in the shapes of transformers: projections transposed, queries, keys and values apart."""
    tensors: dict[str, Stored] = {}
    for name, stored in found.items():
        prefix, joint, kind = name.rpartition(".in_proj_")
        if joint and stored.shape:
            tensors |= {f"{prefix}.{which}_proj.{kind}": part for which, part in zip("qkv", thirds(stored))}
        elif name.removeprefix("module.") in ("visual.proj", "text_projection"):
            tensors[name] = transposed(stored)
        else:
            tensors[name] = stored
    return tensors


def image_reward_tensors(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """ImageReward's tensors apart: queries, keys and values; the vision tower's vectors without their axes of length one."""
    tensors: dict[str, Stored] = {}
    for name, stored in found.items():
        if UNUSED.match(name):
            continue
        prefix, joint, kind = name.rpartition(".qkv.")
        if joint and stored.shape:
            tensors |= {f"{prefix}.{which}_proj.{kind}": part for which, part in zip("qkv", thirds(stored))}
        elif name.endswith("visual_encoder.cls_token") and stored.shape[:2] == (1, 1):
            tensors[name] = _viewed(stored, stored.shape[2:], lambda array: array[0, 0])
        elif name.endswith("visual_encoder.pos_embed") and stored.shape[:1] == (1,):
            tensors[name] = _viewed(stored, stored.shape[1:], lambda array: array[0])
        else:
            tensors[name] = stored
    return tensors
