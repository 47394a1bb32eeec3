"""Reads and writes the folder of a network as transformers and diffusers do: `config.json` and safetensors files."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..folders import StrPath
from . import vae
from .attention import AttentionFn
from .clip_config import CLIPTextConfig
from .clip_names import clip_text
from .clip_text import CLIPText
from .config import check_computing_type, config_values, read_config
from .names import Names
from .vae import VAE, VAEConfig
from .weights import Placement, load_parameters, save_parameters

Network = TypeVar("Network", bound=nnx.Module)


class Kind(NamedTuple):
    """The description of a class of networks, the stem of its files, and the names in them."""

    config: Any
    stem: str
    names: Callable[[Any], Names]


KINDS: Mapping[type[nnx.Module], Kind] = {
    VAE: Kind(VAEConfig, "diffusion_pytorch_model", lambda config: vae.NAMES),
    CLIPText: Kind(CLIPTextConfig, "model", lambda config: clip_text(config.max_position_embeddings)),
}
"""Of the networks that several families have; a family adds its own."""


def read_description(cls: type[nnx.Module], kind: Kind, folder: StrPath) -> Any:
    """The description of a network, from the `config.json` of its folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not the folder of a {cls.__name__}.")
    return read_config(kind.config, path)


def read_network(
    cls: type[Network],
    kind: Kind,
    folder: StrPath,
    *,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    remat: bool = False,
    attention: AttentionFn = jax.nn.dot_product_attention,
    cast: bool = False,
    sharding: Placement | None = None,
) -> Network:
    """Read a network from the folder of its `config.json` and safetensors files.

    Args:
        cls: the class, called as `cls(config, dtype=..., param_dtype=..., remat=..., attention=..., rngs=...)`.
        kind: its description and names.
        folder: for example `stable-diffusion-v1-5/vae`.
        dtype: type of the computation (default: the parameters' type).
        param_dtype: type of the parameters. Files of another type are refused unless `cast`.
        remat, attention: see `cls`.
        cast: convert files of another floating-point type to `param_dtype`.
        sharding: `sharding(name, shape)` is the place of the parameter `name`, for example `encoder.conv_in.kernel`;
            `None`: the default device.
    """
    check_computing_type(dtype, param_dtype)
    folder, config = Path(folder), read_description(cls, kind, folder)
    build: Any = cls

    def make(rngs: nnx.Rngs) -> Network:
        return build(config, dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention, rngs=rngs)

    return load_parameters(make, folder, kind.stem, kind.names(config), cast=cast, sharding=sharding)


def write_network(network: Any, kind: Kind, folder: Path) -> None:
    """Write `config.json` and one safetensors file into an existing folder. `network.config` is the description."""
    write_json(folder / "config.json", config_values(network.config))
    save_parameters(network, folder / f"{kind.stem}.safetensors", kind.names(network.config))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` as diffusers and transformers do: indented by two blanks, in alphabetical order."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
