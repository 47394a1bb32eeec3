"""What `experiments.text_to_image` refuses before anything is loaded or written; its prompts and its temperature."""

import hashlib
import json
from pathlib import Path

from ..algorithm_registry import check_options, choose
from ..commandline import require_at_least, require_known
from ..reward_registry import OF_IMAGES
from ..solver_registry import SOLVERS
from .config import Config

# the simple animals that compressibility and aesthetics have been fine-tuned on since DDPO (Black et al. 2024, section 6.1)
ANIMALS = (
    *("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion", "tiger"),
    *("bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale", "dolphin"),
    *("squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig", "turkey", "fly"),
    *("llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo"),
)


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
    if config.kl_weight is not None and not config.kl_weight >= 0:
        raise ValueError(f"kl_weight={config.kl_weight} must not be negative: it is the weight of the KL penalty.")
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


def read_prompts(config: Config) -> tuple[list[str], list[str]]:
    """Prompts to train on, and prompts held out; each once."""
    prompts = list(ANIMALS) if config.prompts is None else _lines(config.prompts, "prompts")
    if config.held_out_prompts is not None:
        held_out = _lines(config.held_out_prompts, "held_out_prompts")
        if both := [p for p in held_out if p in prompts]:
            raise ValueError(f"held_out_prompts={config.held_out_prompts}: {both[0]!r} is among those that are trained on.")
        return prompts, held_out
    if len(prompts) < 2:
        raise ValueError(f"prompts={config.prompts} has a single prompt, and none to hold out: pass held_out_prompts.")
    if len(prompts) < 5:
        return prompts[:-1], prompts[-1:]
    return [p for i, p in enumerate(prompts) if i % 5 != 4], prompts[4::5]


def _lines(path: Path, name: str) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{name}={path} is not a file: write one prompt per line.")
    found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{name}={path} has no prompts: write one per line.")
    return list(dict.fromkeys(found))


def digest_of_prompts(config: Config) -> str:
    """Tells two sets of prompts apart: a run is not resumed on other prompts than it began with."""
    return hashlib.sha256(json.dumps(read_prompts(config)).encode()).hexdigest()[:16]
