"""Settings of `experiments.discretization`, and what is refused among them."""

import dataclasses
from pathlib import Path

from ..devices import Devices
from ..solver_registry import as_choices


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Pre-training, fine-tuning and sampling of a seed derive from it; the reward is the same for all seeds."""

    out: Path = Path("runs/discretization")
    """Folder for models, cells, figures and metrics."""
    full: bool = False
    """The committed result: five seeds, 90 fine-tuning iterations and 512 samples per cell instead of 2, 40 and 256."""
    seeds: int | None = None
    """Number of seeds (default 2, with --full 5)."""
    iterations: int | None = None
    """Fine-tuning iterations of every method (default 40, with --full 90)."""
    solvers: tuple[str, ...] = (
        "ExponentialEuler", "DDIM", "Euler", "DPMSolverPP2M", "DPMSolverPP3M", "UniPC", "ERSDE", "DPMSolver2S", "Heun",
    )  # fmt: skip
    """Solvers to evaluate with; also ExponentialAdamsBashforth and ExponentialHeun."""
    steps: tuple[int, ...] = (6, 12, 18, 24, 48, 96)
    """Numbers of steps to evaluate with."""
    etas: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Noise levels to evaluate with: 0 is the probability-flow ODE, 1 the reverse SDE."""
    train_solver: str = "ExponentialEuler"
    """Solver to fine-tune with; one with a Gaussian transition (ExponentialEuler, DDIM, Euler)."""
    train_steps: int = 24
    """Steps to fine-tune with; among --steps."""
    train_eta: float = 1.0
    """Noise level to fine-tune with; positive, among --etas."""
    digit: int = 3
    """The digit asked for: the reward is its log-probability under a frozen classifier, nats."""
    kl_weight: float = 1.0
    """Price of a nat of path KL, in units of the reward, of the methods that have one."""
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
    """Reference samples whose reweighted law is what distances are measured to."""
    optimum_steps: int = 192
    """Steps of exponential Euler at eta 1 for those."""
    use_previous_checkpoint: bool = False
    """If the newest checkpoint of a part cannot be read, delete it and resume from the one before."""
    devices: Devices = Devices()
    """Devices that share training and sampling."""


NOT_IDENTIFYING = ("out", "use_previous_checkpoint", "devices")
"""Settings that may change when a run is continued."""


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
    if not config.kl_weight > 0:
        raise ValueError(f"kl_weight={config.kl_weight} must be positive: the law to compare with is reweighted by it.")
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
