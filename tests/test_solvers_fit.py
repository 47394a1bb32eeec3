"""Adaptive steps for ODEs and SDEs; a solver and a term that do not fit say what would."""

import diffrax as dfx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

from ctrl_diffusion.solvers import (
    DPMSolver2S,
    DPMSolver3S,
    DPMSolverPP2M,
    ExponentialHeun,
    ExponentialSRA,
    brownian_tree,
    integrate,
    integrate_adaptive,
    terms_for,
)
from experiments.solvers.problems import NO_ARGS, gaussian_flow, gaussian_score, mixture_score, process
from tests.solver_problems import GRID, label, noisy_term, start

ADAPTIVE_ODE = [dfx.Tsit5(), dfx.Kvaerno3(), DPMSolver2S(), DPMSolver3S(), ExponentialHeun()]


@pytest.mark.parametrize("solver", ADAPTIVE_ODE, ids=label)
def test_adaptive_ode(solver):
    x, ends = start(), (process().t0, process().t1)
    got = integrate_adaptive(process().term(gaussian_score, None), solver, *ends, x, NO_ARGS, rtol=1e-4, atol=1e-4)
    assert got.succeeded and 5 < got.steps < 1500
    np.testing.assert_allclose(got.x, gaussian_flow(*(jnp.asarray(t) for t in ends), x), atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [dfx.HalfSolver(dfx.EulerHeun()), dfx.ShARK(), ExponentialSRA()], ids=label)
def test_adaptive_sde(solver):
    """Against a fine fixed grid on the same Brownian tree."""
    x, ends = start(), (0.1, 0.9)
    tree = brownian_tree(solver, *ends, jr.key(5), x, 1e-3)
    term = process(1.0).term(mixture_score, tree)
    got = integrate_adaptive(term, solver, *ends, x, NO_ARGS, rtol=2e-2, atol=2e-2)
    assert got.succeeded and got.steps > 5
    inner = solver.solver if isinstance(solver, dfx.HalfSolver) else solver
    fine = integrate(term, inner, np.linspace(*ends, 301), x, NO_ARGS)
    np.testing.assert_allclose(got.x, fine, atol=0.15)


def test_adaptive_says_what_is_missing():
    ode, noisy = process().term(mixture_score, None), noisy_term(dfx.Euler())
    with pytest.raises(TypeError, match="brownian_tree"):
        integrate_adaptive(noisy, dfx.HalfSolver(dfx.Heun()), 0.0, 0.9, start(), NO_ARGS)
    with pytest.raises(TypeError, match="HalfSolver"):
        integrate_adaptive(ode, DPMSolverPP2M(), 0.0, 0.9, start(), NO_ARGS, dt0=0.01)
    with pytest.raises(TypeError, match="declares no order for SDEs"):
        tree = brownian_tree(DPMSolver3S(), 0.0, 0.9, jr.key(0), start())
        integrate_adaptive(process(1.0).term(mixture_score, tree), DPMSolver3S(), 0.0, 0.9, start(), NO_ARGS)
    assert not integrate_adaptive(ode, dfx.Tsit5(), 0.0, 0.9, start(), NO_ARGS, max_steps=3).succeeded


MISFITS = [
    (dfx.Tsit5(), "noise", "ODEs.*diffrax.SRA1.*eta = 0"),
    (dfx.Kvaerno3(), "noise", "ODEs.*ExponentialEuler"),
    (dfx.EulerHeun(), "no noise", "no noise.*diffrax.Tsit5.*eta > 0"),
    (dfx.SRA1(), "no noise", "no noise.*UniPC"),
    (dfx.ALIGN(), "noise", "cannot give.*ExponentialSRA"),
    (dfx.SemiImplicitEuler(), "no noise", "cannot give.*diffrax.Heun"),
    (dfx.ShARK(), "no area", "AbstractSpaceTimeLevyArea.*levy_area_for"),
    (ExponentialSRA(), "no area", "AbstractSpaceTimeLevyArea.*levy_area_for"),
    (DPMSolver3S(), "noise", "DPMSolver3S integrates ODEs"),
]


@pytest.mark.parametrize(("solver", "kind", "remedy"), MISFITS, ids=label)
def test_a_misfit_of_solver_and_term_says_what_would_fit(solver, kind, remedy):
    term = process().term(mixture_score, None) if kind == "no noise" else noisy_term(solver if kind == "noise" else dfx.Euler())
    with pytest.raises(TypeError, match=f"(?s)solver={label(solver)}.*{remedy}|{remedy}"):
        integrate(term, solver, GRID, start(), NO_ARGS)


def test_an_implicit_solver_that_fails_gives_nan():
    term = process().term(mixture_score, None)
    solver = dfx.Kvaerno3(root_finder=optx.Chord(rtol=1e-12, atol=1e-12))  # below rounding: cannot converge
    assert np.all(np.isnan(integrate(term, solver, np.linspace(0.0, 0.9, 5), start(), NO_ARGS)))


def test_only_semilinear_terms_are_rewritten():
    with pytest.raises(TypeError, match="term=ODETerm"):
        terms_for(dfx.Euler(), dfx.ODETerm(lambda t, y, args: y))
