"""Rewrites a semilinear term for any diffrax solver, or raises an error that names solvers which fit."""

from typing import Any, get_args, get_origin

import diffrax as dfx

from .path import minimal_levy_area
from .term import AbstractSemilinearTerm, Diffusion

_ODE = "ExponentialEuler, DPMSolverPP2M or UniPC from this library, or diffrax.Heun, diffrax.Tsit5, diffrax.Kvaerno3"
_SDE = "ExponentialEuler, DPMSolverPP2M or ExponentialSRA from this library, or diffrax.Euler, diffrax.Heun, diffrax.SRA1"


def terms_for(solver: dfx.AbstractSolver, term: AbstractSemilinearTerm | dfx.AbstractTerm) -> dfx.AbstractTerm:
    """Rewrite a semilinear term in the structure that `solver` declares. `TypeError` if they do not fit.

    Solvers that declare `AbstractSemilinearTerm` get the term itself. All others get `ODETerm(drift)` if the term has no noise
    (`path is None`), and `MultiTerm(ODETerm(drift), Diffusion)` if it has. Implicit-explicit solvers get
    `MultiTerm(ODETerm(B u), ODETerm(A x))`; the linear part is implicit.
    """
    name, structure = type(solver).__name__, solver.term_structure
    if not isinstance(term, AbstractSemilinearTerm):
        raise TypeError(
            f"term={type(term).__name__} must be an AbstractSemilinearTerm. Call diffrax.diffeqsolve directly for other terms."
        )
    semilinear = isinstance(structure, type) and issubclass(structure, AbstractSemilinearTerm)
    if not semilinear and not _is_general(structure):
        raise TypeError(
            f"solver={name} asks for the terms {structure}, which a semilinear term cannot give. "
            f"With noise use {_SDE}. Without noise use {_ODE}."
        )
    if term.path is not None:
        _check_stochastic(solver, term, name)
    if semilinear:
        return term
    drift = dfx.ODETerm(lambda t, y, args: term.vf(t, y, args).drift)
    if term.path is not None:
        return dfx.MultiTerm(drift, Diffusion(lambda t: term.coefficients(t)[2], term.path))
    if isinstance(solver, dfx.AbstractImplicitSolver) and _wants_two(structure):
        return _split(term)
    if _wants_two(structure):
        raise TypeError(
            f"solver={name} asks for a drift and a diffusion, but the term has no noise (path=None). Use {_ODE}; or give the "
            "term a Brownian path (for a diffusion process: eta > 0)."
        )
    return drift


def _split(term: AbstractSemilinearTerm) -> dfx.MultiTerm:
    def controlled(t: Any, y, args):
        return term.coefficients(t)[1] * term.vf(t, y, args).control

    def linear(t: Any, y, args):
        return term.coefficients(t)[0] * y

    return dfx.MultiTerm(dfx.ODETerm(controlled), dfx.ODETerm(linear))


def _check_stochastic(solver, term, name: str) -> None:
    if not isinstance(solver, dfx.AbstractItoSolver | dfx.AbstractStratonovichSolver):
        raise TypeError(
            f"solver={name} integrates ODEs, but the term has noise (its path is a {type(term.path).__name__}). Use {_SDE}; or "
            "an ODE term with path=None (for a diffusion process: eta = 0). If your own solver handles noise, make it a subclass of "
            "diffrax.AbstractItoSolver."
        )
    wanted, given = minimal_levy_area(solver), getattr(term.path, "levy_area", None)
    if isinstance(given, type) and not issubclass(given, wanted):
        raise TypeError(
            f"solver={name} needs a path with {wanted.__name__}, but path={type(term.path).__name__} gives {given.__name__}. "
            "Make the path with levy_area=levy_area_for(solver)."
        )


def _wants_two(structure) -> bool:
    return get_origin(structure) is dfx.MultiTerm


def _is_general(structure) -> bool:
    """Whether `ODETerm`s and a `Diffusion` fit the structure: it is `AbstractTerm`, or a `MultiTerm` of two of those."""
    if _wants_two(structure):
        parts = get_args(get_args(structure)[0])
        return len(parts) == 2 and all(_is_general(part) for part in parts)
    origin = get_origin(structure) or structure
    return isinstance(origin, type) and issubclass(dfx.ODETerm, origin)
