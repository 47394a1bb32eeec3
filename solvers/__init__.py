"""How to integrate `dx = (A(t) x + B(t) u(t, x)) dt + G(t) dW`: diffrax terms, solvers, paths and grids.

Knows no diffusion model, no reward and no reinforcement learning. Import it as `ctrl_diffusion.solvers`.
"""

from .exponential import ExponentialEuler as ExponentialEuler, gaussian_transition as gaussian_transition
from .fit import terms_for as terms_for
from .grid import GridSteps as GridSteps, check_grid as check_grid, refine as refine, uniform as uniform
from .integrate import integrate as integrate, solve as solve
from .inverse import decreasing_inverse as decreasing_inverse
from .path import (
    KeyedPath as KeyedPath,
    RecordedPath as RecordedPath,
    levy_area_for as levy_area_for,
    sample_keys as sample_keys,
    standard_normal as standard_normal,
)
from .term import (
    AbstractSemilinearTerm as AbstractSemilinearTerm,
    Diffusion as Diffusion,
    Field as Field,
    Interval as Interval,
    Transition as Transition,
)
