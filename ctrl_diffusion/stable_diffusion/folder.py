"""Reads and writes Stable Diffusion in the layout of diffusers: `unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..folders import StrPath, replaced
from ..pretrained.attention import AttentionFn
from ..pretrained.clip_config import CLIPTextConfig
from ..pretrained.clip_text import CLIPText
from ..pretrained.hub import find_folder
from ..pretrained.network_folder import (
    KINDS as SHARED,
    Kind,
    read_description,
    read_network,
    write_json,
    write_network,
)
from ..pretrained.tokens import load_tokenizer, tokenize
from ..pretrained.vae import VAE
from ..pretrained.weights import Placement
from . import unet
from .config import UNetConfig
from .lora import lora_layers
from .noising import Noising, noising_values, read_noising
from .unet import UNet

Network = TypeVar("Network", UNet, VAE, CLIPText)
KINDS = {UNet: Kind(UNetConfig, "diffusion_pytorch_model", lambda config: unet.NAMES), **SHARED}


class StableDiffusion(NamedTuple):
    """All parts of a text-to-image model."""

    unet: UNet
    vae: VAE
    text_encoder: CLIPText
    tokenizer: Any
    noising: Noising

    def encode(self, prompts: Sequence[str], *, truncate: bool = False) -> Float[Array, "b n e"]:
        """The context that the UNet attends to, for each prompt; see `tokenize`."""
        return self.text_encoder(jnp.asarray(self.tokens(prompts, truncate=truncate))).last_hidden_state

    def tokens(self, prompts: Sequence[str], *, truncate: bool = False) -> np.ndarray:
        """Token ids `[b, n]` of the text encoder's length; see `tokenize`."""
        return tokenize(self.tokenizer, prompts, self.text_encoder.config.max_position_embeddings, truncate=truncate)


def load_network(
    cls: type[Network],
    folder: StrPath,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    attention: AttentionFn = jax.nn.dot_product_attention,
    cast: bool = False,
    sharding: Placement | None = None,
) -> Network:
    """Load a network from the folder of its `config.json` and safetensors files.

    Args:
        cls: `UNet`, `VAE` or `CLIPText`.
        folder: for example `stable-diffusion-v1-5/unet`.
        dtype: type of the computation (default: the parameters' type).
        param_dtype: type of the parameters. Files of another type are refused unless `cast`.
        remat, attention: see `cls`.
        cast: convert files of another floating-point type to `param_dtype`.
        sharding: `sharding(name, shape)` is the place of the parameter `name`, for example
            `down_blocks.0.resnets.0.conv1.kernel`; `None`: the default device.
    """
    options = dict(dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention, cast=cast, sharding=sharding)
    return read_network(cls, KINDS[cls], folder, **options)


def load_folder(
    folder: StrPath,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    attention: AttentionFn = jax.nn.dot_product_attention,
    cast: bool = False,
    sharding: Placement | None = None,
) -> StableDiffusion:
    """Load all parts of a model. Arguments are those of `load_network`; names that `sharding` gets begin with the subfolder.

    `folder` may also be a hub id, `owner/name`, of a model in the hub's cache on this disk.

    It reads the layout that diffusers writes today and that of the original repositories of Stable Diffusion 1.x. Other files of the
    folder (safety checker, feature extractor, pickled and half-precision variants) are ignored.
    """
    folder = find_folder(folder)
    for part in StableDiffusion._fields:
        if not (folder / SUBFOLDERS[part]).is_dir():
            raise FileNotFoundError(f"{folder} holds no {SUBFOLDERS[part]}/: it is not a folder of Stable Diffusion.")
    options = dict(dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention, cast=cast)

    def load(cls: Any, part: str) -> Any:
        def place(name, shape):
            return None if sharding is None else sharding(f"{part}.{name}", shape)

        return load_network(cls, folder / part, **options, sharding=place)

    words = check_parts(folder).vocab_size
    noising = read_noising(folder / "scheduler" / "scheduler_config.json")
    tokenizer = load_tokenizer(folder / "tokenizer", words)
    return StableDiffusion(load(UNet, "unet"), load(VAE, "vae"), load(CLIPText, "text_encoder"), tokenizer, noising)


def check_parts(folder: Path) -> CLIPTextConfig:
    """The description of the text encoder. `ValueError`, before weights are read, if the parts' descriptions do not go together."""
    unet, vae, text = (read_description(cls, KINDS[cls], folder / part) for cls, part in PARTS.items())
    pairs = (
        ("unet", "cross_attention_dim", unet.cross_attention_dim, "text_encoder", "hidden_size", text.hidden_size),
        ("unet", "in_channels", unet.in_channels, "vae", "latent_channels", vae.latent_channels),
        ("unet", "out_channels", unet.out_channels, "unet", "in_channels", unet.in_channels),
    )
    for part, entry, value, other, other_entry, other_value in pairs:
        if value != other_value:
            raise ValueError(
                f"{folder / part / 'config.json'}: {entry}={value}, but {other} has {other_entry}={other_value}: these parts are not of "
                "one text-to-image model (an inpainting model has more inputs, and is not supported)."
            )
    return text


PARTS = {UNet: "unet", VAE: "vae", CLIPText: "text_encoder"}
SUBFOLDERS = {part: part for part in StableDiffusion._fields} | {"noising": "scheduler"}


def save_network(network: UNet | VAE | CLIPText, folder: StrPath) -> None:
    """Write `config.json` and one safetensors file. `folder` is replaced as a whole and is never half-written."""
    with replaced(Path(folder)) as temporary:
        _write_network(network, temporary)


def save_folder(model: StableDiffusion, folder: StrPath) -> None:
    """Write all parts as diffusers' `StableDiffusionPipeline` reads them. `folder` is replaced as a whole and is never half-written."""
    with replaced(Path(folder)) as temporary:
        for part, network in (("unet", model.unet), ("vae", model.vae), ("text_encoder", model.text_encoder)):
            (temporary / part).mkdir()
            _write_network(network, temporary / part)
        model.tokenizer.save_pretrained(str(temporary / "tokenizer"))
        (temporary / "scheduler").mkdir()
        write_json(temporary / "scheduler" / "scheduler_config.json", noising_values(model.noising))
        write_json(temporary / "model_index.json", _index(model))


def _write_network(network: UNet | VAE | CLIPText, folder: Path) -> None:
    if isinstance(network, UNet) and lora_layers(network):
        raise ValueError("network has LoRA: merge_lora(network) folds it into what is written here, save_lora writes it alone.")
    write_network(network, KINDS[type(network)], folder)


def _index(model: StableDiffusion) -> dict[str, Any]:
    parts = {
        "scheduler": ["diffusers", model.noising.scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    none = {part: [None, None] for part in ("feature_extractor", "image_encoder", "safety_checker")}
    return {"_class_name": "StableDiffusionPipeline", **parts, **none, "requires_safety_checker": False}
