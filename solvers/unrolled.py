"""diffrax's explicit Runge-Kutta methods with their stages written out.

diffrax computes the stages of a step in a loop over a buffer, which a compiler cannot optimise. For additive noise `G(t) dW` the noise of
every stage is a combination of the step's increment `W` and Levy area `H`. Its coefficients depend on the grid only, and the stages are
a few sums.
"""

from collections.abc import Callable, Iterable
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp


class Unrolled(dfx.AbstractStratonovichSolver):
    """The step of `solver`, an explicit (stochastic) Runge-Kutta method, on an `ODETerm` and a `Diffusion`, without error estimate.

    Results are those of `solver` up to rounding.
    """

    solver: Any  # dfx.AbstractERK or dfx.AbstractSRK

    term_structure = dfx.MultiTerm[tuple[dfx.AbstractTerm, dfx.AbstractTerm]]
    interpolation_cls = dfx.LocalLinearInterpolation

    def order(self, terms) -> int | None:
        return self.solver.order(terms)

    def strong_order(self, terms) -> Any:
        return self.solver.strong_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        (drift, diffusion), tableau, h = terms.terms, self.solver.tableau, t1 - t0
        increment = diffusion.contr(t0, t1, use_levy=True)
        times = [t0, *(t1 if c == 1 else t0 + float(c) * h for c in tableau.c)]
        ignored = getattr(tableau, "ignore_stage_f", None)
        evaluated = [ignored is None or not ignored[j] for j in range(len(times))]
        if sum(evaluated) > 2:
            increment = drawn_once(increment, t0 < t1)
        normals = (increment.W, getattr(increment, "H", None))
        rows = ((), *(tableau.a_lower if isinstance(self.solver, dfx.AbstractERK) else tableau.a))
        stages, step = noise_coefficients(tableau, lambda t: diffusion.vf(t, y0, args), times, t1)
        slopes: list[Any] = []
        for j, (t, noise) in enumerate(zip(times, stages)):
            y = y0 + h * combine(rows[j], slopes) + combine(noise, normals)
            slopes.append(drift.vf(t, y, args) if evaluated[j] else None)
        y1 = y0 + h * combine(tableau.b_sol, slopes) + combine(step, normals)
        return y1, None, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def drawn_once(increment: Any, always: Any) -> Any:
    """`increment`, drawn only once. `always` is true, but the compiler does not know it.

    On a CPU, XLA fuses a step of three stages and its noise into one loop, and computes the noise again at each place that uses it. The
    result of a conditional is computed before the loop.
    """

    def handed_on(increment):
        return jax.lax.cond(always, lambda v: v, lambda v: jax.tree.map(jnp.zeros_like, v), increment)

    return jax.lax.platform_dependent(increment, cpu=handed_on, default=lambda v: v)


def combine(coefficients: Iterable, values: Iterable) -> Any:
    """`sum_i c_i v_i` without coefficients that are zero by construction; 0 for an empty sum."""
    pairs = [(c, v) for c, v in zip(coefficients, values) if v is not None and not (isinstance(c, float) and c == 0)]
    terms = [jnp.asarray(c, v.dtype) * v for c, v in pairs]
    return sum(terms[1:], terms[0]) if terms else 0.0


def noise_coefficients(tableau, g: Callable, times: list, t1) -> tuple[list[tuple], tuple]:
    """Coefficients of the increment and of the Levy area at every stage, and at the end of the step.

    An explicit method applies its tableau to `G dW`. A stochastic method for additive noise uses `G(t0)` at every stage, and corrects for
    the change of `G` at the end. A stochastic method for general noise uses `G` at the stages before.
    """
    if isinstance(tableau, dfx.ButcherTableau):
        at = [g(t) for t in times]
        return [(combine(row, at),) for row in ((), *tableau.a_lower)], (combine(tableau.b_sol, at),)
    areas = [tableau.coeffs_w] + ([] if tableau.coeffs_hh is None else [tableau.coeffs_hh])
    if tableau.is_additive_noise():
        g0, g1 = g(times[0]), g(t1)
        stages = [tuple(combine([area.a[j]], [g0]) for area in areas) for j in range(len(times))]
        change = (0.5 * (g1 - g0), g0 - g1)
        return stages, tuple(combine([area.b_sol], [g0]) + c for area, c in zip(areas, change))
    at = [g(t) for t in times]
    stages = [tuple(combine(((), *area.a)[j], at) for area in areas) for j in range(len(times))]
    return stages, tuple(combine(area.b_sol, at) for area in areas)


def unrolled(solver: dfx.AbstractSolver) -> dfx.AbstractSolver:
    """`solver` as `Unrolled` if it is one of diffrax's explicit methods; else unchanged."""
    explicit = isinstance(solver, dfx.AbstractERK) and isinstance(solver, dfx.AbstractStratonovichSolver)
    stochastic = isinstance(solver, dfx.AbstractSRK) and solver.tableau.coeffs_kk is None
    return Unrolled(solver) if explicit or stochastic else solver
