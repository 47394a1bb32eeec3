"""Control problems on a diffusion process whose value, optimal action and optimal value are known in closed form.

Their actions are controls, `control(params, t, x, cond)`, with `params` and `cond` unused: pass `None`.
"""

from .gaussian import GaussianQuadratic as GaussianQuadratic, TerminalLaw as TerminalLaw
from .mixture import (
    Components as Components,
    GaussianMixture as GaussianMixture,
    MixtureControl as MixtureControl,
    ring as ring,
)
from .tilt import (
    AbstractTiltReward as AbstractTiltReward,
    LinearReward as LinearReward,
    QuadraticReward as QuadraticReward,
)
