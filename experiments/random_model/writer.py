"""Draws the weights of a Stable Diffusion, and writes them into the files of a real one."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ctrl_diffusion.stable_diffusion import (
    VAE,
    CLIPText,
    CLIPTextConfig,
    Noising,
    StableDiffusion,
    UNet,
    UNetConfig,
    VAEConfig,
    abstract_network,
    load_tokenizer,
    save_folder,
)

from .config import Config as Config

Network = TypeVar("Network", bound=nnx.Module)

UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
    cross_attention_dim=32,
    attention_head_dim=4,
)
VAE_CONFIG = VAEConfig(
    sample_size=32,
    block_out_channels=(16, 32, 32),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=8,
)
TEXT = CLIPTextConfig(vocab_size=0, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


class Size(NamedTuple):
    """Descriptions of the networks; what is written has the vocabulary of its tokenizer."""

    unet: UNetConfig
    vae: VAEConfig
    text: CLIPTextConfig


SIZES = {
    "tiny": Size(UNET, VAE_CONFIG, TEXT),
    "sd15": Size(UNetConfig(), VAEConfig(), CLIPTextConfig()),
}


def write_random_model(config: Config) -> None:
    """Write a random model, as diffusers' `StableDiffusionPipeline` reads it; never half-written."""
    numbers, size = np.random.default_rng(config.seed), SIZES[config.size]
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = _tokenizer(Path(temporary))
    words = len(tokenizer)
    text = dataclasses.replace(size.text, vocab_size=words, eos_token_id=words - 1)
    unet = _drawn(lambda rngs: UNet(size.unet, rngs=rngs), numbers)
    vae = _drawn(lambda rngs: VAE(size.vae, rngs=rngs), numbers)
    text_encoder = _drawn(lambda rngs: CLIPText(text, rngs=rngs), numbers)
    save_folder(StableDiffusion(unet, vae, text_encoder, tokenizer, Noising()), config.out)


def _drawn(make: Callable[[nnx.Rngs], Network], numbers: np.random.Generator) -> Network:
    """A network with normal kernels that keep the scale of their input, scales of one and biases of zero."""
    network = abstract_network(make)

    def draw(path, leaf):
        name = path[-1]
        if len(leaf.shape) == 1:
            return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
        return jnp.asarray(numbers.standard_normal(leaf.shape, np.float32) / math.prod(leaf.shape[:-1]) ** 0.5, leaf.dtype)

    flat = nnx.to_flat_state(nnx.state(network))
    nnx.update(network, nnx.from_flat_state([(path, leaf.replace(draw(path, leaf))) for path, leaf in flat]))
    return network


def _tokenizer(folder: Path):
    """CLIP's tokenizer with letters for words: 512 tokens and the two ends."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), BEGIN, END]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)
