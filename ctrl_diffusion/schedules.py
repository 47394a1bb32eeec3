r"""Noise schedules: `X_tau = alpha(tau) X_data + sigma(tau) eps` in noising time `tau` in `[0, horizon]`.

A schedule gives `log alpha` and `sigma^2`; the noising SDE `dX = f X dtau + g dB` follows (theory in docs/mathematics.md):

    f = d log alpha / dtau,     g^2 = d sigma^2 / dtau - 2 f sigma^2,     lambda = log(alpha / sigma)

All functions work elementwise on `tau` of any shape. Samplers use the part from `tau_max` to `tau_min`: control time `t = horizon - tau`
runs from `horizon - tau_max` (noise) to `horizon - tau_min` (data). `tau_min > 0` keeps the last step of an SDE away from zero noise,
where a change of its mean has infinite KL.
"""

import abc
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

if TYPE_CHECKING:  # to a type checker, a field without a default would have to come first
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar

Times = Float[Array, "..."]


def _derivative(fn: Callable[[Times], Times], tau: Times) -> Times:
    return jax.jvp(fn, (tau,), (jnp.ones_like(tau),))[1]


class AbstractSchedule(eqx.Module):
    """Noising `X_tau = alpha(tau) X_data + sigma(tau) eps` for `tau` in `[tau_min, tau_max]`, inside `[0, horizon]`."""

    horizon: AbstractVar[float]
    tau_min: AbstractVar[float]
    tau_max: AbstractVar[float]

    @abc.abstractmethod
    def log_alpha(self, tau: Times) -> Times:
        """Logarithm of the signal coefficient."""

    @abc.abstractmethod
    def sigma_squared(self, tau: Times) -> Times:
        """Variance of the noise."""

    def alpha(self, tau: Times) -> Times:
        return jnp.exp(self.log_alpha(tau))

    def sigma(self, tau: Times) -> Times:
        return jnp.sqrt(self.sigma_squared(tau))

    def log_snr(self, tau: Times) -> Times:
        """`lambda = log(alpha / sigma)`, half the logarithm of the signal-to-noise ratio of variances."""
        return self.log_alpha(tau) - 0.5 * jnp.log(self.sigma_squared(tau))

    def f(self, tau: Times) -> Times:
        """Linear drift rate of the noising SDE, `d log alpha / dtau`."""
        return _derivative(self.log_alpha, tau)

    def g_squared(self, tau: Times) -> Times:
        """Squared diffusion of the noising SDE, `d sigma^2 / dtau - 2 f sigma^2`."""
        return _derivative(self.sigma_squared, tau) - 2 * self.f(tau) * self.sigma_squared(tau)

    def __check_init__(self):
        if not self.horizon > 0:
            raise ValueError(f"horizon={self.horizon} must be positive: it is the length of noising time.")
        if not 0 <= self.tau_min < self.tau_max <= self.horizon:
            raise ValueError(
                f"tau_min={self.tau_min}, tau_max={self.tau_max} must satisfy 0 <= tau_min < tau_max <= horizon={self.horizon}."
            )


class AbstractVariancePreserving(AbstractSchedule):
    """`alpha^2 + sigma^2 = 1`."""

    def sigma_squared(self, tau: Times) -> Times:
        return -jnp.expm1(2 * self.log_alpha(tau))


class VPLinear(AbstractVariancePreserving):
    """`beta(tau)` linear from `beta_min` to `beta_max` over the horizon (Ho et al. 2020; Song et al. 2021, eq. 32).

    With `beta_min = beta_max` it is the Ornstein-Uhlenbeck process.
    """

    beta_min: float = eqx.field(static=True, default=0.1)
    beta_max: float = eqx.field(static=True, default=20.0)
    horizon: float = eqx.field(static=True, default=1.0)
    tau_min: float = eqx.field(static=True, default=1e-3)
    tau_max: float = eqx.field(static=True, default=1.0)

    def log_alpha(self, tau: Times) -> Times:
        return -0.5 * self.beta_min * tau - 0.25 * (self.beta_max - self.beta_min) * tau**2 / self.horizon


