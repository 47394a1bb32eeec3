"""Every solver under jit, gradients, SaveAt, exact resume, adaptive steps and a user's own code; misfits say what would fit."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optimistix as optx
import pytest

from ctrl_diffusion.predictions import EPSILON, X0
from ctrl_diffusion.process import DiffusionProcess, DiffusionTerm
from ctrl_diffusion.sampler import Sampler
from ctrl_diffusion.schedules import VPLinear
from ctrl_diffusion.solvers import (
    DDIM,
    ERSDE,
    AbstractSemilinearTerm,
    DPMSolver2S,
    DPMSolver3S,
    DPMSolverPP2M,
    DPMSolverPP3M,
    EDMHeun,
    ExponentialAdamsBashforth,
    ExponentialEuler,
    ExponentialHeun,
    ExponentialSRA,
    GridSteps,
    KeyedPath,
    RecordedPath,
    UniPC,
    decreasing_inverse,
    gaussian_transition,
    integrate,
    levy_area_for,
    sample_keys,
    terms_for,
)
from ctrl_diffusion.solvers.unrolled import Unrolled, unrolled
from experiments.solvers.problems import (
    NO_ARGS,
    endpoint,
    gaussian_flow,
    gaussian_marginal,
    gaussian_score,
    mixture_score,
    process,
)
from tests.solver_problems import GRID, KEYS, STEPS, label, noisy_term, start

SOLVERS = [
    ExponentialEuler(),
    DDIM(),
    DPMSolverPP2M(),
    DPMSolverPP3M(bootstrap=True),
    ExponentialAdamsBashforth(4),
    ERSDE(3),
    DPMSolver2S(),
    ExponentialSRA(),
    ExponentialHeun(),
    UniPC(2),
]

ALIKE = (
    "DDIM",
    "DPMSolverPP2M",
    "ExponentialHeun",
    "ERSDE",
)  # as another of them: no state, the history of multistep methods, stages


def scaled_score(params, t, x, cond):
    """A control with one parameter, 1 at the mixture's score."""
    return params * mixture_score(None, t, x, cond)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("solver", [s for s in SOLVERS if label(s) not in ALIKE], ids=label)
