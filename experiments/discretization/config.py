"""Settings of `experiments.discretization`, and what tells runs apart."""

import dataclasses
from pathlib import Path

from ..devices import Devices
from ..names import GaussianSolver, SolverName


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Pre-training, fine-tuning and sampling of a seed derive from it; the reward is the same for all seeds."""

    out: Path = Path("runs/discretization")
    """Folder for models, cells, figures and metrics."""
    full: bool = False
    """The result of docs/discretization.md: five seeds, 90 fine-tuning iterations and 512 samples per cell instead of 2, 40 and 256."""
    seeds: int | None = None
    """Number of seeds (default 2, with --full 5)."""
    iterations: int | None = None
    """Fine-tuning iterations of every method (default 40, with --full 90)."""
    solvers: tuple[SolverName, ...] = (
        "ExponentialEuler", "DDIM", "Euler", "DPMSolverPP2M", "DPMSolverPP3M", "UniPC", "ERSDE", "DPMSolver2S", "Heun",
    )  # fmt: skip
    """Solvers to evaluate with; also ExponentialAdamsBashforth and ExponentialHeun."""
    steps: tuple[int, ...] = (6, 12, 18, 24, 48, 96)
    """Numbers of steps to evaluate with."""
    etas: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Noise levels to evaluate with: 0 is the probability-flow ODE, 1 the reverse SDE."""
    train_solver: GaussianSolver = "ExponentialEuler"
    """Solver to fine-tune with; one with a Gaussian transition (ExponentialEuler, DDIM, Euler)."""
    train_steps: int = 24
    """Steps to fine-tune with; among --steps."""
    train_eta: float = 1.0
    """Noise level to fine-tune with; positive, among --etas."""
    digit: int = 3
    """The digit asked for: the reward is its log-probability under a frozen classifier, nats."""
    kl_weight: float = 1.0
    """Weight of the KL penalty, reward units per nat, of the methods that have one."""
    batch: int = 512
    """Paths per iteration."""
    epochs: int = 2
    """Passes over the paths of an iteration."""
    minibatches: int = 8
    """Updates per pass; must divide batch * train_steps."""
    learning_rate: float = 2e-4
    """Peak Adam learning rate of every policy (warm-up over the first iteration, cosine decay to a tenth)."""
    value_learning_rate: float = 2e-3
    """Adam learning rate of the value network of Score as Action."""
    clip: float = 0.2
    """The likelihood ratio of a step is clipped to 1 +- clip."""
    pretrain_steps: int = 2500
    """Optimiser steps of pre-training."""
    pretrain_batch: int = 256
    """Images per pre-training step."""
    pretrain_learning_rate: float = 2e-3
    """Peak Adam learning rate of pre-training (cosine decay)."""
    width: int = 192
    """Features of the residual network."""
    depth: int = 3
    """Residual blocks of the network."""
    samples: int | None = None
    """Samples per cell of the matrix and policy (default 256, with --full 512)."""
    reference_samples: int = 2048
    """Reference samples that the optimum of a chain is estimated from."""
    optimum_samples: int = 4096
    """Reference samples whose reweighted distribution the energy distances are measured to."""
    optimum_steps: int = 192
    """Steps of exponential Euler at eta 1 that draw them."""
    use_previous_checkpoint: bool = False
    """If the newest checkpoint of a part cannot be read, delete it and resume from the one before."""
    devices: Devices = Devices()
    """Devices that share training and sampling."""


NOT_IDENTIFYING = ("out", "use_previous_checkpoint", "devices")
"""Settings that may change when a run is continued."""
