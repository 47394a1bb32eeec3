"""Adaptive steps: one batched solve with a PID controller, for ODEs and, on a Brownian tree, for SDEs."""

from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from .fit import terms_for
from .path import KeyedPath, RecordedPath, levy_area_for
from .term import AbstractSemilinearTerm, Scalar, State


class Adaptive(NamedTuple):
    """The final state and the cost of the solve. `succeeded` is false if `max_steps` steps did not reach the end."""

    x: State
    steps: Int[Array, ""]
    rejected: Int[Array, ""]
    succeeded: Bool[Array, ""]


def brownian_tree(
    solver: dfx.AbstractSolver, t0, t1, key: Key[Array, ""], like: Float[Array, "b *x"], tolerance: float = 1e-4
) -> dfx.VirtualBrownianTree:
    """A Brownian path with increments over any interval of `[t0, t1]`, with the Levy area that `solver` needs, in the shape of a state.

    `tolerance` is in units of time and should be well below the smallest step. One key is used for the whole batch.
    """
    t0, t1 = jnp.asarray(t0, like.dtype), jnp.asarray(t1, like.dtype)
    shape = jax.ShapeDtypeStruct(like.shape, like.dtype)
    return dfx.VirtualBrownianTree(t0, t1, tolerance, shape, key, levy_area=levy_area_for(solver))


def integrate_adaptive(
    term: AbstractSemilinearTerm,
    solver: dfx.AbstractSolver,
    t0,
    t1,
    x0: State,
    args: Any = None,
    *,
    rtol: float | Scalar = 1e-3,
    atol: float | Scalar = 1e-3,
    dt0: Any = None,
    max_steps: int = 4096,
    adjoint: dfx.AbstractAdjoint | None = None,
) -> Adaptive:
    """Integrate `term` from `t0` to `t1`. A PID controller chooses the steps, one step size for the whole batch.

    Args:
        term: the SDE, with `path=None` (ODE) or a path with increments over any interval (`brownian_tree`).
        solver: any fitting solver that estimates its error: most of diffrax's, and `DPMSolver2S`, `ExponentialSRA`,
            `ExponentialHeun`, `DPMSolver3S` of this library; wrap others in `diffrax.HalfSolver`.
        rtol, atol: tolerances of one step, in the root mean square over the batch and the state.
        dt0: first step; None: diffrax chooses it (ODE), or a hundredth of the span (SDE).
        max_steps: largest number of steps, including rejected ones.
        adjoint: as in `integrate`; None is forward only.
    """
    stochastic = term.path is not None
    if isinstance(term.path, KeyedPath | RecordedPath):
        raise TypeError(
            f"path={type(term.path).__name__} has increments over the intervals of its grid only, but adaptive steps need any interval: "
            "use brownian_tree(solver, t0, t1, key, x0)."
        )
    terms = terms_for(solver, term)
    order = solver.strong_order(terms) if stochastic else solver.order(terms)
    if order is None:
        raise TypeError(f"solver={type(solver).__name__} declares no order for {'SDEs' if stochastic else 'ODEs'}.")
    t0, t1 = jnp.asarray(t0, x0.dtype), jnp.asarray(t1, x0.dtype)
    if dt0 is None and stochastic:
        dt0 = (t1 - t0) / 100
    controller = dfx.PIDController(
        rtol=rtol,
        atol=atol,
        error_order=order + 0.5 if stochastic else order,
        # an SDE's error is rough: react slowly
        pcoeff=0.1 if stochastic else 0.0,
        icoeff=0.3 if stochastic else 1.0,
    )
    try:
        solution = dfx.diffeqsolve(
            terms,
            solver,
            t0,
            t1,
            dt0,
            x0,
            args,
            saveat=dfx.SaveAt(t1=True),
            stepsize_controller=controller,
            adjoint=dfx.ForwardMode() if adjoint is None else adjoint,
            max_steps=max_steps,
            throw=False,
        )
    except RuntimeError as error:
        if "error estimate" not in str(error):
            raise
        raise TypeError(
            f"solver={type(solver).__name__} does not estimate its error, so its steps cannot be adapted: wrap it as "
            "diffrax.HalfSolver(solver), or use integrate on a grid."
        ) from error
    return Adaptive(
        jnp.asarray(solution.ys)[0],
        jnp.asarray(solution.stats["num_accepted_steps"]),
        jnp.asarray(solution.stats["num_rejected_steps"]),
        solution.result == dfx.RESULTS.successful,
    )
