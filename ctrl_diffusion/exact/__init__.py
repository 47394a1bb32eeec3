"""Control problems with known value, optimal action and optimal objective, in closed form or by stated quadrature.

Their actions are controls, `control(params, t, x, cond)`. They do not use `params` and `cond`: pass `None`.
"""

from .catalogue import (
    CATALOGUE as CATALOGUE,
    double_well as double_well,
    gaussian_quadratic as gaussian_quadratic,
    linear_ou as linear_ou,
    quadratic_ou_easy as quadratic_ou_easy,
    quadratic_ou_hard as quadratic_ou_hard,
    ring_linear as ring_linear,
    ring_quadratic as ring_quadratic,
)
from .double_wells import DoubleWell as DoubleWell
from .gaussian import (
    GaussianControl as GaussianControl,
    GaussianQuadratic as GaussianQuadratic,
    TerminalLaw as TerminalLaw,
)
from .measure import (
    FineGap as FineGap,
    GapEvaluator as GapEvaluator,
    PathIntegrals as PathIntegrals,
)
from .mixture import (
    Components as Components,
    GaussianMixture as GaussianMixture,
    MixtureControl as MixtureControl,
    ring as ring,
)
from .ornstein_uhlenbeck import LinearOU as LinearOU, QuadraticOU as QuadraticOU
from .problem import AbstractControlProblem as AbstractControlProblem
from .tilt import (
    AbstractTiltReward as AbstractTiltReward,
    LinearReward as LinearReward,
    QuadraticReward as QuadraticReward,
)
