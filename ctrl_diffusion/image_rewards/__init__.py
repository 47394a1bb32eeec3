"""Rewards of images, and of images and texts: CLIP similarity, LAION's aesthetic predictor, PickScore, HPSv2, ImageReward, JPEG size.

    reward = load_pickscore("PickScore_v1", loading=Loading(dtype=jnp.bfloat16))
    ids = reward.tokenize(["a photo of an astronaut riding a horse"])
    scores = jax.jit(lambda reward, images, ids: reward(images, ids))(reward, images, ids)  # [b]

Images are `[b, h, w, 3]` in [-1, 1]. Nothing here imports torch.
"""

from ..chunks import in_chunks as in_chunks
from ..pretrained import (
    CLIP as CLIP,
    VIT_H_14 as VIT_H_14,
    VIT_L_14 as VIT_L_14,
    CLIPConfig as CLIPConfig,
    CLIPImages as CLIPImages,
    VisionConfig as VisionConfig,
    parse_clip_config as parse_clip_config,
    read_clip_config as read_clip_config,
    read_torch_file as read_torch_file,
)
from .blip import BERTConfig as BERTConfig, BLIPConfig as BLIPConfig, ImageRewardNetwork as ImageRewardNetwork
from .jpeg import (
    jpeg_bytes as jpeg_bytes,
    jpeg_compressibility as jpeg_compressibility,
    jpeg_incompressibility as jpeg_incompressibility,
)
from .linear import LinearLayers as LinearLayers
from .loading import (
    HPS_PREPROCESS as HPS_PREPROCESS,
    Loading as Loading,
    load_aesthetic as load_aesthetic,
    load_bert_tokenizer as load_bert_tokenizer,
    load_clip as load_clip,
    load_clip_images as load_clip_images,
    load_clip_similarity as load_clip_similarity,
    load_hps as load_hps,
    load_image_reward as load_image_reward,
    load_linear_layers as load_linear_layers,
    load_pickscore as load_pickscore,
)
from .pixels import (
    Preprocess as Preprocess,
    antialiased as antialiased,
    half_down as half_down,
    half_even as half_even,
    interpolated as interpolated,
    pillow as pillow,
)
from .remote import RemoteScores as RemoteScores
from .scores import (
    AbstractImageReward as AbstractImageReward,
    Aesthetic as Aesthetic,
    ForPrompts as ForPrompts,
    ImageReward as ImageReward,
    TextAlignment as TextAlignment,
    for_prompts as for_prompts,
)
