"""Files of CLIP and of reward models: what is refused, and what older ones look like."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctrl_diffusion.image_rewards import (
    CLIP,
    VIT_L_14,
    load_clip,
    load_clip_images,
    load_hps,
    load_linear_layers,
    parse_clip_config,
)
from tests.image_reward_reference import clip, clip_folder, linear_layers, openai_names
from tests.stable_diffusion_reference import rewrite, torch


@pytest.fixture(scope="module")
def model():
    return clip()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip") / "model", model)


@pytest.fixture
def openai(model, folder, tmp_path):
    """Tensors in OpenAI's names, and a function that loads them."""
    config = load_clip(folder).config

    def load(tensors):
        torch.save({"state_dict": tensors}, tmp_path / "hps.pt")
        return load_hps(tmp_path / "hps.pt", folder, config=config)

    return openai_names(model), load


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("visual.ln_pre.bias"), "hps.pt: 1 tensors are missing: 'vision_model.pre_layrnorm.bias'"),
        (lambda t: t.update(extra=torch.ones(2)), "hps.pt: 1 tensors are not part of the network that .* describes: 'extra'"),
        (
            lambda t: t.update({"visual.proj": t["visual.proj"].T.contiguous()}),
            r"tensor 'visual.proj' is \[30, 20\], but .* describes a network where it is \[20, 30\]",
        ),
        (
            lambda t: t.update({"transformer.resblocks.0.attn.in_proj_bias": torch.ones(71)}),
            r"'transformer.resblocks.0.attn.in_proj_bias' is \[71\]: its first axis must be a multiple of 3",
        ),
        (
            lambda t: t.update({"text_model.final_layer_norm.bias": t["ln_final.bias"]}),
            "tensors 'text_model.final_layer_norm.bias' and 'ln_final.bias' are the same one",
        ),
        (lambda t: t.update(logit_scale=torch.tensor(3)), "tensor 'logit_scale' is of type I64, which is none of"),
    ],
    ids=["missing", "extra", "not transposed", "no thirds", "twice", "integer"],
)
def test_refused_tensors_of_openai(openai, change, message):
    tensors, load = openai
    change(tensors)
    with pytest.raises(ValueError, match=message):
        load(tensors)


def test_tensors_of_distributed_training(openai):
    tensors, load = openai
    load({f"module.{name}": x for name, x in tensors.items()})


def test_position_ids_in_folders_of_clip(model, tmp_path):
    """Which transformers wrote before version 4.31."""
    folder = clip_folder(tmp_path / "old", model)
    file = folder / "model.safetensors"
    ids = {
        "text_model.embeddings.position_ids": np.arange(77)[None],
        "vision_model.embeddings.position_ids": np.arange(10)[None],
    }
    rewrite(file, lambda tensors: tensors | ids)
    load_clip(folder), load_clip_images(folder)
    rewrite(file, lambda tensors: tensors | {"vision_model.embeddings.position_ids": np.arange(10)[None, ::-1].copy()})
    with pytest.raises(ValueError, match="'vision_model.embeddings.position_ids' is not the constant"):
        load_clip(folder)
    rewrite(file, lambda tensors: {name: x for name, x in tensors.items() if name not in (*ids, "visual_projection.weight")})
    with pytest.raises(ValueError, match="model.safetensors: 1 tensors are missing: 'visual_projection.weight'"):
        load_clip_images(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no config.json: it is not the folder of a CLIPModel"):
        load_clip(folder)


def test_refused_aesthetic_predictors(tmp_path):
    file = tmp_path / "mlp.pth"
    good = linear_layers(20).state_dict()
    for change, message in [
        (
            {"layers.5.weight": torch.ones(2)},
            "mlp.pth: 1 tensors are not part of the network that an aesthetic predictor of 20 fea",
        ),
        (
            {"layers.0.weight": torch.ones(1024, 768)},
            r"'layers.0.weight' is \[1024, 768\], but an aesthetic .* it is \[1024, 20\]",
        ),
    ]:
        torch.save({**good, **change}, file)
        with pytest.raises(ValueError, match=message):
            load_linear_layers(file, 20)
    del good["layers.7.bias"]
    torch.save(good, file)
    with pytest.raises(ValueError, match="mlp.pth: 1 tensors are missing: 'layers.7.bias'"):
        load_linear_layers(file, 20)


# The published description of openai/clip-vit-large-patch14, of whose entries about generation each tower has thirty more.
L14 = """{"_name_or_path": "clip-vit-large-patch14/", "architectures": ["CLIPModel"], "initializer_factor": 1.0,
  "logit_scale_init_value": 2.6592, "model_type": "clip", "projection_dim": 768, "torch_dtype": "float32",
  "text_config": {"_name_or_path": "", "add_cross_attention": false, "architectures": null, "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_beams": 1, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
    "top_k": 50, "use_bfloat16": false, "vocab_size": 49408},
  "text_config_dict": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "projection_dim": 768},
  "vision_config": {"attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024,
    "image_size": 224, "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096,
    "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 24,
    "patch_size": 14, "projection_dim": 768, "temperature": 1.0, "tie_word_embeddings": true},
  "vision_config_dict": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768}}"""


def test_the_description_of_vit_l_14():
    config = parse_clip_config(json.loads(L14))
    assert config == dataclasses.replace(VIT_L_14, text=dataclasses.replace(VIT_L_14.text, eos_token_id=2))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="siglip"), "config.json: model_type='siglip' is not supported: it must be 'clip'"),
        (dict(projection_dim="768"), "projection_dim='768' is not supported: it must be int"),
        (dict(text_config={"hidden_act": "relu"}), "text_config: hidden_act has 'relu', which is not supported"),
        (dict(vision_config={"num_channels": 4}, vision_config_dict=None), "vision_config: num_channels=4 is not supported"),
        (dict(vision_config={"patch_size": 16}), "vision_config has patch_size=16, but vision_config_dict has 14: remove one"),
        (dict(vision_config={"use_rope": True}, vision_config_dict=None), "vision_config: use_rope=True is not supported"),
        (
            dict(vision_config={"num_attention_heads": 7}, vision_config_dict=None),
            "vision_config: num_attention_heads=7 must divide hidden_size=768",
        ),
    ],
)
def test_refused_descriptions(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads(L14) | change))
    with pytest.raises(ValueError, match=message):
        load_clip(tmp_path)


def test_random_parameters():
    """Networks can also be made, and trained, here."""
    tiny = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = dataclasses.replace(VIT_L_14.text, vocab_size=9, **tiny)
    vision = dataclasses.replace(VIT_L_14.vision, image_size=8, patch_size=4, **tiny)
    config = dataclasses.replace(VIT_L_14, text=text, vision=vision, projection_dim=5)
    make = jax.jit(lambda key: nnx.state(CLIP(config, rngs=nnx.Rngs(key))))
    first, again, other = (jax.tree.leaves(make(jax.random.key(seed))) for seed in (0, 0, 1))
    assert all(map(jnp.array_equal, first, again)) and not all(map(jnp.array_equal, first, other))
