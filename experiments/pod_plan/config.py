"""Settings of `experiments.pod_plan`."""

import dataclasses
from pathlib import Path
from typing import Literal

from ..names import AlgorithmName

Experiment = Literal["digits", "text_to_image"]
"""Of `experiments.pod_plan.cases.EXPERIMENTS`."""


@dataclasses.dataclass(frozen=True)
class ExperimentOptions:
    """Options of the experiment that is planned for; `None` is its own default."""

    algorithm: AlgorithmName | None = None
    """How to fine-tune, by the names of experiments.digits."""
    accumulation: int | None = None
    """Microbatches that an update is computed in."""
    rollouts: int | None = None
    """Parts that the paths of an iteration are sampled in (only text_to_image)."""
    times: int | None = None
    """Timesteps of every path that are trained on (only text_to_image)."""
    attention: Literal["xla", "cudnn"] | None = None
    """Implementation of attention (only text_to_image): cudnn for GPUs."""
    attention_chunk: int | None = None
    """Pixels that attend to all others at a time (only text_to_image)."""
    stratified: bool = False
    """Transitions stay on their chips: each group of consecutive ones is dealt out to the minibatches."""
    steps: int | None = None
    """Control intervals between noise and data."""
    minibatches: int | None = None
    """Updates per pass."""
    epochs: int | None = None
    """Passes over the paths of an iteration."""
    width: int | None = None
    """Features of the network."""
    depth: int | None = None
    """Blocks of the network."""
    precision: Literal["float32", "bfloat16"] | None = None
    """Precision of the network's matrix products (default: float32; text_to_image: bfloat16)."""


@dataclasses.dataclass(frozen=True)
class Config(ExperimentOptions):
    """What is planned for. Options without a default are the experiment's own."""

    topology: str = "v5e:4x4"
    """Generation and sides of the slice: v4, v5p (three sides), v5e, v6e (two sides), as v5e:16x16 or v5p:4x4x8; or GPUs, as h100:8."""
    experiment: Experiment = "digits"
    """Which experiment: digits, or text_to_image (LoRA of Stable Diffusion 1.5)."""
    out: Path | None = None
    """Folder for `metrics.json`, `table.md` and `pod_plan.png` (default: print only)."""
    slices: tuple[str, ...] | None = None
    """Slices for weak scaling, as v5e:2x2 v5e:4x4 (default: 4, 8, ..., 256 chips; 1, 2, 4, 8 GPUs; without a value: none)."""
    compiles: int = 6
    """Compile at most so many batches to find the largest one that fits (0: no search)."""
    batch: int | None = None
    """Paths per iteration, of all chips together."""
    fsdp: int = 1
    """Number of chips that share one copy of the parameters and of the optimiser's state."""
    effort: Literal["full", "low"] = "full"
    """low: XLA optimises less and does not recompute to save memory; Stable Diffusion then compiles for a TPU in minutes."""
