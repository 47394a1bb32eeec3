"""Loads reward models from their published files; nothing is fetched."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ..folders import StrPath
from ..pretrained.attention import AttentionFn
from ..pretrained.clip import CLIP, CLIPImages
from ..pretrained.clip_config import VIT_H_14, CLIPConfig, read_clip_config
from ..pretrained.clip_names import clip, openai_tensors
from ..pretrained.config import check_computing_type, read_config
from ..pretrained.layers import Layers
from ..pretrained.stored import by_todays_names
from ..pretrained.tokens import check_vocabulary, load_tokenizer, read_tokenizer
from ..pretrained.torch_files import read_torch_file
from ..pretrained.weights import Placement, filled, read_headers
from . import names
from .blip import IMAGE_REWARD, BERTConfig, BLIPConfig, ImageRewardNetwork
from .linear import LinearLayers
from .pixels import Preprocess, antialiased, half_down
from .scores import Aesthetic, ImageReward, TextAlignment

Network = TypeVar("Network", CLIP, CLIPImages)


class Loading(NamedTuple):
    """How networks are loaded."""

    dtype: Any = None
    """What is computed in; default: the parameters' type."""
    param_dtype: Any = jnp.float32
    remat: bool = False
    """Recompute the insides of every layer for the gradient."""
    attention: AttentionFn = jax.nn.dot_product_attention
    cast: bool = False
    """Convert files of another floating-point type to `param_dtype` instead of refusing them."""
    sharding: Placement | None = None
    """`sharding(name, shape)` says where a parameter is put; default: on the default device."""

    def make(self, cls: Any, config: Any) -> Callable[[nnx.Rngs], Any]:
        """How a network is made, for its shapes. `ValueError` if it would compute in float16."""
        check_computing_type(self.dtype, self.param_dtype)
        return functools.partial(
            _make, cls, config, dict(dtype=self.dtype, param_dtype=self.param_dtype, remat=self.remat, attention=self.attention)
        )


def _make(cls: Any, config: Any, options: dict[str, Any], rngs: nnx.Rngs) -> Any:
    return cls(config, **options, rngs=rngs)


FLOAT32 = Loading()


def load_clip(folder: StrPath, loading: Loading = FLOAT32) -> CLIP:
    """Load both towers from the folder of a `CLIPModel`: `config.json` and safetensors files."""
    return _load_clip(CLIP, Path(folder), loading)


def load_clip_images(folder: StrPath, loading: Loading = FLOAT32) -> CLIPImages:
    """Load the vision tower from the folder of a `CLIPModel`; the text tower is not read."""
    return _load_clip(CLIPImages, Path(folder), loading)


def _load_clip(cls: type[Network], folder: Path, loading: Loading) -> Network:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: it is not the folder of a CLIPModel.")
    config = read_clip_config(folder / "config.json")
    known = clip(config)
    found = read_headers(folder, "model", known)
    if cls is CLIPImages:
        found = {name: stored for name, stored in found.items() if not name.startswith(("text_", "logit_scale"))}
    where = str(folder / "model.safetensors")
    return filled(loading.make(cls, config), found, where, known, "config.json", cast=loading.cast, sharding=loading.sharding)


def load_clip_similarity(folder: StrPath, loading: Loading = FLOAT32) -> TextAlignment:
    """CLIP similarity, `cos(image, text)`, from the folder of a CLIP with its tokenizer, for example `openai/clip-vit-large-patch14`."""
    return _aligned(load_clip(folder, loading), folder)


def load_pickscore(folder: StrPath, tokenizer: StrPath | None = None, loading: Loading = FLOAT32) -> TextAlignment:
    """PickScore (Kirstain et al. 2023), `exp(logit_scale) cos(image, text)`, from the folder of `yuvalkirstain/PickScore_v1`.

    Args:
        tokenizer: the folder of a CLIP tokenizer (default: `folder`).
    """
    preprocess = Preprocess(margin=half_down)  # transformers' image processor
    return _aligned(load_clip(folder, loading), tokenizer or folder, preprocess, scaled=True)


