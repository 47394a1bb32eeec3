"""One batched diffrax solve of a semilinear term on a grid, at the cost of a hand-written scan."""

from typing import Any

import diffrax as dfx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .fit import terms_for
from .grid import GridSteps, check_grid
from .term import AbstractSemilinearTerm, State
from .unrolled import unrolled


def integrate(
    term: AbstractSemilinearTerm,
    solver: dfx.AbstractSolver,
    ts,
    x0: State,
    args: Any = None,
    *,
    every_step: bool = False,
    adjoint: dfx.AbstractAdjoint | None = None,
) -> Float[Array, "..."]:
    """Integrate `term` from `ts[0]` to `ts[-1]` with one solver step per grid interval.

    Args:
        term: the SDE; its path must have the same grid (`KeyedPath(ts, ...)`, `RecordedPath(ts, ...)`) or be a Brownian tree.
        solver: any diffrax solver whose `term_structure` fits (see `terms_for`).
        ts: `[n]` ascending times, a numpy array or a list. They are checked during tracing.
        x0: initial state `[b, *x]`; times are cast to its dtype.
        args: passed to the control as `control(t, x, args)`.
        every_step: return the states at all grid times `[n, b, *x]`, and not only the last ones `[b, *x]`.
        adjoint: `None` is forward only (`diffrax.ForwardMode`). For reverse mode pass
            `diffrax.RecursiveCheckpointAdjoint(checkpoints=n - 1)`, which is fast, or fewer checkpoints for less memory.
    """
    return solve(term, solver, jnp.asarray(check_grid(ts), x0.dtype), x0, args, every_step=every_step, adjoint=adjoint)


def solve(
    term: AbstractSemilinearTerm,
    solver: dfx.AbstractSolver,
    ts: Float[Array, " n"],
    x0: State,
    args: Any = None,
    *,
    every_step: bool = False,
    adjoint: dfx.AbstractAdjoint | None = None,
) -> Float[Array, "..."]:
    """`integrate` on a grid that may be traced. The grid is not checked.

    The result is nan if the solver fails, for example if the equations of an implicit solver do not converge.
    """
    solution = dfx.diffeqsolve(
        terms_for(solver, term),
        solver if term.path is None else unrolled(solver),
        ts[0],
        ts[-1],
        None,
        x0,
        args,
        saveat=dfx.SaveAt(t0=True, steps=True) if every_step else dfx.SaveAt(t1=True),
        stepsize_controller=GridSteps(ts),
        adjoint=dfx.ForwardMode() if adjoint is None else adjoint,
        max_steps=len(ts) - 1,
        throw=False,
    )
    ys = jnp.where(solution.result == dfx.RESULTS.successful, jnp.asarray(solution.ys), jnp.nan)
    return ys if every_step else ys[0]
