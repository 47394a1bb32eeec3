"""Every solver has the order that it declares: deterministic, weak and strong, in float64, on exact scores."""

from functools import partial

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from ctrl_diffusion.predictions import EPSILON, SCORE, X0, V
from ctrl_diffusion.solvers import (
    DDIM,
    ERSDE,
    DPMSolver2S,
    DPMSolver3S,
    DPMSolverPP2M,
    DPMSolverPP3M,
    EDMHeun,
    ExponentialAdamsBashforth,
    ExponentialEuler,
    ExponentialHeun,
    ExponentialSRA,
    UniPC,
    er_sde_noise_scale,
    uniform,
)
from ctrl_diffusion.solvers.multistep import bootstrap
from experiments.solvers.problems import (
    MIDDLE,
    NO_ARGS,
    FinePath,
    both_scores,
    endpoint,
    gaussian_flow,
    gaussian_score,
    grids,
    mixture_score,
    ode_reference,
    process,
    slope,
    weak_errors,
)

TOLERANCE = 0.2


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def name(value):
    if isinstance(value, dfx.AbstractSolver):
        fields = {k: v for k, v in vars(value).items() if k in ("steps", "curvature", "bootstrap", "half_rule", "fraction")}
        return type(value).__name__ + "".join(f"-{k}={v:.3g}" if v is not True else f"-{k}" for k, v in fields.items() if v)
    return getattr(value, "name", None)


@pytest.fixture(scope="module")
def starts():
    with jax.enable_x64(True):
        x0 = jr.normal(jr.key(0), (32, 2), jnp.float64)
        return {t0: (x0, ode_reference(x0, t0)) for t0 in (0.0, MIDDLE)}


def ode_slopes(starts, solver, frozen, t0, counts):
    x0, reference = starts[t0]
    run = endpoint(process(frozen=frozen).term(both_scores, None), solver)
    errors = [run(x0, grid, n) - reference for grid, n in zip(grids(counts, t0=t0), counts)]
    return [slope(counts, [jnp.sqrt(jnp.mean(e[rows] ** 2)) for e in errors]) for rows in (slice(0, 16), slice(16, 32))]


ODE = [
    (ExponentialEuler(), X0),
    (ExponentialEuler(), SCORE),
    (DDIM(), X0),
    (DPMSolverPP2M(), X0),
    (DPMSolverPP2M(), EPSILON),
    (DPMSolverPP3M(), X0),
    (DPMSolverPP3M(), SCORE),
    (DPMSolverPP3M(curvature=0.5), X0),
    (ExponentialAdamsBashforth(2), EPSILON),
    (ExponentialAdamsBashforth(3), V),
    (ExponentialAdamsBashforth(4), SCORE),
    (ERSDE(1), X0),
    (ERSDE(2), X0),
    (ERSDE(3), X0),
    (DPMSolver2S(), X0),
    (DPMSolver2S(), EPSILON),
    (DPMSolver2S(fraction=0.75), SCORE),
    (ExponentialSRA(), X0),
    (DPMSolver3S(), X0),
    (DPMSolver3S(), EPSILON),
    (ExponentialHeun(), EPSILON),
    (EDMHeun(), EPSILON),
    (UniPC(1), X0),
    (UniPC(2), X0),
    (UniPC(2, half_rule=False), EPSILON),
    (UniPC(3), SCORE),
]


@pytest.mark.parametrize(("solver", "frozen"), ODE, ids=name)
def test_deterministic_order(starts, solver, frozen):
    counts = [128, 256, 512] if solver.order(None) < 4 else [64, 128, 256]  # order 4 meets rounding
    for measured in ode_slopes(starts, solver, frozen, 0.0, counts):
        assert measured == pytest.approx(solver.order(None), abs=TOLERANCE)


MULTISTEP = [DPMSolverPP3M, ERSDE, partial(ExponentialAdamsBashforth, 4)]


@pytest.mark.parametrize("make", MULTISTEP, ids=["DPMSolverPP3M", "ERSDE", "ExponentialAdamsBashforth-4"])
def test_starting_history_keeps_the_order_from_a_start_that_is_not_pure_noise(starts, make):
    order = make().order(None)
    counts = [128, 256, 512] if order < 4 else [64, 128, 256]
    with_history = ode_slopes(starts, make(bootstrap=True), X0, MIDDLE, counts)
    assert min(with_history) > order - TOLERANCE
    assert min(ode_slopes(starts, make(), X0, MIDDLE, counts)) < 2.6  # first-order start-up error: two in the limit


@pytest.mark.slow
def test_starting_history_is_the_control_before_the_start_to_third_order():
    x0 = jr.normal(jr.key(0), (8, 1), jnp.float64)
    term, start = process().term(gaussian_score, None), jnp.asarray(MIDDLE)
    c0, errors, steps = term.clock(start), [], [0.1, 0.05, 0.025]
    for h in steps:
        history = bootstrap(2, term, start, term.time_at(c0 + h), x0, NO_ARGS)
        earlier = [term.time_at(c0 - 0.5 * h), term.time_at(c0 - h)]
        np.testing.assert_allclose(history.clocks, [c0 - 0.5 * h, c0 - h], rtol=1e-10)
        exact = [term.vf(t, gaussian_flow(start, t, x0), NO_ARGS).control for t in earlier]
        errors.append(max(jnp.max(jnp.abs(u - v)) for u, v in zip(history.values, exact)))
    assert -slope(steps, errors) == pytest.approx(3, abs=TOLERANCE)