class VPCosine(AbstractVariancePreserving):
    """`alpha = cos(pi/2 (tau + s)/(1 + s)) / cos(pi/2 s/(1 + s))` on `[0, 1]` (Nichol and Dhariwal 2021, eq. 17).

    `alpha` is zero at `tau = 1`, where the SDE is singular: `tau_max` must be below 1. Deviation: the paper clips beta instead.
    """

    s: float = eqx.field(static=True, default=0.008)
    horizon: float = eqx.field(static=True, default=1.0)
    tau_min: float = eqx.field(static=True, default=0.01)
    tau_max: float = eqx.field(static=True, default=0.998)

    def log_alpha(self, tau: Times) -> Times:
        # cos(a + b) / cos(b) - 1 = -2 sin(a/2 + b) sin(a/2) / cos(b): a difference of cosines loses its digits near the data
        half = 0.25 * jnp.pi * tau / (1 + self.s)
        offset = 0.5 * math.pi * self.s / (1 + self.s)
        return jnp.log1p(-2 * jnp.sin(half + offset) * jnp.sin(half) / math.cos(offset))

    def __check_init__(self):
        if self.tau_max >= 1:
            raise ValueError(f"tau_max={self.tau_max} must be below 1: the cosine schedule has alpha = 0 there.")


@functools.cache
def _monotone_cubic(betas: tuple[float, ...]) -> np.ndarray:
    """Coefficients `[4, n]` of `log alpha` in the intervals of a table, highest power first, of the part of the interval that is past."""
    import scipy.interpolate  # takes half a second

    table = 0.5 * np.concatenate([[0.0], np.cumsum(np.log1p(-np.asarray(betas, np.float64)))])
    return scipy.interpolate.PchipInterpolator(np.arange(len(table)), table).c


class VPTable(AbstractVariancePreserving):
    """A continuous schedule from a table of discrete betas. The default is Stable Diffusion's scaled-linear table.

    Timestep `i` of `n` is noising time `(i + 1) horizon / n`. `log alpha` is exact at those nodes; in between it is the monotone cubic
    (PCHIP, Fritsch and Butland 1984), so that the drift of the SDE is continuous and adaptive steps can trust their error estimates.
    """

    betas: tuple[float, ...] = eqx.field(
        static=True, default_factory=lambda: tuple((np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).tolist())
    )
    horizon: float = eqx.field(static=True, default=1.0)
    tau_min: float = eqx.field(static=True, default=1e-3)
    tau_max: float = eqx.field(static=True, default=1.0)

    def log_alpha(self, tau: Times) -> Times:
        intervals = len(self.betas)
        position = tau * (intervals / self.horizon)
        i = jnp.clip(jnp.floor(position), 0, intervals - 1).astype(jnp.int32)
        cubic = jnp.asarray(_monotone_cubic(self.betas), tau.dtype)[:, i]
        return jnp.polyval(cubic, position - i.astype(tau.dtype))

    def __check_init__(self):
        if not all(0 < b < 1 for b in self.betas):
            bad = next(b for b in self.betas if not 0 < b < 1)
            raise ValueError(f"betas must all lie strictly between 0 and 1, but one is {bad}: pass variances of single steps.")


class VarianceExploding(AbstractSchedule):
    """`alpha = 1`, `sigma = tau`: noising time is the noise level (Karras et al. 2022, EDM)."""

    horizon: float = eqx.field(static=True, default=80.0)
    tau_min: float = eqx.field(static=True, default=2e-3)
    tau_max: float = eqx.field(static=True, default=80.0)

    def log_alpha(self, tau: Times) -> Times:
        return jnp.zeros_like(tau)

    def sigma_squared(self, tau: Times) -> Times:
        return tau**2


class RectifiedFlow(AbstractSchedule):
    """`alpha = 1 - tau`, `sigma = tau` (Liu et al. 2023; Lipman et al. 2023). Singular at `tau = 1`, so `tau_max < 1`."""

    horizon: float = eqx.field(static=True, default=1.0)
    tau_min: float = eqx.field(static=True, default=1e-3)
    tau_max: float = eqx.field(static=True, default=0.999)

    def log_alpha(self, tau: Times) -> Times:
        return jnp.log1p(-tau)

    def sigma_squared(self, tau: Times) -> Times:
        return tau**2

    def __check_init__(self):
        if self.tau_max >= 1:
            raise ValueError(f"tau_max={self.tau_max} must be below 1: rectified flow has alpha = 0 there.")
