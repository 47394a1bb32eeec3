"""Settings of `experiments.value_networks`, and the names of its problems and variants."""

import dataclasses
from pathlib import Path
from typing import Literal

from ..devices import Devices

ProblemName = Literal["ring_linear", "ring_quadratic", "digits"]
"""Of `experiments.value_networks.cases.PROBLEMS`."""

VariantName = Literal[
    "structured", "plain", "x0_prediction", "cos_1-cos", "linear", "constant", "noisy_network", "noisy_reward", "noisy", "mean",
    "martingale", "td", "td_0", "optimum_mean", "optimum_kl", "optimum_soft",
]  # fmt: skip
"""Of `experiments.value_networks.variants.VARIANTS`."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Every variant sees the same paths."""

    out: Path = Path("runs/value_networks")
    """Folder for results, table and figures."""
    quick: bool = False
    """Five variants on the ring, an eighth of the iterations."""
    problems: tuple[ProblemName, ...] = ()
    """Only these of ring_linear, ring_quadratic, digits (default: ring_linear and digits)."""
    variants: tuple[VariantName, ...] = ()
    """Only these variants (default: all that apply to a problem)."""
    seeds: int = 2
    """Number of seeds: each has its own initial parameters and paths."""
    iterations: int | None = None
    """Iterations of 8 updates on 512 transitions (default: the problem's own, 240 on the rings and 120 on the digits)."""
    paths: int = 8192
    """Paths per seed that training draws from."""
    states: int = 1024
    """Held-out states per time on the ring."""
    digit_states: int = 64
    """Held-out states per time on the digits, each with --continuations."""
    continuations: int = 1024
    """Paths from every held-out state of the digits, which estimate its exact value."""
    pretrain_steps: int = 1500
    """Optimiser steps of pre-training on the digits."""
    devices: Devices = Devices()
    """Devices that share the transitions of every update, and the paths that exact values of the digits are estimated from."""
