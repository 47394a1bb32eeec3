"""Algorithms: pairs of functions `init(params, ...) -> state` and `step(key, state) -> (state, info)`, composed from parts."""

from .compose import compose as compose
from .presets import (
    adjoint_matching as adjoint_matching,
    alignprop as alignprop,
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
from .programs import lower as lower, timed as timed
from .training import (
    AdaptiveKL as AdaptiveKL,
    Algorithm as Algorithm,
    Info as Info,
    Learned as Learned,
    State as State,
    TimeSampling as TimeSampling,
    Training as Training,
)
