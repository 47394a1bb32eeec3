"""Reads LoRA as kohya's scripts and ComfyUI write it: one file of any name, with an alpha beside each layer's tensors.

| | tensors of a layer |
|---|---|
| kohya | `lora_unet_<layer with _ for .>.lora_down.weight`, `.lora_up.weight`, `.alpha` |
| ComfyUI | `diffusion_model.<layer>.lora_down.weight`, `.lora_up.weight`, `.alpha` |

Layers have the names of diffusers, or those of the original UNet (`input_blocks.1.1` for `down_blocks.0.attentions.0`).
"""

import re
from collections.abc import Iterable, Mapping

from ..pretrained.stored import Stored

TENSOR = re.compile(r"(.+)\.(lora_down\.weight|lora_up\.weight|alpha)")
TODAY = {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"}
INSIDE = (("conv_shortcut", "skip_connection"), ("time_emb_proj", "emb_layers.1"))  # of a ResNet block


def from_kohya(
    tensors: Mapping[str, Stored], layers: Iterable[str], layers_per_block: int
) -> tuple[dict[str, Stored], dict[str, float]]:
    """Tensors by the names of diffusers, and alphas by layer. Tensors of other names stay as they are.

    Args:
        tensors: the file's, by name.
        layers: the UNet's dense layers and 1x1 convolutions, in diffusers' names.
        layers_per_block: ResNet blocks of a resolution, which the original names count.

    Raises:
        ValueError: for LoRA of a text encoder, and of layers that the UNet does not have.
    """
    spelled = {other: layer for layer in layers for other in spellings(layer, layers_per_block)}
    renamed: dict[str, Stored] = {}
    alphas: dict[str, float] = {}
    for name, stored in tensors.items():
        found = TENSOR.fullmatch(name)
        if found is None:
            renamed[name] = stored
            continue
        module, kind = found.groups()
        if module.startswith(("lora_te", "text_encoder", "clip_")):
            raise ValueError(
                f"{stored.file}: tensor {stored.name!r} changes the text encoder, which is not trained here: export LoRA of the UNet "
                "alone."
            )
        if module not in spelled:
            raise ValueError(
                f"{stored.file}: tensor {stored.name!r} is for {module}, no dense layer or 1x1 convolution of the UNet."
            )
        if kind == "alpha":
            alphas[spelled[module]] = float(stored.read().reshape(()))
        else:
            renamed[f"{spelled[module]}.{TODAY[kind]}"] = stored
    return renamed, alphas


def spellings(layer: str, layers_per_block: int) -> set[str]:
    """The names of a layer in these files."""
    names = {layer, original(layer, layers_per_block)}
    return names | {f"lora_unet_{name.replace('.', '_')}" for name in names} | {f"diffusion_model.{name}" for name in names}


def original(layer: str, layers_per_block: int) -> str:
    """The name that a layer has in the original UNet: its blocks are counted in one row, and its parts by number."""
    if found := re.fullmatch(r"time_embedding\.linear_([12])", layer):
        return f"time_embed.{2 * (int(found[1]) - 1)}"
    found = re.fullmatch(r"(down|up|mid)_blocks?(?:\.(\d+))?\.(resnets|attentions)\.(\d+)\.(.+)", layer)
    if found is None:
        return layer
    side, part, inside = found[1], int(found[3] == "attentions"), found[5]
    block, number = int(found[2] or 0), int(found[4])
    for today, before in INSIDE:
        inside = re.sub(rf"^{today}\b", before, inside)
    if side == "mid":
        return f"middle_block.{1 if part else 2 * number}.{inside}"
    place = block * (layers_per_block + 1) + number + (side == "down")  # the first input block is the convolution
    return f"{'input' if side == 'down' else 'output'}_blocks.{place}.{part}.{inside}"
