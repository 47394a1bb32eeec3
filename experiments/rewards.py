"""Rewards to choose from the command line, for images `[b, h, w, c]` in [-1, 1]."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import ndimage

from ctrl_diffusion.rewards import Reward, black_box, differentiable

from .classifier import LogProbabilities


class Choice(NamedTuple):
    """A reward by name: how to make it, its default price (reward units per nat), whether it has a gradient, and what it is."""

    make: Callable[[LogProbabilities | None, int], Reward]
    kl_weight: float
    differentiable: bool
    description: str


def ink(x: Float[Array, "b *x"]) -> Float[Array, " b"]:
    """Ink: the number of fully inked pixels an image amounts to, `sum (x + 1)/2`."""
    return jnp.sum((x + 1) / 2, axis=tuple(range(1, x.ndim)))


def holes(x: np.ndarray) -> np.ndarray:
    """Holes: connected components of the background (x < 0, 4-neighbours, mean over channels) that do not touch the border."""
    background = x.mean(axis=-1) < 0
    framed = np.pad(background, ((0, 0), (1, 1), (1, 1)), constant_values=True)  # joins everything that touches the border
    within_image = np.zeros((3, 3, 3), bool)
    within_image[1] = ndimage.generate_binary_structure(2, 1)
    labels = np.empty(framed.shape, np.int32)
    ndimage.label(framed, structure=within_image, output=labels)
    return np.array([np.unique(image[image > 0]).size - 1 for image in labels], np.float32)


def compressed_bytes(x: np.ndarray) -> np.ndarray:
    """Compressibility: minus the bytes that zlib (level 9) needs for the image at 17 grey levels."""
    levels = np.round(8 * (np.clip(x, -1, 1) + 1)).astype(np.uint8)
    return -np.array([len(zlib.compress(image.tobytes(), 9)) for image in levels], np.float32)


def _digit(log_probabilities: LogProbabilities | None, digit: int) -> Reward:
    if log_probabilities is None:
        raise ValueError(
            'reward="digit" needs labelled data to train its classifier: choose ink, holes or bytes, or pass reward=...'
        )
    return differentiable(lambda x: log_probabilities(x)[:, digit], "digit")


REWARDS: dict[str, Choice] = {
    "digit": Choice(_digit, 1.0, True, "a frozen classifier's log-probability of one digit, nats"),
    "ink": Choice(lambda *_: differentiable(ink, "ink"), 1.5, True, "fully inked pixels, 0 to 64"),
    "holes": Choice(lambda *_: black_box(holes, "holes"), 0.25, False, "number of holes, by connected components"),
    "bytes": Choice(lambda *_: black_box(compressed_bytes, "bytes"), 1.5, False, "minus zlib bytes at 17 grey levels"),
}
