"""Rewards of images and prompts by name, for the command line."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffrax as dfx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import ctrl_diffusion as cd
from ctrl_diffusion import image_rewards, solvers

CAST = image_rewards.Loading(cast=True)  # HPSv2 is published in half precision
Load = Callable[[Path], image_rewards.AbstractImageReward]


class Choice(NamedTuple):
    """A reward by name: its default price (reward units per nat of path KL) and how it is made, from the folder of its files."""

    kl_weight: float
    description: str
    fn: Callable[..., Any] | None = None
    load: Load | None = None
    differentiable: bool = False


def brightness(images: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Mean of the pixels, -1 to 1: differentiable and without weights, to try out algorithms."""
    return jnp.mean(images, axis=(1, 2, 3))


REWARDS: dict[str, Choice] = {
    "jpeg_compressibility": Choice(
        0.01, "minus kilobytes of the JPEG of quality 95", image_rewards.jpeg_compressibility
    ),
    "jpeg_incompressibility": Choice(0.01, "kilobytes of the JPEG of quality 95", image_rewards.jpeg_incompressibility),
    "brightness": Choice(1e-3, "mean of the pixels, -1 to 1", brightness, differentiable=True),
    "aesthetic": Choice(
        1e-3, "LAION's aesthetic predictor, about 1 to 10",
        load=lambda folder: image_rewards.load_aesthetic(folder / "clip", folder / "aesthetic.pth"), differentiable=True,
    ),
    "clip": Choice(
        1e-4, "cosine of CLIP's embeddings of image and prompt", load=image_rewards.load_clip_similarity, differentiable=True
    ),
    "pickscore": Choice(1e-3, "PickScore, about 20", load=image_rewards.load_pickscore, differentiable=True),
    "hps": Choice(
        1e-5, "HPSv2, about 0.27", load=lambda folder: image_rewards.load_hps(folder / "hps.pt", folder, CAST), differentiable=True
    ),
    "imagereward": Choice(
        1e-3, "ImageReward, about 0",
        load=lambda folder: image_rewards.load_image_reward(folder / "ImageReward.pt", folder, folder / "med_config.json"),
        differentiable=True,
    ),
}  # fmt: skip

SOLVERS: dict[str, Callable[[], dfx.AbstractSolver]] = {
    "ExponentialEuler": solvers.ExponentialEuler,
    "DPMSolverPP2M": solvers.DPMSolverPP2M,
    "DPMSolverPP3M": solvers.DPMSolverPP3M,
    "UniPC": solvers.UniPC,
    "Heun": dfx.Heun,
}


def make_reward(names: Sequence[str], weights: Sequence[float], prompts: Sequence[str], folder: Path, chunk: int) -> cd.Reward:
    """The weighted sum of rewards by name; their condition is the number of a prompt.

    Args:
        names, weights: of the rewards; all weights are 1 if none is given.
        prompts: all that there are.
        folder: where the files of reward models lie, in a folder for each by its name.
        chunk: images that are judged together.
    """
    found = [_one(name, prompts, folder, chunk) for name in names]
    if len(found) == 1 and not weights:
        return found[0]
    return cd.weighted_sum(*zip(weights or [1.0] * len(found), found))


def _one(name: str, prompts: Sequence[str], folder: Path, chunk: int) -> cd.Reward:
    if ":" in name:
        return _own(name, prompts)
    choice = REWARDS[name]
    if choice.load is None:
        assert choice.fn is not None
        return cd.differentiable(choice.fn, name) if choice.differentiable else cd.pooled(choice.fn, chunk=chunk, name=name)
    if not (folder / name).is_dir():
        raise FileNotFoundError(f"reward={name!r} needs its files in {folder / name}: see docs/text_to_image.md.")
    return image_rewards.for_prompts(choice.load(folder / name), prompts, name, chunk=chunk)


def _own(name: str, prompts: Sequence[str]) -> cd.Reward:
    module, _, function = name.partition(":")
    try:
        fn = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward={name!r} cannot be imported ({error}): give module:function, importable from here."
        ) from error

    def judge(images: np.ndarray, prompt: np.ndarray) -> np.ndarray:
        return np.asarray(fn(images, [prompts[i] for i in prompt]))

    return cd.black_box(judge, function, conditional=True)
