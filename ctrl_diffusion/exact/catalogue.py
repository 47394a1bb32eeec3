"""The problems of the literature, with the settings of their published numbers. Each function makes one.

problems = {make.__name__: make for make in exact.CATALOGUE}
"""

from ..process import DiffusionProcess
from ..schedules import VPLinear
from .double_wells import DoubleWell
from .gaussian import GaussianControl, GaussianQuadratic
from .mixture import MixtureControl, ring
from .ornstein_uhlenbeck import LinearOU, QuadraticOU
from .tilt import LinearReward, QuadraticReward


def gaussian_quadratic(eta: float = 1.0, tau_min: float = 0.0) -> GaussianControl:
    """One-dimensional data `N(1, 0.5^2)`, reward `-(x + 1/2)^2 / 2`, `lambda = 0.7`, constant `beta = 4` on `[0, 2]`.

    It starts at pure noise, which differs from the noised data by `alpha(2) = 0.018`, and ends at the noise of `tau_min`.
    """
    schedule = VPLinear(beta_min=4.0, beta_max=4.0, horizon=2.0, tau_min=tau_min, tau_max=2.0)
    return GaussianControl(GaussianQuadratic(DiffusionProcess(schedule, eta), 1.0, 0.5, 1.0, -0.5, 0.7, noise_start=True))


def ring_linear(kl_weight: float = 1.0) -> MixtureControl:
    """Ring of eight Gaussians in the plane, `r(x) = x_1`."""
    return MixtureControl(DiffusionProcess(VPLinear()), ring(), LinearReward((1.0, 0.0)), kl_weight)


def ring_quadratic(curvature: float = 0.5) -> MixtureControl:
    """Ring of eight Gaussians in the plane, `r(x) = -curvature |x - (2, 0)|^2 / 2`, `lambda = 1`."""
    return MixtureControl(DiffusionProcess(VPLinear()), ring(), QuadraticReward(curvature, (2.0, 0.0)), 1.0)


def quadratic_ou_easy() -> QuadraticOU:
    """20 dimensions, `a = 0.2`, `p = 0.2`, `q = 0.1`, `|X(0)|^2 = 5`, 50 steps."""
    return QuadraticOU(0.2, 0.2, 0.1)


def quadratic_ou_hard() -> QuadraticOU:
    """20 dimensions, `a = 1`, `p = 1`, `q = 1/2`, `|X(0)|^2 = 5`; 50 steps, also published with 150."""
    return QuadraticOU(1.0, 1.0, 0.5)


def linear_ou() -> LinearOU:
    """10 dimensions, `a = -1`, terminal cost `sum_i x_i`, `X(0) = 0`."""
    return LinearOU()


def double_well() -> DoubleWell:
    """10 dimensions, `(kappa, nu) = (5, 3)` in three and `(1, 1)` in seven, `X(0) = 0`, 200 steps."""
    return DoubleWell()


CATALOGUE = (
    gaussian_quadratic,
    ring_linear,
    ring_quadratic,
    quadratic_ou_easy,
    quadratic_ou_hard,
    linear_ou,
    double_well,
)
