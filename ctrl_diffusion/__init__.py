"""ctrl_diffusion: fine-tuning diffusion models as continuous-time stochastic control."""

from . import (
    algorithms as algorithms,
    exact as exact,
    predictions as predictions,
    rewards as rewards,
    schedules as schedules,
    solvers as solvers,
)
from .algorithms import Algorithm as Algorithm, score_as_action as score_as_action
from .diversity import vendi_score as vendi_score
from .drift import DriftProcess as DriftProcess
from .exploration import AbstractExploration as AbstractExploration, ActionNoise as ActionNoise, Brownian as Brownian
from .model import DiffusionModel as DiffusionModel, load as load, make_model as make_model, save as save
from .networks import ResidualMLP as ResidualMLP, score_control as score_control, value_network as value_network
from .optimum import (
    Optimum as Optimum,
    is_memoryless as is_memoryless,
    optimality_gap as optimality_gap,
    reweighted_optimum as reweighted_optimum,
)
from .predictions import EPSILON as EPSILON, SCORE as SCORE, VELOCITY as VELOCITY, X0 as X0, Prediction as Prediction, V as V
from .pretrain import denoising_loss as denoising_loss
from .process import (
    AbstractControlledSDE as AbstractControlledSDE,
    ControlFn as ControlFn,
    DiffusionProcess as DiffusionProcess,
)
from .rewards import Reward as Reward, black_box as black_box, differentiable as differentiable
from .sampler import (
    Sampler as Sampler,
    Trajectory as Trajectory,
    log_ratio as log_ratio,
    path_actions as path_actions,
    step_kl as step_kl,
)
from .schedules import (
    RectifiedFlow as RectifiedFlow,
    VarianceExploding as VarianceExploding,
    VPCosine as VPCosine,
    VPLinear as VPLinear,
    VPTable as VPTable,
)
from .solvers import sample_keys as sample_keys
from .values import AbstractValue as AbstractValue, PlainValue as PlainValue, StructuredValue as StructuredValue
