"""What `experiments.text_to_image` refuses before anything is loaded or written; its temperature."""

import math

from ..algorithm_registry import check_options, choose
from ..commandline import require_at_least, require_known, require_learning_rates
from ..reward_registry import OF_IMAGES
from ..solver_registry import SOLVERS
from .config import Config


def check(config: Config) -> None:
    """Refuse settings that cannot work, by name."""
    choose(config.algorithm)
    check_options(config.algorithm, config)
    if not config.reward:
        raise ValueError("reward is empty: give at least one.")
    require_known("reward", [name for name in config.reward if ":" not in name], OF_IMAGES)
    require_known("evaluation_solvers", config.evaluation_solvers, SOLVERS)
    if config.reward_weights and len(config.reward_weights) != len(config.reward):
        raise ValueError(f"reward_weights={config.reward_weights} must be one for each of reward={config.reward}.")
    if config.kl_weight is not None and not 0 <= config.kl_weight < math.inf:
        raise ValueError(
            f"kl_weight={config.kl_weight} must not be negative and must be finite: it is the weight of the KL penalty."
        )
    if config.kl_weight is None and ":" in config.reward[0] and choose(config.algorithm).penalised:
        raise ValueError("kl_weight=None: a reward of your own has no default; set it, in reward units per nat.")
    if not config.eta > 0:
        raise ValueError(
            f"eta={config.eta} must be positive: without noise a policy does not explore, and its path KL is infinite."
        )
    if choose(config.algorithm).needs_several and config.samples_per_prompt < 2:
        raise ValueError(
            f"samples_per_prompt={config.samples_per_prompt} must be at least 2 for {config.algorithm}: it compares the images of "
            "a prompt."
        )
    if config.attention == "cudnn" and config.precision != "bfloat16":
        raise ValueError(f"attention='cudnn' takes bfloat16, not precision={config.precision!r}: pass --precision bfloat16.")
    if config.evaluation_samples < 2:
        raise ValueError(f"evaluation_samples={config.evaluation_samples} must be at least 2: standard errors need several.")
    numbers = (
        "steps",
        "lora_rank",
        "batch",
        "samples_per_prompt",
        "decode_chunk",
        "evaluate_every",
        "checkpoint_every",
        "iterations",
    )
    require_learning_rates(config)
    require_at_least(1, attention_chunk=config.attention_chunk)
    require_at_least(1, **{name: getattr(config, name) for name in numbers})
    if config.batch % (config.samples_per_prompt * config.rollouts):
        raise ValueError(
            f"batch={config.batch} must be a multiple of samples_per_prompt={config.samples_per_prompt} and of rollouts={config.rollouts}."
        )


def kl_weight_of(config: Config) -> float:
    """The weight of the KL penalty, reward units per nat: that of the settings, or the default."""
    if config.kl_weight is not None:
        return config.kl_weight
    return OF_IMAGES[config.reward[0]].kl_weight if choose(config.algorithm).penalised else 0.0
