"""Solvers for `dx = (A(t) x + B(t) u(t, x)) dt + G(t) dW`: diffrax terms, solvers, Brownian paths and time grids.

This package has nothing specific to diffusion models, rewards or reinforcement learning. Import it as `ctrl_diffusion.solvers`.
"""

from .adaptive import Adaptive as Adaptive, brownian_tree as brownian_tree, integrate_adaptive as integrate_adaptive
from .ddim import DDIM as DDIM
from .edm import EDMHeun as EDMHeun, ExponentialHeun as ExponentialHeun
from .er_sde import ERSDE as ERSDE, er_sde_noise_scale as er_sde_noise_scale
from .exponential import (
    AbstractSemilinearSolver as AbstractSemilinearSolver,
    ExponentialEuler as ExponentialEuler,
    gaussian_transition as gaussian_transition,
)
from .fit import terms_for as terms_for
from .grid import (
    GridSteps as GridSteps,
    check_grid as check_grid,
    clock_uniform as clock_uniform,
    cosine_spaced as cosine_spaced,
    from_timesteps as from_timesteps,
    karras as karras,
    leading as leading,
    linspaced as linspaced,
    power as power,
    refine as refine,
    trailing as trailing,
    uniform as uniform,
)
from .integrate import integrate as integrate, solve as solve
from .inverse import decreasing_inverse as decreasing_inverse
from .multistep import (
    DPMSolverPP2M as DPMSolverPP2M,
    DPMSolverPP3M as DPMSolverPP3M,
    ExponentialAdamsBashforth as ExponentialAdamsBashforth,
)
from .path import (
    KeyedPath as KeyedPath,
    RecordedPath as RecordedPath,
    levy_area_for as levy_area_for,
    sample_keys as sample_keys,
    standard_normal as standard_normal,
)
from .singlestep import (
    DPMSolver2S as DPMSolver2S,
    DPMSolver3S as DPMSolver3S,
    ExponentialSRA as ExponentialSRA,
)
from .term import (
    AbstractSemilinearTerm as AbstractSemilinearTerm,
    Diffusion as Diffusion,
    Field as Field,
    Interval as Interval,
    Transition as Transition,
)
from .unipc import UniPC as UniPC
