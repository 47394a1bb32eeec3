"""The rewards that the command lines know by name, each with its default KL weight: one row for each."""

import importlib
import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import ndimage

from ctrl_diffusion import image_rewards
from ctrl_diffusion.rewards import Reward, black_box, differentiable, pooled, weighted_sum

from .classifier import LogProbabilities

CAST = image_rewards.Loading(cast=True)  # HPSv2 is published in half precision


class RewardSettings(NamedTuple):
    """What a choice is made from; a choice takes what concerns it.

    Attributes:
        log_probabilities: of a frozen classifier of digits, where there are labels.
        digit: the digit asked for.
        prompts: all that there are; the condition of a reward is the number of one. `metadata`: the other fields of each.
        folder: where the files of reward models lie, in a folder for each by its name.
        chunk: images that are rewarded together.
    """

    log_probabilities: LogProbabilities | None = None
    digit: int = 0
    prompts: Sequence[str] = ()
    metadata: Sequence[Mapping[str, Any]] = ()
    folder: Path = Path("rewards")
    chunk: int = 8


class RewardChoice(NamedTuple):
    """A reward by name: how it is made, its default kl_weight (reward units per nat of path KL), what it is, whether it has a gradient."""

    make: Callable[[RewardSettings], Reward]
    kl_weight: float
    description: str
    differentiable: bool = False


# -- of digits [b, h, w, c] in [-1, 1] --------------------------------------------------------------------------------------


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


def _digit(s: RewardSettings) -> Reward:
    log_probabilities, digit = s.log_probabilities, s.digit
    if log_probabilities is None:
        raise ValueError(
            'reward="digit" needs labelled data to train its classifier: choose ink, holes or bytes, or pass reward=...'
        )
    return differentiable(lambda x: log_probabilities(x)[:, digit], "digit")


OF_DIGITS: dict[str, RewardChoice] = {
    "digit": RewardChoice(_digit, 1.0, "a frozen classifier's log-probability of one digit, nats", differentiable=True),
    "ink": RewardChoice(lambda s: differentiable(ink, "ink"), 1.5, "fully inked pixels, 0 to 64", differentiable=True),
    "holes": RewardChoice(lambda s: black_box(holes, "holes"), 0.25, "number of holes, by connected components"),
    "bytes": RewardChoice(lambda s: black_box(compressed_bytes, "bytes"), 1.5, "minus zlib bytes at 17 grey levels"),
}


# -- of images and prompts --------------------------------------------------------------------------------------------------


def brightness(images: Float[Array, "b h w c"]) -> Float[Array, " b"]:
    """Mean of the pixels, -1 to 1: differentiable and without weights, to try out algorithms."""
    return jnp.mean(images, axis=(1, 2, 3))


def _pooled(fn: Callable[[np.ndarray], np.ndarray], name: str) -> Callable[[RewardSettings], Reward]:
    return lambda s: pooled(fn, chunk=s.chunk, name=name)


def _loaded(name: str, load: Callable[[Path], image_rewards.AbstractImageReward]) -> Callable[[RewardSettings], Reward]:
    """A reward model, from the folder of its files."""

    def make(s: RewardSettings) -> Reward:
        if not (s.folder / name).is_dir():
            raise FileNotFoundError(f"reward={name!r} needs its files in {s.folder / name}: see docs/text_to_image.md.")
        return image_rewards.for_prompts(load(s.folder / name), s.prompts, name, chunk=s.chunk)

    return make


OF_IMAGES: dict[str, RewardChoice] = {
    "jpeg_compressibility": RewardChoice(
        _pooled(image_rewards.jpeg_compressibility, "jpeg_compressibility"), 0.01, "minus kilobytes of the JPEG of quality 95"
    ),
    "jpeg_incompressibility": RewardChoice(
        _pooled(image_rewards.jpeg_incompressibility, "jpeg_incompressibility"), 0.01, "kilobytes of the JPEG of quality 95"
    ),
    "brightness": RewardChoice(
        lambda s: differentiable(brightness, "brightness"), 1e-3, "mean of the pixels, -1 to 1", differentiable=True
    ),
    "aesthetic": RewardChoice(
        _loaded("aesthetic", lambda folder: image_rewards.load_aesthetic(folder / "clip", folder / "aesthetic.pth")),
        1e-3, "LAION's aesthetic predictor, about 1 to 10", differentiable=True,
    ),
    "clip": RewardChoice(
        _loaded("clip", image_rewards.load_clip_similarity),
        1e-4, "cosine of CLIP's embeddings of image and prompt", differentiable=True,
    ),
    "pickscore": RewardChoice(_loaded("pickscore", image_rewards.load_pickscore), 1e-3, "PickScore, about 20", differentiable=True),
    "hps": RewardChoice(
        _loaded("hps", lambda folder: image_rewards.load_hps(folder / "hps.pt", folder, CAST)),
        1e-5, "HPSv2, about 0.27", differentiable=True,
    ),
    "imagereward": RewardChoice(
        _loaded(
            "imagereward",
            lambda folder: image_rewards.load_image_reward(folder / "ImageReward.pt", folder, folder / "med_config.json"),
        ),
        1e-3, "ImageReward, about 0", differentiable=True,
    ),
}  # fmt: skip


def make_reward(names: Sequence[str], weights: Sequence[float], settings: RewardSettings) -> Reward:
    """The weighted sum of rewards of images and prompts: by name, your own `module:function`, or an address; weights 1 by default."""
    found = [_own(name, settings) if ":" in name else OF_IMAGES[name].make(settings) for name in names]
    if len(found) == 1 and not weights:
        return found[0]
    return weighted_sum(*zip(weights or [1.0] * len(found), found))


def own_function(name: str) -> Any:
    """What `module:function` names, or the scores of the server at an address."""
    if name.startswith(("http://", "https://")):
        return image_rewards.RemoteScores(name)
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward={name!r} cannot be imported ({error}): give module:function, importable from here."
        ) from error


def _own(name: str, settings: RewardSettings) -> Reward:
    """A reward of one's own."""
    fn = own_function(name)
    if isinstance(fn, Reward):  # a differentiable one
        return fn
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes = [p for p in inspect.signature(fn).parameters.values() if p.kind in kinds]

    def score(images: np.ndarray, prompt: np.ndarray) -> Any:
        given = [[of[i] for i in prompt] for of in (settings.prompts, settings.metadata)]
        return fn(images, *given[: max(len(takes) - 1, 1)])

    return black_box(score, fn.__name__, conditional=True)
