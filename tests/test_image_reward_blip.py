"""ImageReward: parity with BLIP in transformers, its file, its tokens."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctrl_diffusion.image_rewards import (
    BERTConfig,
    BLIPConfig,
    ImageRewardNetwork,
    Loading,
    VisionConfig,
    blip as blip_module,
    load_bert_tokenizer,
    load_image_reward,
)
from ctrl_diffusion.image_rewards.blip import IMAGE_REWARD
from ctrl_diffusion.pretrained import abstract_network, layers, parse_config, transformer
from tests.image_reward_reference import (
    bert_tokenizer,
    image_reward,
    image_reward_names,
    image_reward_scores,
)
from tests.pictures import in_range, photographs
from tests.stable_diffusion_reference import GATE, compiled, relative, torch

TINY = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
VISION = dict(hidden_size=30, intermediate_size=44, num_hidden_layers=2, num_attention_heads=5, image_size=24, patch_size=8)
CONFIG = BLIPConfig(
    dataclasses.replace(IMAGE_REWARD.vision, **VISION), BERTConfig(vocab_size=41, max_position_embeddings=37, **TINY)
)
PROMPTS = ["a cat", "", "the cats sat, and sat!", "the dog and the cat", "x y z", "sat " * 33]
IMAGES = jnp.asarray(in_range(photographs(0, 6, 40, 53)))


@pytest.fixture(scope="module")
def models():
    return image_reward()


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """`ImageReward.pt` and the folder of a tokenizer."""
    folder = tmp_path_factory.mktemp("reward")
    torch.save(image_reward_names(*models), folder / "ImageReward.pt")
    return folder / "ImageReward.pt", bert_tokenizer(folder / "tokenizer")


def load(files, loading=None, config=CONFIG, **options):
    reward = load_image_reward(*files, loading=loading or Loading(), config=config, **options)
    return dataclasses.replace(reward, preprocess=reward.preprocess._replace(size=24))


@pytest.fixture(scope="module")
def expected(models, files):
    reward = load(files)
    ids = reward.tokenize(PROMPTS)
    return ids, image_reward_scores(*models, np.asarray(reward.preprocess(IMAGES)), ids)


def test_parity(files, expected):
    ids, reference = expected
    got = compiled(lambda reward, images, ids: reward(images, ids))(load(files), IMAGES, ids)
    assert np.std(reference) > 0.05 and relative(got, reference) < GATE


def test_gradient(models, files, expected):
    """Of the pixels, by torch."""
    ids, _ = expected
    reward = load(files, Loading(remat=True))
    pixels = np.asarray(reward.preprocess(IMAGES))
    blip, mlp = models
    given = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).requires_grad_()
    image = blip.vision_model(given).last_hidden_state
    tokens = torch.from_numpy(ids.astype(np.int64))
    mask = dict(attention_mask=(tokens != 0).long(), encoder_attention_mask=torch.ones(image.shape[:-1]).long())
    text = blip.text_encoder(input_ids=tokens, encoder_hidden_states=image, return_dict=True, **mask).last_hidden_state
    (reference,) = torch.autograd.grad(mlp.layers(text[:, 0]).sum(), given)
    got = compiled(jax.grad(lambda pixels: jnp.sum(reward.network(pixels, jnp.asarray(ids)))))(jnp.asarray(pixels))
    assert relative(got, reference.numpy().transpose(0, 2, 3, 1)) < GATE


def test_size_of_image_reward():
    state = nnx.state(abstract_network(lambda rngs: ImageRewardNetwork(BLIPConfig(), rngs=rngs)))
    assert sum(x.size for x in jax.tree.leaves(state)) == 446_206_689


# --- the gate is sharp


def padding_is_seen(patch):
    correct = transformer.Attention.__call__
    patch.setattr(transformer.Attention, "__call__", lambda self, x, context, seen=None: correct(self, x, context))


def norms_before(patch):
    def call(self, x, seen, image):
        y = self.attention_norm(x)
        x = x + self.attention(y, y, seen)
        x = x + self.crossattention(self.crossattention_norm(x), image)
        return x + self.output(layers.erf_gelu(self.intermediate(self.output_norm(x))))

    patch.setattr(blip_module.BERTLayer, "__call__", call)


def tanh_gelu(patch):
    patch.setattr(blip_module, "erf_gelu", lambda x: jax.nn.gelu(x, approximate=True))


def no_norm_of_the_image(patch):
    patch.setattr(blip_module.BLIPVision, "__call__", lambda self, pixels: self.encoder(self.embeddings(pixels)))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [padding_is_seen, norms_before, tanh_gelu, no_norm_of_the_image], ids=lambda m: m.__name__)
def test_mistakes_go_past_the_gate(files, expected, mistake, monkeypatch):
    mistake(monkeypatch)
    ids, reference = expected
    assert relative(load(files)(IMAGES, jnp.asarray(ids)), reference) > GATE


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, layer_norm_eps=1e-5)),
        dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, hidden_act="quick_gelu")),
        dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_attention_heads=4)),
    ],
    ids=["eps", "quick_gelu", "heads"],
)
def test_mistakes_in_the_description_go_past_the_gate(files, expected, config):
    ids, reference = expected
    assert relative(load(files, config=config)(IMAGES, jnp.asarray(ids)), reference) > GATE


# --- tokens


def test_tokens_are_those_of_bert(files):
    reward = load(files)
    ids = reward.tokenize(["a cat", "cats", "[DEC] cat [ENC]"])
    assert ids.shape == (3, 35) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0, :5], [2, 5, 6, 3, 0])
    np.testing.assert_array_equal(ids[1, :5], [2, 6, 7, 3, 0])
    np.testing.assert_array_equal(ids[2, :6], [2, 39, 6, 40, 3, 0])  # the two that BLIP adds
    with pytest.raises(ValueError, match="has 42 tokens, over 35: shorten it or pass truncate=True"):
        reward.tokenize(["sat " * 40])
    assert reward.tokenize(["sat " * 40], truncate=True)[0, -1] == 3
    assert len(load_bert_tokenizer(files[1])) == 41
    with pytest.raises(ValueError, match="ids=None: this reward reads the prompts"):
        reward(IMAGES)
    with pytest.raises(ValueError, match="ids has 38 tokens a row, but BERT has 37 positions"):
        reward(IMAGES, jnp.zeros((6, 38), jnp.int32))


# --- the file

MED_CONFIG = """{"architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
  "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
  "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 12,
  "num_hidden_layers": 12, "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": 30524, "encoder_width": 768,
  "add_cross_attention": true}"""


def test_med_config(files, expected, tmp_path):
    assert parse_config(BERTConfig, json.loads(MED_CONFIG)) == BERTConfig() and BLIPConfig().vision != VisionConfig()
    ours = json.loads(MED_CONFIG) | TINY | dict(vocab_size=41, max_position_embeddings=37)
    (tmp_path / "med_config.json").write_text(json.dumps(ours))
    other = dataclasses.replace(CONFIG, text=BERTConfig())
    reward = load(files, config=other, med_config=tmp_path / "med_config.json")
    assert reward.network.config == CONFIG
    (tmp_path / "med_config.json").write_text(json.dumps(ours | dict(hidden_act="relu")))
    with pytest.raises(ValueError, match="med_config.json: hidden_act='relu' is not supported: it must be 'gelu'"):
        load(files, med_config=tmp_path / "med_config.json")


NAME = "blip.visual_encoder.blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda t: t.pop(NAME),
            r"ImageReward.pt: 3 tensors are missing: 'visual_encoder.encoder.layers.0.self_attn.k_proj.weight', .*q_proj",
        ),
        (lambda t: t.update({NAME: t[NAME][:-1]}), rf"'{NAME}' is \[89, 30\]: its first axis must be a multiple of 3"),
        (
            lambda t: t.update({"blip.visual_encoder.pos_embed": t["blip.visual_encoder.pos_embed"][:, 1:]}),
            r"'blip.visual_encoder.pos_embed' is \[9, 30\], but ImageReward describes a network where it is \[10, 30\]",
        ),
        (lambda t: t.update({"blip.extra": torch.ones(2)}), "1 tensors are not part of the network .*: 'blip.extra'"),
        (
            lambda t: t.update({"blip.text_encoder.embeddings.position_ids": torch.zeros(1, 37).long()}),
            "'blip.text_encoder.embeddings.position_ids' is not the constant",
        ),
    ],
    ids=["missing", "no thirds", "another size", "extra", "positions"],
)
def test_refused_tensors(models, files, tmp_path, change, message):
    tensors = image_reward_names(*models)
    change(tensors)
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=message):
        load((tmp_path / "ImageReward.pt", files[1]))


def test_parts_of_the_pre_training_are_passed_over(models, files, tmp_path):
    tensors = image_reward_names(*models)
    assert "blip.vision_proj.weight" in tensors and "blip.text_proj.bias" in tensors
    torch.save(tensors | {"blip.itm_head.weight": torch.ones(2, 24)}, tmp_path / "ImageReward.pt")
    load((tmp_path / "ImageReward.pt", files[1]))


def test_options_of_loading(files, expected):
    ids, reference = expected
    run = compiled(lambda reward, images, ids: reward(images, ids))
    half = run(load(files, Loading(dtype=jnp.bfloat16)), IMAGES, ids)
    assert half.dtype == jnp.float32 and 1e-4 < relative(half, reference) < 1
    seen = {}
    reward = load(files, Loading(sharding=lambda name, shape: seen.update({name: shape})))
    assert seen == {".".join(map(str, path)): x.shape for path, x in nnx.to_flat_state(nnx.state(reward.network))}
