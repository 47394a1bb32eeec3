"""Settings of `experiments.random_model`."""

import dataclasses
from pathlib import Path
from typing import Literal

TINY = "tiny-random"
"""As the model of another command: a tiny one, which that command writes itself."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model to write, and where."""

    out: Path
    """Folder to write; it is replaced as a whole."""
    size: Literal["tiny", "sd15"] = "tiny"
    """tiny: 8x8 latents, 32x32 images; sd15: 64x64 latents, 512x512 images, a billion parameters, 4.3 GB."""
    seed: int = 0
    """Seed of the weights."""
