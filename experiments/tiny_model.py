"""A text-to-image model in miniature, in the real folder format: what `--model tiny-random` stands for.

Its weights are random, so its images mean nothing; everything else is as with a real model, through the same code.
"""

import json
import math
import tempfile
from pathlib import Path

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
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def write_tiny_model(folder: Path, seed: int = 0) -> None:
    """A random model of 8x8 latents and 32x32 images; `folder` is replaced as a whole, never half-written."""
    numbers = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = _tokenizer(Path(temporary))
    words = len(tokenizer)
    text = CLIPTextConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=words - 1,
    )
    networks = [
        _drawn(lambda rngs: UNet(UNET, rngs=rngs), numbers),
        _drawn(lambda rngs: VAE(VAE_CONFIG, rngs=rngs), numbers),
        _drawn(lambda rngs: CLIPText(text, rngs=rngs), numbers),
    ]
    save_folder(StableDiffusion(*networks, tokenizer, Noising()), folder)


def _drawn(make, numbers: np.random.Generator):
    """A network with normal kernels that keep the scale of their input, scales of one and biases of zero."""
    network = abstract_network(make)

    def draw(path, leaf):
        name = path[-1]
        if len(leaf.shape) == 1:
            return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
        return jnp.asarray(numbers.standard_normal(leaf.shape) / math.prod(leaf.shape[:-1]) ** 0.5, leaf.dtype)

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
