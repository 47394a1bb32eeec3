"""What `experiments.discretization` fills in and refuses before anything is written."""

import dataclasses
import math

from ..commandline import require_learning_rates
from ..solver_registry import as_choices
from .config import Config


def filled(value: int | None) -> int:
    """A setting that `resolve` has filled in."""
    assert value is not None
    return value


def resolve(config: Config) -> Config:
    """Fill in what depends on --full; refuse what cannot work, by name, before anything is written."""
    defaults = {"seeds": 5, "iterations": 90, "samples": 512} if config.full else {"seeds": 2, "iterations": 40, "samples": 256}
    config = dataclasses.replace(config, **{name: v for name, v in defaults.items() if getattr(config, name) is None})
    choices = as_choices((*config.solvers, config.train_solver))
    for name in ("solver", "steps", "eta"):
        found, among = getattr(config, f"train_{name}"), getattr(config, name if name == "steps" else f"{name}s")
        if found not in among:
            raise ValueError(f"train_{name}={found!r} is not evaluated: choose it among {among}, or add it there.")
    if not choices[config.train_solver].gaussian or not config.train_eta > 0:
        raise ValueError(
            f"train_solver={config.train_solver!r} at train_eta={config.train_eta:g} has no likelihood: fine-tune with "
            "ExponentialEuler, DDIM or Euler, at train_eta > 0."
        )
    if not 0 < config.kl_weight < math.inf:
        raise ValueError(
            f"kl_weight={config.kl_weight} must be positive and finite: the optimum is the reference times exp(reward / kl_weight)."
        )
    require_learning_rates(config)
    if not 0 <= config.digit <= 9:
        raise ValueError(f"digit={config.digit} must be from 0 to 9.")
    for name in ("seeds", "iterations", "pretrain_steps", "pretrain_batch", "width", "depth", "batch", "optimum_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1.")
    for name in ("samples", "reference_samples", "optimum_samples"):
        if getattr(config, name) < 8:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 8: standard errors need several samples.")
    if len(set(config.steps)) < 2:
        raise ValueError(f"steps={config.steps} must hold another number than train_steps, or nothing is compared.")
    return config
