"""Names and axes of CLIP's tensors in the files of transformers and of OpenAI."""

from collections.abc import Mapping

import numpy as np

from .clip_config import CLIPConfig
from .names import Names
from .stored import Stored, thirds, transposed

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


def clip_text(positions: int) -> Names:
    """Names of a text encoder with `positions` positions."""
    return Names(
        renamed=((r"\bto_([qkv])\b", r"\1_proj"), (r"\bto_out\b", "out_proj")),
        older=((r"^text_model\.", ""),),
        constants=(("embeddings.position_ids", np.arange(positions)[None]),),
    )


def clip(config: CLIPConfig) -> Names:
    """Names of CLIP in the files of transformers and of OpenAI."""
    positions = {"text_model": config.text.max_position_embeddings, "vision_model": config.vision.patches + 1}
    return Names(
        renamed=((r"\bto_([qkv])\b", r"\1_proj"), (r"\bto_out\b", "out_proj")),
        older=OPENAI,
        constants=tuple((f"{tower}.embeddings.position_ids", np.arange(n)[None]) for tower, n in positions.items()),
    )


def openai_tensors(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """OpenAI's tensors in the shapes of transformers: projections are transposed, queries, keys and values separated."""
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
