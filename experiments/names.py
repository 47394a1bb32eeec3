"""The names that command lines accept, as types: a command checks them before it loads JAX. The registries have what they name."""

from typing import Literal

AlgorithmName = Literal[
    "score_as_action", "score_as_action_trpo", "score_as_action_published", "ddpo", "dpok", "flow_grpo", "vard", "soft_vard",
    "sqdf", "draft", "draft_1", "alignprop", "refl", "adjoint_matching", "rwr", "vidd", "log_variance", "nabla_db",
    "path_consistency",
]  # fmt: skip
"""Of `experiments.algorithm_registry.ALGORITHMS`."""

DigitsReward = Literal["digit", "ink", "holes", "bytes"]
"""Of `experiments.reward_registry.OF_DIGITS`."""

ImageReward = Literal[
    "jpeg_compressibility", "jpeg_incompressibility", "brightness", "aesthetic", "clip", "pickscore", "hps", "imagereward"
]
"""Of `experiments.reward_registry.OF_IMAGES`."""

SolverName = Literal[
    "ExponentialEuler", "DDIM", "Euler", "DPMSolverPP2M", "DPMSolverPP3M", "UniPC", "ERSDE", "ExponentialAdamsBashforth",
    "DPMSolver2S", "ExponentialHeun", "Heun",
]  # fmt: skip
"""Of `experiments.solver_registry.SOLVERS`."""

GaussianSolver = Literal["ExponentialEuler", "DDIM", "Euler"]
"""Those of `SolverName` of which a noisy step is one Gaussian transition: fine-tuning needs its likelihood."""

SolverKind = Literal["ODE", "SDE", "adaptive", "implicit"]
"""`experiments.solver_registry.KINDS`."""
