"""Names and axes of the tensors of the aesthetic predictor and of ImageReward in files."""

import re
from collections.abc import Mapping

import numpy as np

from ..pretrained.names import Names
from ..pretrained.stored import Stored, thirds, viewed

# In a module 0, 1, 2, 3, 4; in files dropouts stand in between. The last is renamed first.
LINEAR = (
    (r"\blayers\.4$", "layers.7"),
    (r"\blayers\.3$", "layers.6"),
    (r"\blayers\.2$", "layers.4"),
    (r"\blayers\.1$", "layers.2"),
)
AESTHETIC = Names(renamed=LINEAR)


def image_reward(positions: int) -> Names:
    """Names of ImageReward, whose BERT has `positions` positions."""
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


def image_reward_tensors(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """ImageReward's tensors with queries, keys and values separated, and the vision tower's vectors without axes of length one."""
    tensors: dict[str, Stored] = {}
    for name, stored in found.items():
        if UNUSED.match(name):
            continue
        prefix, joint, kind = name.rpartition(".qkv.")
        if joint and stored.shape:
            tensors |= {f"{prefix}.{which}_proj.{kind}": part for which, part in zip("qkv", thirds(stored))}
        elif name.endswith("visual_encoder.cls_token") and stored.shape[:2] == (1, 1):
            tensors[name] = viewed(stored, stored.shape[2:], lambda array: array[0, 0])
        elif name.endswith("visual_encoder.pos_embed") and stored.shape[:1] == (1,):
            tensors[name] = viewed(stored, stored.shape[1:], lambda array: array[0])
        else:
            tensors[name] = stored
    return tensors
