"""The interface of problems with a known optimum. An experiment can loop over them."""

import abc
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ..process import AbstractControlledSDE, Cond, Params, State, Time

if TYPE_CHECKING:  # to a type checker, a field without a default would have to come first
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar

Number = Float[Array, ""]


class AbstractControlProblem(eqx.Module):
    r"""Maximise `J(a) = E^a[ r(X(t1)) - int f(t, X) dt - lambda int k |a - a_ref|^2 dt ]`; the solution is known.

    `f` is `process.running_cost`, `k |a - a_ref|^2` is `process.kl_rate`. Actions are controls, `control(params, t, x, cond)`.
    They do not use `params` and `cond`: pass `None`. Times are scalars or `[b]`; values sum over state dimensions.

    Attributes:
        process: the controlled SDE, with the running cost and the law of the start.
        reward: `r`, a differentiable JAX function from `[b, *shape]` to `[b]`.
        kl_weight: the temperature `lambda > 0`.
        shape: shape of one state.
        steps: the usual number of equal steps.
    """

    process: AbstractVar[AbstractControlledSDE]
    reward: AbstractVar[Any]  # a callable; pyright takes an abstract field of that type for a method
    kl_weight: AbstractVar[float]
    shape: AbstractVar[tuple[int, ...]]
    steps: AbstractVar[int]

    @abc.abstractmethod
    def reference_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """The reference action, whose KL penalty is zero."""

    @abc.abstractmethod
    def optimal_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """`a* = a_ref + G^2 / (lambda B) grad V*`."""

    @abc.abstractmethod
    def value(self, t: Time, x: State) -> Float[Array, " b"]:
        """Soft value `V*(t, x) = lambda log E^ref[exp((r(X(t1)) - int_t^t1 f) / lambda) | X(t) = x]`."""

    @abc.abstractmethod
    def value_gradient(self, t: Time, x: State) -> State:
        """`grad V*(t, x)`."""

    @abc.abstractmethod
    def optimal_value(self) -> Number:
        """`J* = E V*(t0, X(t0))`, summed over state dimensions."""

    @abc.abstractmethod
    def sample_optimal(self, keys: Key[Array, " b"]) -> Float[Array, "b *x"]:
        """Independent draws of `X(t1)` under the optimal action, one per key, without simulation."""

    def grid(self, steps: int | None = None) -> np.ndarray:
        """The process's grid of `steps` equal steps (default: the problem's own number)."""
        return self.process.grid(self.steps if steps is None else steps)


def total(x: State) -> Float[Array, " b"]:
    """Sum over state dimensions."""
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))
