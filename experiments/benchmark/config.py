"""Settings of the two benchmarks."""

import dataclasses
from pathlib import Path
from typing import Literal

from ..random_model.config import TINY


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of `experiments.benchmark`."""

    out: Path | None = None
    """Folder for `metrics.json` and `benchmark.png` (default: print only)."""
    batch: int = 64
    """Paths per rollout (that of `experiments.digits` is 512, which takes seconds on a CPU)."""
    steps: int = 24
    """Control intervals, those of `experiments.digits`."""
    minibatches: int = 8
    """Updates per pass, as in `experiments.digits`: one has batch * steps / minibatches transitions."""
    channels: tuple[int, ...] = (32, 64)
    """Channels of the U-Net, finest resolution first; multiples of 8."""
    scan_minibatches: bool = False
    """Run the library's pass over the minibatches as one program, and report the time per update."""
    repeats: int = 15
    """Timed rounds, after two to warm up; a round calls every side once."""
    pause: float = 0.02
    """Seconds between two calls: threads that still spin after their work would slow the next call down."""
    torch: bool = True
    """Measure PyTorch."""
    compiled: bool = True
    """Measure compiled PyTorch, too (it takes minutes to compile on a CPU)."""
    tf32: bool = False
    """Let all sides round float32 products to TF32 on GPUs while they are timed; they are compared without."""
    gradient: bool = True
    """Also measure the gradient through the whole chain: with small memory against the fast one."""
    gradient_steps: int = 100
    """Steps of that chain, whose network is that of `experiments.digits`."""
    gradient_batch: int = 64
    """Its batch."""


@dataclasses.dataclass(frozen=True)
class TextToImageConfig:
    """Settings of `experiments.benchmark_text_to_image`."""

    out: Path | None = None
    """Folder for `metrics.json` and `benchmark.png` (default: print only)."""
    model: str = TINY
    """Folder of Stable Diffusion in diffusers' layout; tiny-random makes one."""
    batch: int = 4
    """Images at once."""
    steps: int = 10
    """Timesteps."""
    guidance: float = 7.5
    """Classifier-free guidance; each image takes two evaluations of the UNet a step."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the UNet; latents are float32."""
    attention: Literal["by-head", "xla", "cudnn"] | None = None
    """What computes attention in JAX (default: what suits the device)."""
    repeats: int = 9
    """Timed rounds, after two to warm up; a round calls every side once."""
    pause: float = 0.02
    """Seconds between two calls: threads that still spin after their work would slow the next call down."""
    torch: bool = True
    """Measure PyTorch."""
    compiled: bool = True
    """Measure compiled PyTorch, too."""
