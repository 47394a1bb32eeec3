"""Rewards that reweight an isotropic Gaussian to an isotropic Gaussian."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def _vector(x) -> tuple[float, ...]:
    return tuple(np.asarray(x, np.float64).tolist())


class AbstractTiltReward(eqx.Module):
    """A reward `r` such that `N(mean, variance I) exp(r / lambda)` is again an isotropic Gaussian, up to a factor."""

    @abc.abstractmethod
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b"]:
        """`r(x)`."""

    @abc.abstractmethod
    def expectation(self, mean: Float[Array, "*n d"], variance) -> Float[Array, "*n"]:
        """`E r(Y)` for `Y ~ N(mean, variance I)`."""

    @abc.abstractmethod
    def log_mass(self, mean: Float[Array, "*n d"], variance, kl_weight: float) -> Float[Array, "*n"]:
        """`log E exp(r(Y) / kl_weight)` for `Y ~ N(mean, variance I)`."""

    @abc.abstractmethod
    def tilt(self, mean: Float[Array, "*n d"], variance, kl_weight: float) -> tuple[Float[Array, "*n d"], Any]:
        """Mean and variance of the reweighted Gaussian."""


class LinearReward(AbstractTiltReward):
    """`r(x) = <w, x>`, `w = direction`.

    `log E exp(r / lambda) = <w, mean> / lambda + |w|^2 variance / (2 lambda^2)`; reweighted mean `mean + variance w / lambda`.
    """

    direction: tuple[float, ...] = eqx.field(static=True, converter=_vector)

    def __call__(self, x):
        return x @ self._w(x)

    def expectation(self, mean, variance):
        return mean @ self._w(mean)

    def log_mass(self, mean, variance, kl_weight):
        w = self._w(mean)
        return mean @ w / kl_weight + 0.5 * jnp.sum(w**2) * variance / kl_weight**2

    def tilt(self, mean, variance, kl_weight):
        return mean + variance * self._w(mean) / kl_weight, variance

    def _w(self, x):
        return jnp.asarray(self.direction, x.dtype)


class QuadraticReward(AbstractTiltReward):
    r"""`r(x) = -curvature |x - center|^2 / 2`, `curvature > 0`. With `k = curvature / lambda`, `D = 1 + k variance`:

    `log E exp(r / lambda) = -(d/2) log D - k |mean - center|^2 / (2 D)`; reweighted mean `(mean + k variance center) / D` and
    variance `variance / D`.
    """

    curvature: float = eqx.field(static=True)
    center: tuple[float, ...] = eqx.field(static=True, converter=_vector)

    def __check_init__(self):
        if not self.curvature > 0:
            raise ValueError(f"curvature={self.curvature} must be positive.")

    def __call__(self, x):
        return -0.5 * self.curvature * self._squared_distance(x)

    def expectation(self, mean, variance):
        return -0.5 * self.curvature * (self._squared_distance(mean) + len(self.center) * variance)

    def log_mass(self, mean, variance, kl_weight):
        k = self.curvature / kl_weight
        shrink = 1 + k * variance
        return -0.5 * len(self.center) * jnp.log(shrink) - 0.5 * k * self._squared_distance(mean) / shrink

    def tilt(self, mean, variance, kl_weight):
        k = self.curvature / kl_weight
        shrink = 1 + k * variance
        return (mean + k * variance * jnp.asarray(self.center, mean.dtype)) / shrink, variance / shrink

    def _squared_distance(self, x):
        return jnp.sum((x - jnp.asarray(self.center, x.dtype)) ** 2, axis=-1)
