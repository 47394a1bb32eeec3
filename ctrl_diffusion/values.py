r"""Value networks: `V(t, x) = c_skip(t) r(x_hat(t, x)) + c_out(t) F_phi(t, .)`, with `V(t1, x) = r(x)` by construction.

`s = (t1 - t)/(t1 - t0)` in `[0, 1]` is the remaining fraction of control time; at `s = 0`, `c_skip = 1` and `c_out = 0`. `x_hat` is the
x0 prediction, such as the posterior mean (`DiffusionProcess.terminal_mean`), and equals `x` at `t1`. The value is given `x_hat` and
`r(x_hat)` as data, so the reward may be differentiable or run on the host.

"Score as Action" (arXiv 2502.01819) uses `cos(pi s/2), sin(pi s/2)` with denoised inputs to both branches.
"""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .process import Time

if TYPE_CHECKING:  # to a type checker, a field without a default would have to come first
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar

Coefficient = Callable[[Time], Time]
ValueNetwork = Callable[[Any, Time, Float[Array, "b *x"], Any], Float[Array, " b"]]


def cosine(s: Time) -> Time:
    """`cos(pi s / 2)`."""
    return jnp.cos(0.5 * jnp.pi * s)


def sine(s: Time) -> Time:
    """`sin(pi s / 2)`."""
    return jnp.sin(0.5 * jnp.pi * s)


def one_minus_cosine(s: Time) -> Time:
    """`1 - cos(pi s / 2)`."""
    return 1 - cosine(s)


def one_minus(s: Time) -> Time:
    """`1 - s`."""
    return 1 - s


def identity(s: Time) -> Time:
    """`s`."""
    return s


def one(s: Time) -> Time:
    """Constant 1."""
    return jnp.ones_like(s)


class AbstractValue(eqx.Module):
    """`V(params, t, x, x_hat, r_hat, cond) -> [b]`, in reward units; `t` scalar or `[b]`."""

    t0: AbstractVar[float]
    t1: AbstractVar[float]
    uses_reward: AbstractVar[bool]
    """Whether the value needs `r_hat = r(x_hat)` before `t1`; this costs one reward evaluation per state."""

    def __check_init__(self):
        if not self.t0 < self.t1:
            raise ValueError(f"t0={self.t0} must be below t1={self.t1}: control time runs from noise to data.")

    @property
    def uses_x_hat(self) -> bool:
        """Whether the value needs `x_hat` itself, and not only its reward. If not, it is given `x` in its place."""
        return self.uses_reward

    @property
    def has_parameters(self) -> bool:
        """Whether the value has parameters to learn."""
        return True

    @abc.abstractmethod
    def __call__(self, params, t: Time, x, x_hat, r_hat: Float[Array, " b"], cond=None) -> Float[Array, " b"]:
        """The values of states `x [b, *x]` at `t`, reward units."""

    def remaining(self, t: Time) -> Time:
        """Remaining fraction of control time, `s = (t1 - t) / (t1 - t0)`."""
        return (self.t1 - t) / (self.t1 - self.t0)


class StructuredValue(AbstractValue):
    """`c_skip(s) r_hat + c_out(s) F(params, t, x_hat or x, cond)`.

    Args:
        network: `F(params, t, x, cond) -> [b]`.
        t0, t1: start and end of the process in control time.
        c_skip, c_out: functions of the remaining fraction `s`, with `c_skip(0) = 1` and `c_out(0) = 0`.
        denoised: whether `F` sees `x_hat` (as published) or the noisy `x`.

    Raises:
        ValueError: for other coefficients at `s = 0`.
    """

    network: ValueNetwork = eqx.field(static=True)
    t0: float = eqx.field(static=True)
    t1: float = eqx.field(static=True)
    c_skip: Coefficient = eqx.field(static=True, default=cosine)
    c_out: Coefficient = eqx.field(static=True, default=sine)
    denoised: bool = eqx.field(static=True, default=True)
    uses_reward: bool = eqx.field(static=True, default=True, init=False)

    def __check_init__(self):
        zero = jnp.zeros(())
        skip, out = float(self.c_skip(zero)), float(self.c_out(zero))
        if skip != 1 or out != 0:
            raise ValueError(
                f"c_skip(0)={skip:g} and c_out(0)={out:g} must be 1 and 0, so that V(t1, x) = r(x); "
                "for example cosine and sine, or one_minus and identity."
            )

    @property
    def uses_x_hat(self) -> bool:
        return self.denoised

    def __call__(self, params, t, x, x_hat, r_hat, cond=None):
        s = self.remaining(t)
        return self.c_skip(s) * r_hat + self.c_out(s) * self.network(params, t, x_hat if self.denoised else x, cond)


class PlainValue(AbstractValue):
    """`F(params, t, x, cond)` before `t1`, and the reward at `t1`: a value without structure, for comparison."""

    network: ValueNetwork = eqx.field(static=True)
    t0: float = eqx.field(static=True)
    t1: float = eqx.field(static=True)
    uses_reward: bool = eqx.field(static=True, default=False, init=False)

    def __call__(self, params, t, x, x_hat, r_hat, cond=None):
        return jnp.where(self.remaining(t) <= 0, r_hat, self.network(params, t, x, cond))


class NoValue(AbstractValue):
    """Zero before `t1`, and the reward at `t1`. With it, advantages of infinite horizon are Monte Carlo returns."""

    t0: float = eqx.field(static=True)
    t1: float = eqx.field(static=True)
    uses_reward: bool = eqx.field(static=True, default=False, init=False)

    @property
    def has_parameters(self) -> bool:
        return False

    def __call__(self, params, t, x, x_hat, r_hat, cond=None):
        return jnp.where(self.remaining(t) <= 0, r_hat, jnp.zeros_like(r_hat))


class X0RewardValue(AbstractValue):
    """`r(x_hat)`: the reward of the x0 prediction, such as the posterior mean. Nothing is learned."""

    t0: float = eqx.field(static=True)
    t1: float = eqx.field(static=True)
    uses_reward: bool = eqx.field(static=True, default=True, init=False)

    @property
    def uses_x_hat(self) -> bool:
        return False

    @property
    def has_parameters(self) -> bool:
        return False

    def __call__(self, params, t, x, x_hat, r_hat, cond=None):
        return r_hat


class GivenValue(AbstractValue):
    """A known function `fn(t, x) -> [b]`, for example the exact value of a problem of `ctrl_diffusion.exact`. Nothing is learned."""

    fn: Callable[[Any, Any], Float[Array, " b"]] = eqx.field(static=True)
    t0: float = eqx.field(static=True)
    t1: float = eqx.field(static=True)
    uses_reward: bool = eqx.field(static=True, default=False, init=False)

    @property
    def has_parameters(self) -> bool:
        return False

    def __call__(self, params, t, x, x_hat, r_hat, cond=None):
        return self.fn(t, x)