TIGHT = dfx.VeryChord(rtol=1e-10, atol=1e-10)
DIFFRAX_ODE = [
    dfx.Euler(),
    dfx.Heun(),
    dfx.Midpoint(),
    dfx.Ralston(),
    dfx.Tsit5(),
    dfx.Dopri5(),
    dfx.Kvaerno3(root_finder=TIGHT),
]


@pytest.mark.slow
@pytest.mark.parametrize("solver", DIFFRAX_ODE, ids=name)
def test_diffrax_deterministic_order(solver):
    """The same term at diffrax's declared orders (uniform time, away from the stiff end)."""
    x0 = jr.normal(jr.key(0), (8, 1), jnp.float64)
    counts = [64, 128, 256]
    run = endpoint(process().term(gaussian_score, None), solver)
    errors = []
    for n in counts:
        ts = jnp.asarray(uniform(0.2, 0.8, n))
        errors.append(jnp.linalg.norm(run(x0, ts, n) - gaussian_flow(ts[0], ts[-1], x0)))
    assert slope(counts, errors) == pytest.approx(solver.order(None), abs=TOLERANCE)


def weak_slope(eta, frozen, solver, counts, perturbed=True):
    return slope(counts, weak_errors(eta, frozen, solver, counts, perturbed))


WEAK = [
    (ExponentialEuler(), X0, 1.0),
    (DDIM(), X0, 1.0),
    (DDIM(), X0, 0.5),
    (DPMSolverPP2M(), X0, 1.0),
    (DPMSolverPP2M(), EPSILON, 0.5),
    (DPMSolverPP3M(), X0, 1.0),
    (ExponentialAdamsBashforth(2), X0, 1.0),
    (ExponentialAdamsBashforth(3), SCORE, 1.0),
    (ERSDE(1), X0, 1.0),
    (ERSDE(2), X0, 1.0),
    (ERSDE(3), X0, 1.0),
    (DPMSolver2S(), X0, 1.0),
    (DPMSolver2S(), EPSILON, 1.0),
    (ExponentialSRA(), X0, 1.0),
    (ExponentialHeun(), X0, 1.0),
    (UniPC(1), X0, 1.0),
    (UniPC(2), X0, 1.0),
    (UniPC(3), SCORE, 1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "frozen", "eta"), WEAK, ids=name)
def test_weak_order(solver, frozen, eta):
    assert weak_slope(eta, frozen, solver, [128, 256, 512]) == pytest.approx(solver.weak_order, abs=TOLERANCE)


@pytest.mark.slow
def test_weak_order_of_another_noise_scale():
    solver = ERSDE(2, noise_scale=er_sde_noise_scale)
    assert weak_slope(1.0, X0, solver, [32, 64, 128], perturbed=False) == pytest.approx(solver.weak_order, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [EPSILON, X0], ids=name)
def test_weak_order_of_churn(frozen):
    def solver(path, steps):
        return EDMHeun(s_churn=2.0, steps=steps, path=path)

    measured = weak_slope(0.0, frozen, solver, [32, 64, 128], perturbed=False)
    assert measured == pytest.approx(EDMHeun().weak_order, abs=TOLERANCE)


STRONG = [
    (ExponentialEuler(), X0),
    (DDIM(), X0),
    (DPMSolverPP2M(), X0),
    (DPMSolverPP3M(), X0),
    (ERSDE(3), X0),
    (DPMSolver2S(), X0),
    (ExponentialSRA(), X0),
    (ExponentialSRA(), EPSILON),
    (ExponentialHeun(), X0),
    (UniPC(2), X0),
    (dfx.SEA(), X0),
    (dfx.SRA1(), X0),
    (dfx.ShARK(), X0),
]


@pytest.fixture(scope="module")
def brownian():
    """One Brownian motion, a batch of starts, and the fine strong solution."""
    with jax.enable_x64(True):
        ends, cells, shape = (0.3, 0.8), 2048, (1024, 2)

        def make(t0, t1, n):
            return uniform(*ends, n)

        x0 = jr.normal(jr.key(1), shape, jnp.float64)
        path = FinePath(*ends, cells, jr.key(2), shape)
        run = endpoint(process(1.0).term(mixture_score, path), dfx.SlowRK())
        return x0, path, make, run(x0, grids([cells], make)[0], cells)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "frozen"), STRONG, ids=name)
def test_strong_order(brownian, solver, frozen):
    """Mean absolute error at a shared Brownian motion. (Its mean square is ruled by the few paths at a watershed of modes.)"""
    x0, path, make, reference = brownian
    counts = [64, 128, 256]
    run = endpoint(process(1.0, frozen).term(mixture_score, path), solver)
    errors = [jnp.mean(jnp.abs(run(x0, grid, n) - reference)) for grid, n in zip(grids(counts, make), counts)]
    assert slope(counts, errors) == pytest.approx(solver.strong_order(None), abs=TOLERANCE)
