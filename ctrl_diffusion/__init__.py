"""ctrl_diffusion: fine-tuning diffusion models as continuous-time stochastic control.

Scripts use the names in `__all__`. All other names are in their modules, such as `solvers.DPMSolverPP2M` and `trust.NaturalGradient`.
Pretrained networks and problems with known optimum (`pretrained`, `stable_diffusion`, `image_rewards`, `exact`) are imported when they
are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import (
    advantages as advantages,
    algorithms as algorithms,
    conversions as conversions,
    critics as critics,
    diversity as diversity,
    estimators as estimators,
    exploration as exploration,
    networks as networks,
    objective as objective,
    optimum as optimum,
    parallel as parallel,
    predictions as predictions,
    pretrain as pretrain,
    process as process,
    replay as replay,
    rewards as rewards,
    rollout as rollout,
    sampler as sampler,
    schedules as schedules,
    solvers as solvers,
    summaries as summaries,
    trust as trust,
    values as values,
    x0_prediction as x0_prediction,
)
from .algorithms import (
    Training,
    adjoint_matching,
    alignprop,
    compose,
    ddpo,
    dpok,
    draft,
    flow_grpo,
    log_variance,
    nabla_db,
    path_consistency,
    refl,
    rwr,
    score_as_action,
    soft_vard,
    sqdf,
    vard,
    vidd,
)
from .citations import citation
from .convolutions import convolution
from .critics import Critic
from .drift import DriftProcess
from .model import DiffusionModel, load, make_model, save
from .networks import ResidualMLP, score_control, value_network
from .objective import Objective
from .optimum import is_memoryless, optimality_gap, reweighted_optimum
from .parallel import Layout, make_mesh
from .predictions import EPSILON, SCORE, VELOCITY, X0, V
from .process import DiffusionProcess
from .rewards import black_box, differentiable, pooled, seen_through, weighted_sum
from .sampler import Sampler
from .schedules import RectifiedFlow, VarianceExploding, VPCosine, VPLinear
from .solvers import sample_keys
from .values import GivenValue, PlainValue, StructuredValue, X0RewardValue

__version__ = "0.1.0"

__all__ = [
    "DiffusionProcess", "DriftProcess", "RectifiedFlow", "VPCosine", "VPLinear", "VarianceExploding",
    "EPSILON", "SCORE", "V", "VELOCITY", "X0",
    "ResidualMLP", "convolution", "score_control", "value_network",
    "Sampler", "sample_keys",
    "DiffusionModel", "load", "make_model", "save",
    "black_box", "differentiable", "pooled", "seen_through", "weighted_sum",
    "GivenValue", "X0RewardValue", "PlainValue", "StructuredValue",
    "Critic", "Objective", "Training", "compose",
    "adjoint_matching", "alignprop", "ddpo", "dpok", "draft", "flow_grpo", "log_variance", "nabla_db", "path_consistency",
    "refl", "rwr", "score_as_action", "soft_vard", "sqdf", "vard", "vidd",
    "is_memoryless", "optimality_gap", "reweighted_optimum",
    "Layout", "make_mesh",
    "__version__", "citation",
]  # fmt: skip

_ON_FIRST_USE = ("exact", "image_rewards", "pretrained", "runs", "stable_diffusion")

if TYPE_CHECKING:
    from . import (
        exact as exact,
        image_rewards as image_rewards,
        pretrained as pretrained,
        runs as runs,
        stable_diffusion as stable_diffusion,
    )
else:  # hidden from type checkers, for which a module with `__getattr__` has every name

    def __getattr__(name: str) -> Any:
        if name in _ON_FIRST_USE:
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_FIRST_USE})
