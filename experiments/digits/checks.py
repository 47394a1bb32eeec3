"""What `experiments.digits` refuses before anything is written, and what identifies a run."""

import dataclasses
import hashlib
import math
from typing import Any, NamedTuple

import numpy as np

from ctrl_diffusion.rewards import as_reward
from ctrl_diffusion.runs import source_digest

from .. import data as datasets
from ..algorithm_registry import choose
from ..commandline import require_learning_rates
from ..reward_registry import OF_DIGITS
from .config import ABOUT, EVALUATION, Config


def check(config: Config, reward, images: datasets.Images) -> float:
    """Refuse settings that cannot work, by name, before anything is written; returns kl_weight."""
    if reward is None and config.reward not in OF_DIGITS:
        raise ValueError(f"reward={config.reward!r} is not one of {', '.join(OF_DIGITS)}.")
    if reward is None and config.reward == "digit" and images.y is None:
        raise ValueError('reward="digit" needs labelled data: choose ink, holes or bytes, or pass reward=...')
    require_learning_rates(config)
    if not 0 <= config.digit <= 9:
        raise ValueError(f"digit={config.digit} must be from 0 to 9.")
    if config.kl_weight is not None and not 0 <= config.kl_weight < math.inf:
        raise ValueError(
            f"kl_weight={config.kl_weight} must not be negative and must be finite: it is the temperature, the weight of the KL penalty."
        )
    if config.kl_budget is not None and not config.kl_budget > 0:
        raise ValueError(f"kl_budget={config.kl_budget} must be positive: it is the path KL, in nats, that stops the run.")
    if config.kl_budget is not None and config.eta == 0 and config.exploration != "action":
        raise ValueError(f"kl_budget={config.kl_budget}: at eta=0 there is no path KL to limit without --exploration action.")
    for name in ("steps", "pretrain_steps", "pretrain_batch", "width", "depth", "batch", "evaluate_every", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    for name in ("exploration_strength", "exploration_substeps"):
        if config.exploration != "action" and getattr(config, name) is not None:
            raise ValueError(
                f"{name}={getattr(config, name)} belongs to action noise: pass --exploration action, or leave it out."
            )
    if config.reference_samples < 2 or config.evaluation_samples < 8:
        raise ValueError(
            "reference_samples and evaluation_samples must be at least 2 and 8: standard errors need several samples."
        )
    choice = choose(config.algorithm)
    if config.kl_weight is None:
        if not choice.penalised:
            return 0.0
        if reward is not None:
            raise ValueError("kl_weight=None: a reward of your own has no default; set it, in reward units per nat.")
        return OF_DIGITS[config.reward].kl_weight
    return config.kl_weight


class Described(NamedTuple):
    """Settings as JSON: those that identify a run, those that do not, and those of its evaluation."""

    identity: dict[str, Any]
    about: dict[str, Any]
    evaluation: dict[str, Any]


def described(config: Config, kl_weight: float, reward, data, network) -> Described:
    """The settings of a run. A reward of one's own is told from others by name and source."""
    found = {name: v for name, v in dataclasses.asdict(config).items() if name != "out"} | {"kl_weight": kl_weight}
    if reward is not None:
        found["reward"] = f"custom: {as_reward(reward).name}"
        found["reward_source"] = source_digest(reward)
    if data is not None:
        found["data"] = f"custom: {np.shape(data)}"
        found["data_digest"] = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()[:16]
    found["network"] = type(network).__name__
    found = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()}
    about, evaluation = ({name: found.pop(name) for name in names} for names in (ABOUT, EVALUATION))
    return Described(found, about, evaluation)
