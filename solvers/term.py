r"""The semilinear controlled SDE as one diffrax term.

    dx = (A(t) x + B(t) u(t, x)) dt + G(t) dW

`A`, `B`, `G` are scalars at each time, `u` is the control (for a diffusion model: the network), `x` is a *batched*
state `[b, *x]`. If `u` is frozen over a step, the equation is linear and has an exact solution, the affine Gaussian
`Transition`. Exponential integrators are built from it.
"""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .path import interval_index
from .quadrature import gauss_legendre, moment_fractions

if TYPE_CHECKING:  # to a type checker, a field without a default would have to come first
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar

Scalar = Float[Array, ""]
State = Float[Array, "b *x"]
ControlField = Callable[[Scalar, State, Any], State]


class Transition(NamedTuple):
    r"""One step of a chain, `x1 = phi x0 + psi u + std xi`, with `xi` standard normal and `u = u(t0, x0)`."""

    phi: Scalar
    psi: Scalar
    std: Scalar


class Field(NamedTuple):
    """The result of a semilinear term's `vf`: the control, the whole drift `A x + B u`, and the diffusion `G`."""

    control: State
    drift: State
    diffusion: Scalar


class Interval(NamedTuple):
    r"""The result of a semilinear term's `contr`.

    The clock is an increasing function of time; the control is a smooth function of it (log-SNR for a diffusion model). Multistep
    and multistage solvers use polynomials in the clock. `theta = (clock(s) - clock(t0)) / (clock(t1) - clock(t0))`.

    Attributes:
        dt: `t1 - t0`.
        dw: the Brownian increment; a scalar zero if the term has no noise.
        transition: the exact transition for a control that is frozen over the interval.
        diffusion: `G` at `t0` and `t1`.
        clock: the clock at `t0` and `t1`; infinite at a time without noise.
        rate: `k` if `Phi(s, t1) B(s) ds` is proportional to `exp(-k (clock(t1) - clock(s))) dclock`, else nan.
        moments: `int Phi(s, t1) B(s) theta(s)^j ds` for `j = 0, 1, ...`, the requested number of them; the first is `psi`.
        times: the times of the requested clock values.
    """

    dt: Scalar
    dw: Any
    transition: Transition
    diffusion: tuple[Scalar, Scalar]
    clock: tuple[Scalar, Scalar]
    rate: Scalar
    moments: tuple[Scalar, ...] = ()
    times: tuple[Scalar, ...] = ()


class AbstractSemilinearTerm(dfx.AbstractTerm[Any, Any]):  # [Field, Interval]; beartype refuses these for the bounds of diffrax
    r"""`dx = (A(t) x + B(t) u(t, x)) dt + G(t) dW` with scalar coefficients.

    Solvers can only call `vf`, `contr` and `prod`, because diffrax wraps terms. The result of `contr` therefore has the exact
    transition. `prod` is the Euler product, so `diffrax.Euler` on this term is Euler-Maruyama. `terms_for` rewrites the term for
    solvers that need a drift and a diffusion term.

    A subclass implements `coefficients` and `propagator`. `clock`, `time_at` and `rate` have defaults: the clock is time.
    """

    control: AbstractVar[ControlField]
    path: AbstractVar[dfx.AbstractBrownianPath | None]

    @abc.abstractmethod
    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """`A(t), B(t), G(t)`."""

    @abc.abstractmethod
    def propagator(self, t0: Scalar, t1: Scalar) -> Transition:
        """The exact transition over `[t0, t1]` for a control that is frozen at its value at `t0`."""

    def clock(self, t: Scalar) -> Scalar:
        """An increasing function of time; the control is a smooth function of it."""
        return t

    def time_at(self, clock: Scalar) -> Scalar:
        """The inverse of `clock`."""
        return clock

    def rate(self) -> float | None:
        """`k` if `Phi(s, t1) B(s) ds` is proportional to `exp(-k (clock(t1) - clock(s))) dclock` on every interval."""
        return None

    def moments(self, t0: Scalar, t1: Scalar, count: int) -> tuple[Scalar, ...]:
        """`int Phi(s, t1) B(s) theta(s)^j ds`, `j < count`: in closed form if there is a `rate`, else by quadrature."""
        psi, rate = self.propagator(t0, t1).psi, self.rate()
        c0, c1 = self.clock(t0), self.clock(t1)
        if rate is not None:
            return tuple(psi * fraction for fraction in moment_fractions(-rate * (c1 - c0), count))
        s, weights = gauss_legendre(t0, t1)
        weights = weights * jax.vmap(lambda s: self.propagator(s, t1).phi * self.coefficients(s)[1])(s)
        theta = (jax.vmap(self.clock)(s) - c0) / (c1 - c0)
        return tuple(psi * jnp.sum(weights * theta**j) / jnp.sum(weights) for j in range(count))

    def vf(self, t: Any, y, args) -> Field:
        a, b, g = self.coefficients(t)
        u = self.control(t, y, args)
        return Field(u, a * y + b * u, g)

    def contr(
        self, t0: Any, t1: Any, *, moments: int = 0, clock_at: tuple = (), whole_step: bool = False, **kwargs
    ) -> Interval:
        """The interval `[t0, t1]`.

        Args:
            t0, t1: its ends.
            moments: number of moments to return.
            clock_at: clock values whose times to return.
            whole_step: whether `[t0, t1]` is a step of the solver. If the path has a grid, the coefficients of all steps are then
                computed together before the first step, since they do not depend on the state, and looked up.
            kwargs: arguments for the path.
        """
        dw = jnp.zeros_like(t1 - t0) if self.path is None else self.path.evaluate(t0, t1, **kwargs)
        grid = getattr(self.path, "ts", None)
        if whole_step and grid is not None and not clock_at:
            rows = jax.vmap(lambda a, b: self._interval(a, b, moments, ()))(grid[:-1], grid[1:])
            i = interval_index(grid, t0, t1)
            return jax.tree.map(lambda v: v[i], rows)._replace(dw=dw)
        return self._interval(t0, t1, moments, clock_at)._replace(dw=dw)

    def _interval(self, t0: Scalar, t1: Scalar, moments: int, clock_at: tuple) -> Interval:
        """The interval without its noise."""
        rate = self.rate()
        return Interval(
            dt=t1 - t0,
            dw=None,
            transition=self.propagator(t0, t1),
            diffusion=(self.coefficients(t0)[2], self.coefficients(t1)[2]),
            clock=(self.clock(t0), self.clock(t1)),
            rate=jnp.full_like(t1 - t0, jnp.nan if rate is None else rate),
            moments=self.moments(t0, t1, moments) if moments else (),
            times=tuple(self.time_at(c) for c in clock_at),
        )

    def prod(self, vf: Field, control: Interval) -> State:
        return vf.drift * control.dt + vf.diffusion * control.dw


class Diffusion(dfx.AbstractTerm[Any, Any]):
    """The noise term `G(t) dW`, for diffrax solvers that take a drift and a diffusion term."""

    coefficient: Callable[[Scalar], Scalar]
    path: dfx.AbstractBrownianPath

    def vf(self, t: Any, y, args) -> Scalar:
        return self.coefficient(t)

    def contr(self, t0, t1, **kwargs):
        return self.path.evaluate(t0, t1, **kwargs)

    def prod(self, vf: Scalar, control):
        return vf * control
