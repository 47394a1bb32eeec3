r"""The semilinear controlled SDE as one diffrax term.

    dx = (A(t) x + B(t) u(t, x)) dt + G(t) dW

`A`, `B`, `G` are scalars at each time, `u` is the control (for a diffusion model: the network), `x` is a *batched*
state `[b, *x]`. With `u` frozen over a step the equation is linear and has an exact solution, the affine Gaussian
`Transition`; exponential integrators are built from it.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

Scalar = Float[Array, ""]
State = Float[Array, "b *x"]
ControlField = Callable[[Scalar, State, Any], State]


class Transition(NamedTuple):
    r"""One step of a chain, `x1 = phi x0 + psi u + std xi`, with `xi` standard normal and `u = u(t0, x0)`."""

    phi: Scalar
    psi: Scalar
    std: Scalar


class Field(NamedTuple):
    """What a semilinear term's `vf` returns: the control, the whole drift `A x + B u`, and the diffusion `G`."""

    control: State
    drift: State
    diffusion: Scalar


class Interval(NamedTuple):
    """What a semilinear term's `contr` returns: the time step, the Brownian increment, the frozen-control transition."""

    dt: Scalar
    dw: State | Scalar
    transition: Transition


class AbstractSemilinearTerm(dfx.AbstractTerm[Field, Interval]):
    r"""`dx = (A(t) x + B(t) u(t, x)) dt + G(t) dW` with scalar coefficients.

    A solver sees only `vf`, `contr` and `prod` (diffrax wraps terms, so further methods cannot be reached from a solver);
    `contr` therefore carries the exact transition. `prod` is the Euler product, so that `diffrax.Euler` on this term is
    Euler-Maruyama; `terms_for` rewrites the term for solvers which want a drift and a diffusion apart.
    """

    control: eqx.AbstractVar[ControlField]
    path: eqx.AbstractVar[dfx.AbstractBrownianPath | None]

    @abc.abstractmethod
    def coefficients(self, t: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """`A(t), B(t), G(t)`."""

    @abc.abstractmethod
    def propagator(self, t0: Scalar, t1: Scalar) -> Transition:
        """The exact transition over `[t0, t1]` for a control that is frozen at its value at `t0`."""

    def vf(self, t, y, args) -> Field:
        a, b, g = self.coefficients(t)
        u = self.control(t, y, args)
        return Field(u, a * y + b * u, g)

    def contr(self, t0, t1, **kwargs) -> Interval:
        dw = jnp.zeros_like(t1 - t0) if self.path is None else self.path.evaluate(t0, t1, **kwargs)
        return Interval(t1 - t0, dw, self.propagator(t0, t1))

    def prod(self, vf: Field, control: Interval) -> State:
        return vf.drift * control.dt + vf.diffusion * control.dw


class Diffusion(dfx.AbstractTerm[Scalar, Any]):
    """The noise term `G(t) dW` alone, for diffrax solvers that take drift and diffusion apart."""

    coefficient: Callable[[Scalar], Scalar]
    path: dfx.AbstractBrownianPath

    def vf(self, t, y, args) -> Scalar:
        return self.coefficient(t)

    def contr(self, t0, t1, **kwargs):
        return self.path.evaluate(t0, t1, **kwargs)

    def prod(self, vf: Scalar, control):
        return vf * control


def terms_for(solver: dfx.AbstractSolver, term: AbstractSemilinearTerm) -> dfx.AbstractTerm:
    """Rewrite a semilinear term in the structure `solver` declares.

    Solvers that declare `AbstractSemilinearTerm` get the term itself. All others get `ODETerm(drift)` where the term has
    no noise (`path is None`), and `MultiTerm(ODETerm(drift), Diffusion)` where it has.
    """
    structure = solver.term_structure
    if isinstance(structure, type) and issubclass(structure, AbstractSemilinearTerm):
        return term
    drift = dfx.ODETerm(lambda t, y, args: term.vf(t, y, args).drift)
    if term.path is None:
        return drift
    return dfx.MultiTerm(drift, Diffusion(lambda t: term.coefficients(t)[2], term.path))
