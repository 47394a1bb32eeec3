"""Reward models in miniature, made by torch and transformers with every tensor moved at random."""

from pathlib import Path

import numpy as np

from tests.pictures import Image
from tests.stable_diffusion_reference import nhwc, perturbed, tensor, tokenizer, torch, transformers

TEXT = dict(
    vocab_size=516,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    bos_token_id=514,
    eos_token_id=515,
)
VISION = dict(hidden_size=30, intermediate_size=44, num_hidden_layers=2, num_attention_heads=5, image_size=24, patch_size=8)
CLIPS = {
    "ViT-L": {},
    "ViT-H": dict(text=dict(hidden_act="gelu", num_attention_heads=2), vision=dict(hidden_act="gelu", num_attention_heads=3)),
    "an old file": dict(text=dict(eos_token_id=2), vision=dict(image_size=28, layer_norm_eps=1e-4)),
}


def clip(text=None, vision=None):
    """A `CLIPModel`; its activations are as large as those of the real ones."""
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TEXT | (text or {}), vision_config=VISION | (vision or {}), projection_dim=20)
    )
    model = perturbed(model, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter *= 10 if "patch" in name else 3
            if name.endswith("class_embedding"):  # all images share it
                parameter *= 0.3
    return model


def clip_folder(folder: Path, model):
    """The folder of a model, a tokenizer in it."""
    tokenizer(folder)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def openai_names(model) -> dict:
    """The tensors of a `CLIPModel` as OpenAI and open_clip lay them."""
    found, tensors = dict(model.state_dict()), {}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        layers = len(getattr(model, tower).encoder.layers)
        for i in range(layers):
            old, new = f"{tower}.encoder.layers.{i}.", f"{prefix}transformer.resblocks.{i}."
            for kind in ("weight", "bias"):
                tensors[f"{new}attn.in_proj_{kind}"] = torch.cat([found.pop(f"{old}self_attn.{x}_proj.{kind}") for x in "qkv"])
                tensors[f"{new}attn.out_proj.{kind}"] = found.pop(f"{old}self_attn.out_proj.{kind}")
                for ours, theirs in (
                    ("layer_norm1", "ln_1"),
                    ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"),
                    ("mlp.fc2", "mlp.c_proj"),
                ):
                    tensors[f"{new}{theirs}.{kind}"] = found.pop(f"{old}{ours}.{kind}")
    for ours, theirs in (
        ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm.weight", "ln_final.weight"),
        ("text_model.final_layer_norm.bias", "ln_final.bias"),
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.pre_layrnorm.weight", "visual.ln_pre.weight"),
        ("vision_model.pre_layrnorm.bias", "visual.ln_pre.bias"),
        ("vision_model.post_layernorm.weight", "visual.ln_post.weight"),
        ("vision_model.post_layernorm.bias", "visual.ln_post.bias"),
        ("logit_scale", "logit_scale"),
    ):
        tensors[theirs] = found.pop(ours)
    tensors["visual.proj"] = found.pop("visual_projection.weight").T.contiguous()
    tensors["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    assert not found, found.keys()
    return tensors


def linear_layers(inputs: int, seed: int = 7):
    """Five layers with dropouts in between, as in the aesthetic predictor and in ImageReward."""
    nn = torch.nn
    modules = [
        nn.Linear(inputs, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
    ]
    model = nn.Module()
    model.layers = nn.Sequential(*modules, nn.Linear(64, 16), nn.Linear(16, 1))
    model = perturbed(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.ndim > 1 else 0.3
    return model


def processed(images: np.ndarray, size: int) -> np.ndarray:
    """By transformers' image processor of CLIP, through Pillow: `[b, size, size, 3]`."""
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return nhwc(processor([Image.fromarray(image) for image in images], return_tensors="np")["pixel_values"])


def scores(model, pixels: np.ndarray, ids: np.ndarray, scaled: bool) -> np.ndarray:
    """`cos(image, text)` of preprocessed images, times `exp(logit_scale)` if `scaled`."""
    with torch.no_grad():
        image = model.get_image_features(tensor(pixels.transpose(0, 3, 1, 2))).pooler_output
        text = model.get_text_features(tensor(ids.astype(np.int64))).pooler_output
        image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
        return ((image * text).sum(-1) * (model.logit_scale.exp() if scaled else 1)).numpy()


BLIP = dict(
    text_config=dict(
        vocab_size=41,
        hidden_size=24,
        encoder_hidden_size=30,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=37,
        bos_token_id=1,
        sep_token_id=3,
    ),
    vision_config=VISION | dict(layer_norm_eps=1e-6),
)


def image_reward(**changes):
    """BLIP, and the linear layers on it."""
    blip = perturbed(transformers.BlipForImageTextRetrieval(transformers.BlipConfig(**(BLIP | changes))), seed=9)
    with torch.no_grad():
        for name, parameter in blip.named_parameters():
            if parameter.ndim > 1:
                parameter *= 10 if "patch_embedding" in name else 3
            if "class_embedding" in name:
                parameter *= 0.1
    return blip, linear_layers(blip.config.text_config.hidden_size, seed=10).eval()


def image_reward_names(blip, mlp) -> dict:
    """Their tensors as they are in `ImageReward.pt`."""
    renamed = (
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
        ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
        ("vision_model.post_layernorm", "visual_encoder.norm"),
        ("vision_model.encoder.layers", "visual_encoder.blocks"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn.qkv", "attn.qkv"),
        ("layer_norm", "norm"),
    )
    tensors = {}
    for name, parameter in blip.state_dict().items():
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        if "itm_head" not in name:
            tensors[f"blip.{name}"] = parameter
    positions = blip.config.text_config.max_position_embeddings
    tensors["blip.text_encoder.embeddings.position_ids"] = torch.arange(positions)[None]
    return tensors | {f"mlp.{name}": parameter for name, parameter in mlp.state_dict().items()}


def image_reward_scores(blip, mlp, pixels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """As in ImageReward's own `score`, for preprocessed images."""
    with torch.no_grad():
        image = blip.vision_model(tensor(pixels.transpose(0, 3, 1, 2))).last_hidden_state
        output = blip.text_encoder(
            input_ids=tensor(ids.astype(np.int64)),
            attention_mask=tensor((ids != 0).astype(np.int64)),
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:-1], dtype=torch.long),
            return_dict=True,
        )
        return ((mlp.layers(output.last_hidden_state[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072).numpy()


def bert_tokenizer(folder: Path) -> Path:
    """A folder with a vocabulary of 39 words for BERT."""
    folder.mkdir(parents=True)
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "cat",
        "##s",
        "and",
        "the",
        "sat",
        *"bcdefghijklmnopqrstuvwxyz,.!",
    ]
    assert len(words) == 39
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder
