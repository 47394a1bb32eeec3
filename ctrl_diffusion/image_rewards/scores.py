"""What the networks' outputs are worth: `reward(images [b, h, w, 3] in [-1, 1], ids [b, n]) -> [b]`.

Rewards are pytrees: pass them to compiled functions as arguments, so that their parameters are not compiled in.

    score = jax.jit(lambda reward, images, ids: reward(images, ids))
"""

import abc
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from ..chunks import in_chunks
from ..pretrained.clip import CLIP, CLIPImages, unit
from ..pretrained.tokens import tokenize
from ..rewards import Reward, differentiable
from .blip import ImageRewardNetwork
from .linear import LinearLayers
from .pixels import Images, Preprocess, check_images


class AbstractImageReward(eqx.Module):
    """`reward(images, ids) -> [b]`, differentiable in the images."""

    @abc.abstractmethod
    def __call__(self, images: Images, ids: Int[Array, "b n"] | None = None) -> Float[Array, " b"]:
        """The score of each image, for the text in its row of `ids` if the reward reads texts.

        Args:
            images: in [-1, 1], of any size; clipped.
            ids: what `tokenize` says of the prompts.
        """

    @abc.abstractmethod
    def tokenize(self, prompts: Sequence[str], *, truncate: bool = False) -> Int32[np.ndarray, "b n"] | None:
        """What the reward reads of the prompts, `None` if nothing. Longer ones than it can read are refused, or cut off."""


class TextAlignment(AbstractImageReward):
    """`cos(image, text)` of a CLIP, times `exp(logit_scale)` if `scaled`: CLIP similarity, PickScore and HPSv2."""

    network: CLIP
    tokenizer: Any = eqx.field(static=True)
    preprocess: Preprocess = eqx.field(static=True, default=Preprocess())
    scaled: bool = eqx.field(static=True, default=False)

    def __call__(self, images: Images, ids: Int[Array, "b n"] | None = None) -> Float[Array, " b"]:
        check_images(images)
        cosine = self.network.cosine(self.preprocess(images), _needed(ids))
        return cosine * jnp.exp(self.network.logit_scale[...].astype(cosine.dtype)) if self.scaled else cosine

    def tokenize(self, prompts: Sequence[str], *, truncate: bool = False) -> Int32[np.ndarray, "b n"]:
        return tokenize(self.tokenizer, prompts, self.network.config.text.max_position_embeddings, truncate=truncate)


class Aesthetic(AbstractImageReward):
    """`mlp(image / |image|)` with the features of CLIP ViT-L/14: LAION's aesthetic predictor, from about 1 to 10.

    Its five layers have nothing in between, so that the score is linear in the normalised features. Reads no text.
    """

    network: CLIPImages | CLIP
    mlp: LinearLayers
    preprocess: Preprocess = eqx.field(static=True, default=Preprocess())

    def __call__(self, images: Images, ids: Int[Array, "b n"] | None = None) -> Float[Array, " b"]:
        check_images(images)
        return self.mlp(unit(self.network.image_features(self.preprocess(images))))

    def tokenize(self, prompts: Sequence[str], *, truncate: bool = False) -> None:
        return None


class ImageReward(AbstractImageReward):
    """`(network - mean) / std` with ImageReward's mean and standard deviation on its own data (Xu et al. 2023)."""

    network: ImageRewardNetwork
    tokenizer: Any = eqx.field(static=True)
    preprocess: Preprocess = eqx.field(static=True, default=Preprocess())
    mean: float = eqx.field(static=True, default=0.16717362830052426)
    std: float = eqx.field(static=True, default=1.0333394966054072)

    def __call__(self, images: Images, ids: Int[Array, "b n"] | None = None) -> Float[Array, " b"]:
        check_images(images)
        return (self.network(self.preprocess(images), _needed(ids)) - self.mean) / self.std

    def tokenize(self, prompts: Sequence[str], *, truncate: bool = False) -> Int32[np.ndarray, "b n"]:
        """35 tokens, as in training."""
        return tokenize(self.tokenizer, prompts, 35, truncate=truncate)


def _needed(ids: Int[Array, "b n"] | None) -> Int[Array, "b n"]:
    if ids is None:
        raise ValueError("ids=None: this reward reads the prompts: pass reward.tokenize(prompts).")
    return ids


class ForPrompts(eqx.Module):
    """A reward of images and token ids as one of images and numbers of prompts, `(images, prompt [b]) -> [b]`.

    Args:
        reward: of images and ids.
        ids: of all prompts, `[p, n]`; `None` for a reward that reads no text.
        chunk: images at a time, see `in_chunks`; `None`: all.
    """

    reward: AbstractImageReward
    ids: Int[Array, "p n"] | None
    chunk: int | None = eqx.field(static=True, default=None)

    def __call__(self, images: Images, prompt: Int[Array, " b"]) -> Float[Array, " b"]:
        score = self.reward if self.chunk is None else in_chunks(self.reward, self.chunk)
        return score(images, None if self.ids is None else self.ids[prompt])


def for_prompts(reward: AbstractImageReward, prompts: Sequence[str], name: str, *, chunk: int | None = None) -> Reward:
    """A `Reward` whose condition is the number of a prompt; the network's parameters are arguments of what is compiled.

    Args:
        prompts: all that there are; those longer than the reward can read are cut off.
        name: under which it is logged.
        chunk: images at a time, see `in_chunks`; default: all.
    """
    ids = reward.tokenize(prompts, truncate=True)
    scorer = ForPrompts(reward, None if ids is None else jnp.asarray(ids), chunk)
    return differentiable(scorer, name, conditional=True)
