"""Rewards of images, from the outputs of networks: `reward(images [b, h, w, 3] in [-1, 1], ids [b, n]) -> [b]`.

Rewards are pytrees. Pass them to compiled functions as arguments; else their parameters become constants of the program.

    score = jax.jit(lambda reward, images, ids: reward(images, ids))
"""

import abc
import warnings
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
        """The score of each image; if the reward reads texts, for the text in the image's row of `ids`.

        Args:
            images: images of any size, clipped to [-1, 1].
            ids: token ids from `tokenize`.
        """

    @abc.abstractmethod
    def tokenize(self, prompts: Sequence[str], *, truncate: bool = False) -> Int32[np.ndarray, "b n"] | None:
        """Token ids of the prompts; `None` if the reward reads no text. Prompts that are too long are refused unless `truncate`."""


class TextAlignment(AbstractImageReward):
    """CLIP similarity, PickScore and HPSv2: `cos(image, text)` of a CLIP, times `exp(logit_scale)` if `scaled`."""

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
    """LAION's aesthetic predictor, about 1 to 10: `mlp(image / |image|)`, with the image features of CLIP ViT-L/14.

    Its five layers have no nonlinearities, so the score is linear in the normalised features. It reads no text.
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
    """A reward of images and prompts, `(images, prompt [b]) -> [b]`, from a reward of images and token ids. Prompts are given by number.

    Args:
        reward: a reward of images and token ids.
        ids: token ids of all prompts, `[p, n]`; `None` for a reward that reads no text.
        chunk: number of images at a time, see `in_chunks`; `None`: all.
    """

    reward: AbstractImageReward
    ids: Int[Array, "p n"] | None
    chunk: int | None = eqx.field(static=True, default=None)

    def __call__(self, images: Images, prompt: Int[Array, " b"]) -> Float[Array, " b"]:
        score = self.reward if self.chunk is None else in_chunks(self.reward, self.chunk)
        return score(images, None if self.ids is None else self.ids[prompt])


def for_prompts(reward: AbstractImageReward, prompts: Sequence[str], name: str, *, chunk: int | None = None) -> Reward:
    """A `Reward` whose condition is the number of a prompt. The network's parameters are arguments of compiled programs.

    Args:
        reward: a reward of images and token ids.
        prompts: all prompts; they are truncated to the length that the reward can read. A warning says of how many the end is lost.
        name: the name in logs.
        chunk: number of images at a time, see `in_chunks` (default: all).
    """
    ids, tokenizer = reward.tokenize(prompts, truncate=True), getattr(reward, "tokenizer", None)
    if ids is not None and tokenizer is not None:
        lengths = [len(row) for row in tokenizer(list(prompts))["input_ids"]]
        if longer := sum(length > ids.shape[1] for length in lengths):
            warnings.warn(
                f"reward {name!r} reads {ids.shape[1]} tokens: of {longer} of {len(prompts)} prompts it does not see the end "
                f"(the longest has {max(lengths)}).",
                stacklevel=2,
            )
    scorer = ForPrompts(reward, None if ids is None else jnp.asarray(ids), chunk)
    return differentiable(scorer, name, conditional=True)
