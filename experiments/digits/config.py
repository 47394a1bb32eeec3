"""Settings of `experiments.digits`, and what tells runs apart."""

import dataclasses
from pathlib import Path
from typing import Literal

from ..devices import Devices
from ..names import AlgorithmName, DigitsReward


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Times are control time: 0 is noise, 1 is data. Training and sampling derive from `seed`."""

    out: Path = Path("runs/digits")
    """Folder for models, logs, figures and the report."""
    reward: DigitsReward = "digit"
    """What to fine-tune for: digit (log-probability of one digit under a frozen classifier, nats), ink (inked pixels),
    holes (count; black box), bytes (minus compressed size; black box)."""
    digit: int = 3
    """Which digit the reward "digit" asks for, 0 to 9."""
    algorithm: AlgorithmName = "score_as_action"
    """How to fine-tune: score_as_action (PPO), score_as_action_trpo, score_as_action_published, ddpo, dpok, flow_grpo, vard,
    soft_vard, sqdf, draft, draft_1, alignprop, refl, adjoint_matching, rwr, vidd, log_variance, nabla_db, path_consistency."""
    kl_weight: float | None = None
    """Weight lambda of the KL penalty (the temperature), reward units per nat of path KL. Default: the reward's own (digit 1, ink 1.5,
    holes 0.25, bytes 1.5); 0 for ddpo, draft, draft_1, alignprop, refl, which are published without a KL penalty."""
    eta: float = 1.0
    """Noise level of the sampler: 1 is the reverse SDE, 0 the probability-flow ODE (needs --exploration action, or an
    algorithm that differentiates through the sampler without a KL penalty, such as draft)."""
    steps: int = 24
    """Control intervals between noise and data."""
    exploration: Literal["brownian", "action"] = "brownian"
    """brownian: explore by the noise of the SDE; action: by noise on the actions, held over each control interval."""
    exploration_strength: float | None = None
    """Action noise in units of 1/g (default: 0.5; only with --exploration action)."""
    exploration_substeps: int | None = None
    """Solver steps per control interval while exploring (default: 1; only with --exploration action)."""
    pretrain_steps: int = 3000
    """Optimiser steps of pre-training."""
    pretrain_batch: int = 256
    """Images per pre-training step."""
    pretrain_learning_rate: float = 2e-3
    """Peak Adam learning rate of pre-training (cosine decay)."""
    width: int = 256
    """Features of the residual network."""
    depth: int = 3
    """Residual blocks of the network."""
    iterations: int = 90
    """Fine-tuning iterations: sample, evaluate, update."""
    batch: int = 512
    """Paths per iteration."""
    epochs: int = 2
    """Passes over the paths of an iteration."""
    minibatches: int = 8
    """Updates per pass; must divide batch * steps."""
    learning_rate: float = 2e-4
    """Peak Adam learning rate of the policy (warm-up over the first iteration, cosine decay to a tenth)."""
    value_learning_rate: float = 2e-3
    """Adam learning rate of the value network."""
    clip: float | None = None
    """The likelihood ratio of a step is clipped to 1 +- clip (default: 0.2; inf: not clipped), where an algorithm has one."""
    kl_radius: float | None = None
    """Path KL of an update, nats (default: 0.05; only with --algorithm score_as_action_trpo)."""
    horizon: float | None = None
    """Decay time of the advantages, control time (default: 0, single value increments; inf: Monte Carlo returns), where an algorithm has
    one."""
    kl_target: float | None = None
    """Adapt kl_weight from iteration to iteration towards this path KL, nats; the run is then evaluated at the last kl_weight."""
    kl_budget: float | None = None
    """Stop when the samples' path KL to the pre-trained model exceeds this many nats."""
    reference_samples: int = 16384
    """Reference samples that the optimum is estimated from."""
    evaluation_samples: int = 4096
    """Samples of the final evaluation (a quarter of them during the run)."""
    evaluate_every: int = 10
    """Iterations between evaluations."""
    checkpoint_every: int = 10
    """Iterations between checkpoints."""
    seed: int = 0
    """Seed of everything random."""
    accumulation: int = 1
    """Microbatches that an update is computed in, one after the other: less memory, the same update."""
    stratified: bool = False
    """Deal each group of consecutive transitions out to the minibatches instead of shuffling all: nothing moves between devices."""
    scan_minibatches: bool = False
    """Run a pass over the minibatches as one program: faster updates on CPUs."""
    average: float | None = None
    """Evaluate and save a running average of the parameters, with this decay per update, as 0.99 (default: no average)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the network's matrix products; states, likelihoods, KL and parameters are float32."""
    use_previous_checkpoint: bool = False
    """If the newest checkpoint cannot be read, delete it and resume from the one before."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well (needs the package wandb)."""
    devices: Devices = Devices()
    """Devices that share the run."""


ABOUT = ("devices", "use_previous_checkpoint", "wandb", "iterations", "accumulation", "evaluate_every", "checkpoint_every")
"""Settings that do not make a run another one: how it is computed, and how far it goes."""

EVALUATION = ("reference_samples", "evaluation_samples")
"""Settings of the evaluation: a finished run is evaluated again with others."""
