"""Stable Diffusion 1.x and 2.x: networks, LoRA, and loaders for folders in the layout of diffusers.

    model = load_folder("stable-diffusion-v1-5", dtype=jnp.bfloat16)
    context = model.encode(["a photo of an astronaut riding a horse"])      # [b, 77, 768]
    epsilon = model.unet(latents, timesteps, context)                       # [b, h/8, w/8, 4]
    images = model.vae.to_images(latents)                                   # [b, h, w, 3] in [-1, 1]

Images and latents are `[b, h, w, c]`. Nothing here imports torch.
"""

from ..pretrained import (
    VAE as VAE,
    AttentionFn as AttentionFn,
    CLIPText as CLIPText,
    CLIPTextConfig as CLIPTextConfig,
    Layers as Layers,
    Posterior as Posterior,
    TextFeatures as TextFeatures,
    VAEConfig as VAEConfig,
    abstract_network as abstract_network,
    chunked_attention as chunked_attention,
    find_folder as find_folder,
    flash_attention as flash_attention,
    head_by_head as head_by_head,
    load_tokenizer as load_tokenizer,
    parse_config as parse_config,
    read_config as read_config,
    tokenize as tokenize,
)
from .config import UNetConfig as UNetConfig
from .control import (
    Decoder as Decoder,
    GuidedScore as GuidedScore,
    decoder as decoder,
    drawn_prompts as drawn_prompts,
    encode_prompts as encode_prompts,
)
from .folder import (
    StableDiffusion as StableDiffusion,
    load_folder as load_folder,
    load_network as load_network,
    save_folder as save_folder,
    save_network as save_network,
)
from .lora import (
    LoRA as LoRA,
    add_lora as add_lora,
    lora_parameters as lora_parameters,
    merge_lora as merge_lora,
    split_full as split_full,
    split_lora as split_lora,
)
from .lora_files import load_lora as load_lora, save_lora as save_lora
from .noising import Noising as Noising, parse_noising as parse_noising, read_noising as read_noising
from .unet import UNet as UNet
from .value import LatentValue as LatentValue
