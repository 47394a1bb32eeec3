"""ctrl_diffusion: fine-tuning diffusion models as continuous-time stochastic control."""

from . import (
    algorithms as algorithms,
    conversions as conversions,
    critics as critics,
    estimators as estimators,
    exact as exact,
    image_rewards as image_rewards,
    predictions as predictions,
    rewards as rewards,
    runs as runs,
    schedules as schedules,
    solvers as solvers,
    stable_diffusion as stable_diffusion,
)
from .algorithms import (
    Algorithm as Algorithm,
    TimeSampling as TimeSampling,
    Training as Training,
    adjoint_matching as adjoint_matching,
    alignprop as alignprop,
    compose as compose,
    ddpo as ddpo,
    dpok as dpok,
    draft as draft,
    flow_grpo as flow_grpo,
    log_variance as log_variance,
    nabla_db as nabla_db,
    path_consistency as path_consistency,
    refl as refl,
    rwr as rwr,
    score_as_action as score_as_action,
    soft_vard as soft_vard,
    sqdf as sqdf,
    vard as vard,
    vidd as vidd,
)
from .citations import citation as citation
from .convolutions import convolution as convolution
from .critics import Critic as Critic
from .diversity import vendi_score as vendi_score
from .drift import DriftProcess as DriftProcess
from .exploration import AbstractExploration as AbstractExploration, ActionNoise as ActionNoise, Brownian as Brownian
from .model import DiffusionModel as DiffusionModel, load as load, make_model as make_model, save as save
from .networks import ResidualMLP as ResidualMLP, score_control as score_control, value_network as value_network
from .objective import Objective as Objective, few_step_ode as few_step_ode, posterior_mean as posterior_mean
from .optimum import (
    Optimum as Optimum,
    is_memoryless as is_memoryless,
    optimality_gap as optimality_gap,
    reweighted_optimum as reweighted_optimum,
)
from .parallel import ONE_DEVICE as ONE_DEVICE, Layout as Layout, make_mesh as make_mesh
from .predictions import EPSILON as EPSILON, SCORE as SCORE, VELOCITY as VELOCITY, X0 as X0, Prediction as Prediction, V as V
from .pretrain import denoising_loss as denoising_loss
from .process import (
    AbstractControlledSDE as AbstractControlledSDE,
    ControlFn as ControlFn,
    DiffusionProcess as DiffusionProcess,
)
from .rewards import (
    Reward as Reward,
    black_box as black_box,
    differentiable as differentiable,
    pooled as pooled,
    seen_through as seen_through,
    weighted_sum as weighted_sum,
)
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
from .states import Reference as Reference, Replay as Replay
from .trust import FirstOrder as FirstOrder, NaturalGradient as NaturalGradient
from .values import (
    AbstractValue as AbstractValue,
    GivenValue as GivenValue,
    LookaheadValue as LookaheadValue,
    PlainValue as PlainValue,
    StructuredValue as StructuredValue,
)
