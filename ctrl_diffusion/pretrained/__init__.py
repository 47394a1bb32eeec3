"""Files of pretrained networks, and the networks and layers that several model families use.

`stable_diffusion` and `image_rewards` import from here and not from each other. Nothing here imports torch.

    found = read_headers(Path("clip"), "model", clip_names.clip(config))              # tensors by name, not read yet
    clip = filled(lambda rngs: CLIP(config, rngs=rngs), found, "clip", clip_names.clip(config), "config.json")
"""

from .attention import (
    AttentionFn as AttentionFn,
    chunked_attention as chunked_attention,
    flash_attention as flash_attention,
    head_by_head as head_by_head,
)
from .clip import CLIP as CLIP, CLIPImages as CLIPImages
from .clip_config import (
    VIT_H_14 as VIT_H_14,
    VIT_L_14 as VIT_L_14,
    CLIPConfig as CLIPConfig,
    CLIPTextConfig as CLIPTextConfig,
    VisionConfig as VisionConfig,
    parse_clip_config as parse_clip_config,
    read_clip_config as read_clip_config,
)
from .clip_text import CLIPText as CLIPText, TextFeatures as TextFeatures
from .config import parse_config as parse_config, read_config as read_config
from .hub import find_folder as find_folder
from .layers import Layers as Layers
from .names import Names as Names
from .network_folder import KINDS as KINDS, Kind as Kind, read_network as read_network, write_network as write_network
from .stored import Stored as Stored
from .tokens import load_tokenizer as load_tokenizer, tokenize as tokenize
from .torch_files import read_torch_file as read_torch_file
from .transformer import Attention as Attention, TransformerEncoder as TransformerEncoder
from .vae import VAE as VAE, Posterior as Posterior, VAEConfig as VAEConfig
from .weights import (
    Placement as Placement,
    abstract_network as abstract_network,
    filled as filled,
    load_parameters as load_parameters,
    read_headers as read_headers,
    save_parameters as save_parameters,
)