def load_aesthetic(clip: StrPath, file: StrPath, loading: Loading = FLOAT32) -> Aesthetic:
    """LAION's aesthetic predictor (Schuhmann et al. 2022).

    Args:
        clip: the folder of `openai/clip-vit-large-patch14`; its text tower is not read.
        file: `sac+logos+ava1-l14-linearMSE.pth`.
    """
    network = load_clip_images(clip, loading)
    return Aesthetic(network, load_linear_layers(file, network.config.projection_dim, loading))


def load_linear_layers(file: StrPath, inputs: int, loading: Loading = FLOAT32) -> LinearLayers:
    """Load the layers of the aesthetic predictor, on `inputs` features. They are always computed in `param_dtype`."""

    def make(rngs: nnx.Rngs) -> LinearLayers:
        return LinearLayers(inputs, Layers(rngs, None, loading.param_dtype))

    found, what = read_torch_file(Path(file)), f"an aesthetic predictor of {inputs} features"
    return filled(make, found, str(file), names.AESTHETIC, what, cast=loading.cast, sharding=loading.sharding)


def load_hps(
    file: StrPath,
    tokenizer: StrPath,
    loading: Loading = FLOAT32,
    *,
    config: CLIPConfig = VIT_H_14,
    preprocess: Preprocess | None = None,
) -> TextAlignment:
    """HPSv2 and HPSv2.1 (Wu et al. 2023), `cos(image, text)`, from `HPS_v2_compressed.pt` or `HPS_v2.1_compressed.pt`.

    These files are float16: use `Loading(cast=True)`, or `Loading(jnp.float32, jnp.float16)` to keep the parameters as they are.

    Args:
        tokenizer: the folder of a CLIP tokenizer, for example that of a Stable Diffusion 1 folder.
        preprocess: from images to pixels (default: `HPS_PREPROCESS`).
    """
    known = clip(config)
    found = by_todays_names(openai_tensors(read_torch_file(Path(file), "state_dict")), known)
    make = loading.make(CLIP, config)
    network = filled(make, found, str(file), known, "CLIP ViT-H/14", cast=loading.cast, sharding=loading.sharding)
    return _aligned(network, tokenizer, preprocess or HPS_PREPROCESS)


def _aligned(network: CLIP, tokenizer: StrPath, *args: Any, **kwargs: Any) -> TextAlignment:
    """A network with the tokenizer of a folder, which must have the network's vocabulary."""
    return TextAlignment(network, load_tokenizer(tokenizer, network.config.text.vocab_size), *args, **kwargs)


HPS_PREPROCESS = Preprocess(resize=antialiased)
"""HPSv2 resizes floating-point images, with the antialiasing that torchvision has had by default since 0.17.

With an older torchvision it did not: `Preprocess(resize=interpolated)`.
"""


def load_image_reward(
    file: StrPath,
    tokenizer: StrPath,
    med_config: StrPath | None = None,
    loading: Loading = FLOAT32,
    *,
    config: BLIPConfig = IMAGE_REWARD,
) -> ImageReward:
    """ImageReward v1.0 (Xu et al. 2023) from `ImageReward.pt`.

    Args:
        tokenizer: a folder with the `vocab.txt` of bert-base-uncased.
        med_config: the file `med_config.json` that comes with it (default: its entries for version 1.0).
        config: another architecture; `med_config` replaces its text part.
    """
    if med_config is not None:
        config = dataclasses.replace(config, text=read_config(BERTConfig, Path(med_config)))
    known = names.image_reward(config.text.max_position_embeddings)
    found = by_todays_names(names.image_reward_tensors(read_torch_file(Path(file))), known)
    make, what = loading.make(ImageRewardNetwork, config), "ImageReward" if med_config is None else str(med_config)
    network = filled(make, found, str(file), known, what, cast=loading.cast, sharding=loading.sharding)
    return ImageReward(network, load_bert_tokenizer(tokenizer, config.text.vocab_size))


def load_bert_tokenizer(folder: StrPath, words: int | None = None) -> Any:
    """Load BERT's tokenizer and add BLIP's two tokens, [DEC] and [ENC], which are among its `words`; nothing is fetched."""
    from transformers import BertTokenizer  # takes seconds to import

    tokenizer = read_tokenizer(BertTokenizer, folder)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    if words is not None:
        check_vocabulary(tokenizer, words, folder)
    return tokenizer