def test_jit_gradient_every_step_and_resume(solver, float64):
    """One noisy problem: the last saved state is the result, the gradient is that of finite differences, and stopping halfway,
    with the solver's state kept, changes nothing."""
    term = noisy_term(solver, scaled_score)
    adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=STEPS)

    @jax.jit
    def total_gradient_and_states(scale):
        def total(scale):
            states = integrate(term, solver, GRID, start(), (scale, None), every_step=True, adjoint=adjoint)
            return jnp.sum(states[-1] ** 2), states

        (value, states), gradient = jax.value_and_grad(total, has_aux=True)(scale)
        return value, gradient, states

    one = jnp.asarray(1.0, float)
    _, gradient, states = total_gradient_and_states(one)
    assert states.shape == (STEPS + 1, 5, 2)
    np.testing.assert_allclose(states[0], start(), rtol=1e-12)
    step = 1e-5
    difference = (total_gradient_and_states(one + step)[0] - total_gradient_and_states(one - step)[0]) / (2 * step)
    np.testing.assert_allclose(gradient, difference, rtol=1e-6, atol=1e-6)

    @jax.jit
    def part(ts, x, state):
        saveat = dfx.SaveAt(t1=True, solver_state=True)
        solution = dfx.diffeqsolve(
            terms_for(solver, term),
            solver,
            ts[0],
            ts[-1],
            None,
            x,
            (one, None),
            saveat=saveat,
            stepsize_controller=GridSteps(ts),
            solver_state=state,
            adjoint=dfx.ForwardMode(),
            max_steps=STEPS // 2,
            throw=False,
        )
        return solution.ys[0], solution.solver_state

    ts = jnp.asarray(GRID, float)
    middle, state = part(ts[: STEPS // 2 + 1], start(), None)
    end, _ = part(ts[STEPS // 2 :], middle, state)
    np.testing.assert_allclose(middle, states[STEPS // 2], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(end, states[-1], rtol=1e-12, atol=1e-12)


def test_resume_without_the_state_is_another_solution():
    """The control of the test above: memory matters."""
    solver = DPMSolverPP2M()
    whole = integrate(noisy_term(solver), solver, GRID, start(), NO_ARGS)
    middle = integrate(noisy_term(solver), solver, GRID[: STEPS // 2 + 1], start(), NO_ARGS)
    assert np.max(np.abs(integrate(noisy_term(solver), solver, GRID[STEPS // 2 :], middle, NO_ARGS) - whole)) > 1e-3


def one_point_problem(tau_min):
    """The probability flow to data that is the one point 0.7, and its score."""
    ode = DiffusionProcess(VPLinear(tau_min=tau_min), eta=0.0)

    def score(params, t, x, cond):
        tau = ode.tau(t)
        return -(x - ode.schedule.alpha(tau) * 0.7) / ode.schedule.sigma_squared(tau)

    return ode, score


@pytest.mark.parametrize("solver", [*SOLVERS, DPMSolver3S(), EDMHeun(), UniPC(3, bootstrap=True)], ids=label)
def test_a_last_step_to_zero_noise_returns_the_denoised_state(solver):
    """The log-SNR is infinite there: the last control alone."""
    ode, score = one_point_problem(tau_min=0.0)
    run = endpoint(ode.term(score, None), solver)
    np.testing.assert_allclose(run(start(), jnp.asarray(ode.grid(6), jnp.float32), 6), 0.7, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [DPMSolverPP3M(), DPMSolver2S(), UniPC(2)], ids=label)
def test_gradients_through_a_last_step_to_zero_noise_are_finite(solver):
    ode, score = one_point_problem(tau_min=0.0)
    adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=6)

    @jax.jit
    @jax.grad
    def gradient(x):
        return jnp.sum(integrate(ode.term(score, None), solver, ode.grid(6), x, NO_ARGS, adjoint=adjoint))

    assert np.all(np.isfinite(gradient(start())))


@pytest.mark.slow
def test_ddim_and_exact_propagator_agree_at_the_ends_and_only_there():
    def endpoints(eta):
        noise = None if eta == 0 else RecordedPath(jnp.asarray(GRID, jnp.float32), jr.normal(jr.key(3), (STEPS, 5, 2)))
        term = process(eta).term(mixture_score, noise)
        return [integrate(term, solver, GRID, start(), NO_ARGS) for solver in (DDIM(), ExponentialEuler())]

    for eta in (0.0, 1.0):
        np.testing.assert_allclose(*endpoints(eta), rtol=1e-4, atol=1e-4)
    assert np.max(np.abs(np.subtract(*endpoints(0.5)))) > 1e-2


def test_ddim_transition_is_its_step_and_has_the_published_noise():
    eta = 0.6
    term = DiffusionTerm(process(eta), mixture_score, None)
    t0, t1 = jnp.asarray(0.4), jnp.asarray(0.5)
    schedule, tau0, tau1 = process().schedule, jnp.asarray(0.6), jnp.asarray(0.5)
    a0, a1 = schedule.alpha(tau0), schedule.alpha(tau1)
    s0, s1 = schedule.sigma(tau0), schedule.sigma(tau1)
    std = eta * (s1 / s0) * jnp.sqrt(1 - (a0 / a1) ** 2)  # Song et al. 2021, eq. 16
    phi = jnp.sqrt(s1**2 - std**2) / s0
    got = gaussian_transition(DDIM(), term, t0, t1)
    np.testing.assert_allclose(got, (phi, a1 - phi * a0, std), rtol=2e-4)
    frozen_epsilon = DiffusionTerm(process(eta, EPSILON), mixture_score, None)
    with pytest.raises(TypeError, match="x0 frozen"):
        gaussian_transition(DDIM(), frozen_epsilon, t0, t1)


@pytest.mark.slow
def test_epsilon_and_x0_forms_are_one_at_eta_zero_for_one_step_methods_only():
    def run(solver, frozen):
        return integrate(process(0.0, frozen).term(mixture_score, None), solver, GRID, start(), NO_ARGS)

    np.testing.assert_allclose(run(ExponentialEuler(), X0), run(ExponentialEuler(), EPSILON), atol=1e-3)
    assert np.max(np.abs(run(DPMSolverPP2M(), X0) - run(DPMSolverPP2M(), EPSILON))) > 1e-2


@pytest.mark.slow
def test_churn_draws_from_the_solver_or_the_term_and_says_when_it_cannot():
    ts = jnp.asarray(GRID, jnp.float32)
    path = KeyedPath(ts, KEYS, (2,))
    ode = process(0.0, EPSILON)
    own = integrate(ode.term(mixture_score, None), EDMHeun(2.0, STEPS, path=path), GRID, start(), NO_ARGS)
    of_term = integrate(DiffusionTerm(ode, mixture_score, path), EDMHeun(2.0, STEPS), GRID, start(), NO_ARGS)
    np.testing.assert_array_equal(own, of_term)
    calm = integrate(ode.term(mixture_score, None), EDMHeun(), GRID, start(), NO_ARGS)
    out_of_range = EDMHeun(2.0, STEPS, s_min=1e3, path=path)
    np.testing.assert_array_equal(calm, integrate(ode.term(mixture_score, None), out_of_range, GRID, start(), NO_ARGS))
    assert np.max(np.abs(own - calm)) > 1e-2
    with pytest.raises(ValueError, match="path=KeyedPath"):
        integrate(ode.term(mixture_score, None), EDMHeun(2.0, STEPS), GRID, start(), NO_ARGS)
    assert EDMHeun(100.0, 10).gamma == pytest.approx(2**0.5 - 1)


ODE = [dfx.Euler(), dfx.Heun(), dfx.Midpoint(), dfx.Tsit5(), dfx.Dopri5(), dfx.Dopri8()]
IMPLICIT = [cls(root_finder=optx.Chord(rtol=1e-3, atol=1e-3)) for cls in (dfx.Kvaerno3, dfx.KenCarp3)]


@pytest.mark.parametrize("solver", [*ODE, *IMPLICIT], ids=label)
def test_diffrax_ode_solvers_run_on_the_same_term(solver):
    ends, x = (0.0, 0.9), start()
    got = endpoint(process().term(gaussian_score, None), solver)(x, jnp.linspace(*ends, 41), 40)
    atol = 0.15 if isinstance(solver, dfx.Euler) else 0.02
    np.testing.assert_allclose(got, gaussian_flow(*jnp.asarray(ends), x), atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [dfx.Midpoint(), dfx.Ralston(), dfx.GeneralShARK()], ids=label)
def test_diffrax_sde_solvers_run_on_the_same_term(solver):
    """From the marginal at the start to that at the end, up to the error of the mean of samples and of a hundred steps.

    Those of `test_solvers_marginals.py` are not here.
    """
    ts, keys = jnp.linspace(0.0, 0.9, 101), sample_keys(jr.key(0), 2000)
    path = KeyedPath(ts, keys, (1,), levy_area_for(solver))
    (mean, variance), (mean1, variance1) = (gaussian_marginal(t) for t in (ts[0], ts[-1]))
    x = mean + jnp.sqrt(variance) * jr.normal(jr.key(1), (2000, 1))
    got = endpoint(process(1.0).term(gaussian_score, path), solver)(x, ts, 100)
    assert np.mean(got) == pytest.approx(float(mean1), abs=4 * float(jnp.sqrt(variance1 / 2000)) + 0.01)
    assert np.var(got) == pytest.approx(float(variance1), rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [dfx.Heun(), dfx.SEA(), dfx.SRA1(), dfx.SPaRK(), dfx.GeneralShARK()], ids=label)
def test_unrolled_stages_are_those_of_diffrax(solver, float64):
    """`integrate` writes the stages of explicit methods out; diffrax's own loop over them gives the same to rounding."""
    term, ts = noisy_term(solver), jnp.asarray(GRID, float)
    assert isinstance(unrolled(solver), Unrolled)
    whole = dfx.diffeqsolve(
        terms_for(solver, term), solver, ts[0], ts[-1], None, start(), NO_ARGS, stepsize_controller=GridSteps(ts),
        adjoint=dfx.ForwardMode(), max_steps=STEPS, throw=False,
    )  # fmt: skip
    np.testing.assert_allclose(integrate(term, solver, GRID, start(), NO_ARGS), whole.ys[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("solver", "handed_on"), [(dfx.SPaRK(), True), (dfx.ShARK(), False), (dfx.SlowRK(), False)], ids=label)
def test_the_noise_of_many_stages_is_drawn_once(solver, handed_on):
    """On a CPU what three stages share is computed before them, which the compiler would otherwise compute again for each."""

    def solve(x):
        return integrate(noisy_term(solver), solver, GRID, x, NO_ARGS)

    program = jax.jit(solve).lower(start()).compile().as_text()
    assert (" conditional(" in program) == (handed_on and jax.default_backend() == "cpu")


def test_only_explicit_methods_are_unrolled():
    for solver in (dfx.Euler(), dfx.EulerHeun(), ExponentialEuler(), dfx.Kvaerno3(), dfx.Tsit5()):
        assert unrolled(solver) is solver


def test_the_sampler_gives_a_diffrax_sde_solver_its_levy_area():
    sampler = Sampler(process(1.0), mixture_score, (2,), grid=GRID, solver=dfx.ShARK())
    by_hand = integrate(noisy_of(sampler), dfx.ShARK(), GRID, sampler.start(KEYS)[0], NO_ARGS)
    np.testing.assert_allclose(sampler.sample(None, KEYS), by_hand, atol=1e-5)


def noisy_of(sampler):
    path = KeyedPath(sampler.ts, sampler.start(KEYS)[1], (2,), dfx.SpaceTimeLevyArea)
    return sampler.process.term(mixture_score, path)


class MyLeapfrogless(dfx.AbstractItoSolver):  # what a user writes: Euler's method with a midpoint coefficient
    term_structure = AbstractSemilinearTerm
    interpolation_cls = dfx.LocalLinearInterpolation

    def init(self, terms, t0, t1, y0, args):
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        field, step = terms.vf(t0, y0, args), terms.contr(t0, t1)
        y1 = step.transition.phi * y0 + step.transition.psi * field.control + field.diffusion * step.dw
        return y1, None, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_bring_your_own_solver(eta):
    """Sampling, a trajectory and a gradient through it, in user code alone."""
    adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=STEPS)
    mine = Sampler(process(eta), scaled_score, (2,), grid=GRID, solver=MyLeapfrogless())
    one = jnp.asarray(1.0)
    samples = mine.sample(one, KEYS)
    np.testing.assert_allclose(mine.trajectory(one, KEYS).x[-1], samples, atol=1e-5)
    gradient = jax.grad(lambda scale: jnp.sum(mine.sample(scale, KEYS, adjoint=adjoint) ** 2))(one)
    assert np.isfinite(gradient) and gradient != 0
    if eta == 0:
        built_in = Sampler(process(eta), scaled_score, (2,), grid=GRID).sample(one, KEYS)
        np.testing.assert_allclose(samples, built_in, atol=1e-5)


@pytest.mark.slow
def test_samples_do_not_depend_on_their_batch():
    sampler = Sampler(process(1.0), mixture_score, (2,), grid=GRID, solver=UniPC(2))
    np.testing.assert_allclose(sampler.sample(None, KEYS)[2:4], sampler.sample(None, KEYS[2:4]), atol=2e-5)


def test_bad_settings_are_refused():
    for make, message in [
        (lambda: ExponentialAdamsBashforth(5), "steps=5"),
        (lambda: ERSDE(0), "steps=0"),
        (lambda: UniPC(4), "steps=4"),
        (lambda: DPMSolver2S(fraction=1.0), "fraction=1.0"),
        (lambda: DPMSolver3S(fraction=0.0), "fraction=0.0"),
        (lambda: EDMHeun(s_churn=-1.0), "s_churn=-1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("frozen", [X0, EPSILON], ids=["x0", "epsilon"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_moments_in_closed_form_are_those_of_quadrature(frozen, eta, float64):
    class Quadrature(DiffusionTerm):
        def rate(self):
            return None

    t0, t1 = jnp.asarray(0.5), jnp.asarray(0.8)
    closed, quadrature = (
        cls(process(eta, frozen), mixture_score, None).moments(t0, t1, 4) for cls in (DiffusionTerm, Quadrature)
    )
    np.testing.assert_allclose(closed, quadrature, rtol=1e-8)


def test_decreasing_inverse_and_its_gradient():
    def fn(x):
        return -jnp.log(x) - x**2

    target = jnp.asarray([-50.0, -1.0, 3.0, 10.0])
    lo, hi = jnp.asarray(1e-6), jnp.asarray(20.0)
    x = jax.jit(lambda c: decreasing_inverse(fn, c, lo, hi))(target)
    np.testing.assert_allclose(fn(x), target, rtol=1e-5)
    slope = jax.jit(jax.vmap(jax.grad(lambda c: decreasing_inverse(fn, c, lo, hi))))(target)
    np.testing.assert_allclose(slope, 1 / (-1 / x - 2 * x), rtol=1e-4)
    assert decreasing_inverse(fn, jnp.asarray(-1e4), lo, hi) == pytest.approx(20.0)


def test_solver_states_are_pytrees_of_fixed_structure():
    """A step maps its state to one of the same shapes and dtypes, as loops and checkpoints need."""
    for solver in SOLVERS:
        terms = terms_for(solver, noisy_term(solver))
        ts = jnp.asarray(GRID, jnp.float32)
        state = eqx.filter_eval_shape(solver.init, terms, ts[0], ts[1], start(), NO_ARGS)
        after = eqx.filter_eval_shape(solver.step, terms, ts[0], ts[1], start(), NO_ARGS, state, False)[3]
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after), type(solver).__name__
