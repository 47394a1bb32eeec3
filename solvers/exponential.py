r"""Exponential Euler: the exact solution of the semilinear SDE if the control is frozen over each step."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax as dfx
import jax.numpy as jnp

from .term import AbstractSemilinearTerm, Interval, Transition


class AbstractSemilinearSolver(dfx.AbstractItoSolver):
    """A solver for semilinear terms. Their noise is additive, so the Ito and Stratonovich forms agree.

    It declares three orders: `order(terms)` for ODEs (no noise), `strong_order(terms)` and `weak_order` for SDEs.
    """

    term_structure: ClassVar = AbstractSemilinearTerm
    interpolation_cls: ClassVar[Callable[..., dfx.LocalLinearInterpolation]] = dfx.LocalLinearInterpolation

    @property
    @abc.abstractmethod
    def weak_order(self) -> int | None:
        """Order for expectations of smooth functions of the state, for SDEs; None if the solver is for ODEs only."""

    def strong_order(self, terms) -> int | float | None:
        return 1

    def init(self, terms, t0, t1, y0, args) -> Any:
        return None

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def standard_increment(interval: Interval):
    """The standard normals of an interval; a scalar zero for a term without noise."""
    return interval.dw / jnp.sqrt(interval.dt)


class ExponentialEuler(AbstractSemilinearSolver):
    r"""`x1 = phi x0 + psi u(t0, x0) + std xi`, with `phi, psi, std` the exact propagator of the term.

    Deterministic order 1, weak order 1; exact if `u` is constant along paths. The frozen variable of the term determines the scheme
    of the literature. With x0 frozen it is DDIM at eta = 0 and ancestral DDPM sampling at eta = 1 (Song et al. 2021, eq. 12; Ho et al.
    2020, eq. 11). At eta > 0 the schemes with epsilon or the score frozen are different ones.

    ??? cite "Reference"
        ```bibtex
        @article{hochbruck2010exponential, author={Hochbruck, Marlis and Ostermann, Alexander},
          title={Exponential integrators}, journal={Acta Numerica}, volume={19}, pages={209--286}, year={2010}}
        @inproceedings{song2021ddim, author={Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
          title={Denoising diffusion implicit models}, booktitle={ICLR}, year={2021}}
        ```
    """

    @property
    def weak_order(self) -> int:
        return 1

    def order(self, terms) -> int | None:
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        u = terms.vf(t0, y0, args).control
        interval = terms.contr(t0, t1, whole_step=True)
        phi, psi, std = interval.transition
        y1 = phi * y0 + psi * u + std * standard_increment(interval)
        return y1, None, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful

    def transition(self, term: AbstractSemilinearTerm, t0, t1) -> Transition:
        """The chain's own step: the propagator of the term."""
        return term.propagator(t0, t1)


def gaussian_transition(solver: dfx.AbstractSolver, term: AbstractSemilinearTerm, t0, t1) -> Transition:
    """The affine Gaussian step of `solver` over `[t0, t1]`.

    It is known for `diffrax.Euler` (Euler-Maruyama) and for every solver with a method `transition(term, t0, t1)`. Others raise
    `TypeError`: a step with several stages is not Gaussian given its start.
    """
    if isinstance(solver, dfx.Euler):
        a, b, g = term.coefficients(t0)
        dt = t1 - t0
        return Transition(1 + a * dt, b * dt, g * jnp.sqrt(dt))
    transition = getattr(solver, "transition", None)
    if transition is None:
        raise TypeError(
            f"solver={type(solver).__name__} has no Gaussian transition per step, so the likelihood of its steps is unknown. "
            "Use ExponentialEuler or diffrax.Euler, explore with ActionNoise (valid for any solver), or give your solver a "
            "method transition(term, t0, t1)."
        )
    return transition(term, t0, t1)
