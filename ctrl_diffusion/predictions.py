r"""Predictions of a network, as linear changes of variable of the score.

Every prediction `u` is a function of the score `a`, `u = P(tau) x + Q(tau) a`. With `X = alpha X_data + sigma eps` and Tweedie's
`a = -eps / sigma`, `X_data = (x + sigma^2 a) / alpha`:

    epsilon   u = eps                                 P = 0                Q = -sigma
    x0        u = X_data                              P = 1 / alpha        Q = sigma^2 / alpha
    v         u = alpha eps - sigma X_data            P = -sigma / alpha   Q = -sigma (alpha^2 + sigma^2) / alpha
    score     u = a                                   P = 0                Q = 1
    velocity  u = alpha' X_data + sigma' eps          P = f                Q = -g^2 / 2

Primes are derivatives in noising time. v follows Salimans and Ho 2022; the velocity is the drift of the probability-flow ODE in noising
time. If `Q = 0` (epsilon, x0 and v at zero noise) the score cannot be recovered, and only `from_score` is defined.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from .schedules import AbstractSchedule, Times

Coefficients = tuple[Times, Times]


def expand(t: Float[Array, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Append axes to an array of times (scalar or `[b]`) until it broadcasts against states `[b, *x]`."""
    return t if t.ndim == 0 else t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


class Prediction(NamedTuple):
    """A network output `u = P(tau) x + Q(tau) score`; `coefficients(schedule, tau)` gives `(P, Q)`."""

    name: str
    coefficients: Callable[[AbstractSchedule, Times], Coefficients]

    def to_score(self, schedule: AbstractSchedule, tau: Times, x, u):
        """Score from prediction; `tau` scalar or `[b]`, `x` and `u` `[b, *x]`."""
        p, q = self.coefficients(schedule, tau)
        return (u - expand(p, x) * x) / expand(q, x)

    def from_score(self, schedule: AbstractSchedule, tau: Times, x, score):
        """Prediction from score; `tau` scalar or `[b]`, `x` and `score` `[b, *x]`."""
        p, q = self.coefficients(schedule, tau)
        return expand(p, x) * x + expand(q, x) * score


def _epsilon(s: AbstractSchedule, tau: Times) -> Coefficients:
    return jnp.zeros_like(tau), -s.sigma(tau)


def _x0(s: AbstractSchedule, tau: Times) -> Coefficients:
    alpha = s.alpha(tau)
    return 1 / alpha, s.sigma_squared(tau) / alpha


def _v(s: AbstractSchedule, tau: Times) -> Coefficients:
    alpha, sigma = s.alpha(tau), s.sigma(tau)
    return -sigma / alpha, -sigma * (alpha**2 + sigma**2) / alpha


def _score(s: AbstractSchedule, tau: Times) -> Coefficients:
    return jnp.zeros_like(tau), jnp.ones_like(tau)


def _velocity(s: AbstractSchedule, tau: Times) -> Coefficients:
    return s.f(tau), -0.5 * s.g_squared(tau)


EPSILON = Prediction("epsilon", _epsilon)
X0 = Prediction("x0", _x0)
V = Prediction("v", _v)
SCORE = Prediction("score", _score)
VELOCITY = Prediction("velocity", _velocity)
