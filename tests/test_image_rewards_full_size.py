"""The vision towers of CLIP ViT-L/14 and of ImageReward at full size. They take 6 GB and minutes, and run when they are asked for:

CTRL_DIFFUSION_FULL_SIZE=1 python -m pytest tests/test_image_rewards_full_size.py
"""

import gc
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_diffusion.image_rewards import CLIPImages, load_clip_images, load_image_reward
from tests.image_reward_reference import (
    TEXT,
    bert_tokenizer,
    clip,
    image_reward,
    image_reward_names,
    image_reward_scores,
    processed,
)
from tests.pictures import photographs
from tests.stable_diffusion_reference import relative, saved, tensor, torch

pytestmark = pytest.mark.skipif(
    "CTRL_DIFFUSION_FULL_SIZE" not in os.environ, reason="6 GB and minutes: set CTRL_DIFFUSION_FULL_SIZE=1 to run it"
)
LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224)
PIXELS = processed(photographs(0, 3, 512, 512), 224)


def test_the_vision_tower_of_the_aesthetic_predictor(tmp_path, capsys):
    model = clip(text=TEXT, vision=LARGE | dict(patch_size=14))
    with torch.no_grad():
        expected = model.get_image_features(tensor(PIXELS.transpose(0, 3, 1, 2))).pooler_output
    folder = saved(model, tmp_path)
    del model
    gc.collect()
    error = relative(jax.jit(CLIPImages.image_features)(load_clip_images(folder), jnp.asarray(PIXELS)), expected)
    with capsys.disabled():
        print(f"\nfull-size CLIP ViT-L/14: max |difference| / std(reference) = {error:.3e}")
    assert error < 1e-5


def test_image_reward(tmp_path, capsys):
    text = dict(hidden_size=768, encoder_hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    text |= dict(vocab_size=30524, max_position_embeddings=512, bos_token_id=1, sep_token_id=3)
    blip, mlp = image_reward(text_config=text, vision_config=LARGE | dict(patch_size=16, layer_norm_eps=1e-6))
    torch.save(image_reward_names(blip, mlp), tmp_path / "ImageReward.pt")
    ids = np.zeros((3, 35), np.int32)
    ids[0, :9], ids[1, :2], ids[2] = [101, *range(2000, 2007), 102], [101, 102], np.arange(5000, 5035)
    expected = image_reward_scores(blip.double(), mlp.double(), PIXELS.astype(np.float64), ids)
    del blip, mlp
    gc.collect()
    reward = load_image_reward(tmp_path / "ImageReward.pt", bert_tokenizer(tmp_path / "tokenizer"))
    score = jax.jit(lambda network, pixels: (network(pixels, jnp.asarray(ids)) - reward.mean) / reward.std)
    errors = [relative(score(reward.network, jnp.asarray(PIXELS)), expected)]
    with jax.enable_x64(True):
        network = jax.tree.map(lambda v: v.astype(jnp.float64) if v.dtype == jnp.float32 else v, reward.network)
        errors.append(relative(score(network, jnp.asarray(PIXELS, jnp.float64)), expected))
    with capsys.disabled():
        print("\nfull-size ImageReward: max |difference| / std(reference) = {:.3e}, in float64 {:.3e}".format(*errors))
    # In float64 what is left are the mean and deviation of scores, which are float32. In float32 36 layers round, and the scores of three
    # pictures are close to each other: 0.2e-5 to 1.4e-5 by the order of sums, PyTorch's own included.
    assert errors[0] < 3e-5 and errors[1] < 1e-6
