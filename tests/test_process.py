"""The controlled SDE: coefficients, price, and one-step propagators against ODEs and the published samplers."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate

from ctrl_diffusion.exact import GaussianQuadratic
from ctrl_diffusion.predictions import EPSILON, SCORE, VELOCITY, X0, V
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.schedules import RectifiedFlow, VarianceExploding, VPCosine, VPLinear, VPTable
from ctrl_diffusion.solvers import ExponentialEuler, sample_keys

SCHEDULES = [VPLinear(), VPCosine(), VPTable(), VarianceExploding(), RectifiedFlow()]
FROZEN = [X0, EPSILON, V, SCORE, VELOCITY]
ETAS = (0.0, 0.5, 1.0)
by_name = dict(ids=lambda value: type(value).__name__ if hasattr(value, "horizon") else str(value))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def no_control(params, t, x, cond):
    raise AssertionError("a propagator does not call the control")


def term_of(process):
    """The process's term, without a path: only its coefficients and propagators are used."""
    return process.term(no_control, None if process.eta == 0 else dfx.UnsafeBrownianPath((), jr.key(0)))


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("schedule", SCHEDULES, **by_name)
def test_coefficients_of_the_action_form(schedule, eta):
    """`A = -f`, `B = (1 + eta^2)/2 g^2`, `G = eta g` at noising time `horizon - t`."""
    process = DiffusionProcess(schedule, eta)
    t = jnp.linspace(process.t0, process.t1, 7)[1:-1]
    tau = schedule.horizon - t
    a, b, g = process.coefficients(t)
    np.testing.assert_allclose(process.tau(t), tau)
    np.testing.assert_allclose(a, -schedule.f(tau), rtol=1e-12)
    np.testing.assert_allclose(b, (1 + eta**2) / 2 * schedule.g_squared(tau), rtol=1e-12)
    np.testing.assert_allclose(g, eta * jnp.sqrt(schedule.g_squared(tau)), rtol=1e-12)
    np.testing.assert_allclose(process.g(t) ** 2, schedule.g_squared(tau), rtol=1e-12)


@pytest.mark.parametrize("eta", [0.25, 1.0])
def test_kl_rate_is_that_of_girsanov_summed_over_dimensions(eta):
    process = DiffusionProcess(VPLinear(), eta)
    t, (a, a_ref) = jnp.asarray([0.2, 0.5, 0.9]), jr.normal(jr.key(0), (2, 3, 4, 2))
    price = (1 + eta**2) ** 2 / (8 * eta**2) * process.schedule.g_squared(1 - t)
    expected = price * jnp.sum((a - a_ref) ** 2, axis=(1, 2))
    np.testing.assert_allclose(process.kl_rate(t, a, a_ref), expected, rtol=1e-12)
    np.testing.assert_allclose(process.kl_rate(t[1], a, a_ref)[1], expected[1], rtol=1e-12)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), VarianceExploding(), RectifiedFlow()], **by_name)
def test_propagators_solve_the_linear_sde(schedule):
    """`phi' = A phi`, `psi' = A psi + B`, `(std^2)' = 2 A std^2 + G^2` for every frozen variable and eta."""
    terms = [term_of(DiffusionProcess(schedule, eta, frozen)) for frozen in FROZEN for eta in ETAS]
    t0, t1 = (jnp.asarray(schedule.horizon - tau * schedule.horizon) for tau in (0.6, 0.45))
    coefficients = jax.jit(lambda t: jnp.stack([jnp.stack(term.coefficients(t)) for term in terms], axis=1))

    def slope(t, y):
        phi, psi, variance = y.reshape(3, -1)
        a, b, g = np.asarray(coefficients(jnp.asarray(t)))
        return np.concatenate([a * phi, a * psi + b, 2 * a * variance + g**2])

    start = np.concatenate([np.ones(len(terms)), np.zeros(2 * len(terms))])
    solution = scipy.integrate.solve_ivp(slope, (float(t0), float(t1)), start, "DOP853", rtol=1e-11, atol=1e-13)
    expected = solution.y[:, -1].reshape(3, -1)
    steps = jax.jit(lambda: [term.propagator(t0, t1) for term in terms])()
    actual = np.stack([(step.phi, step.psi, step.std**2) for step in steps], axis=1)
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-10)
    assert np.all(expected[2, ::3] == 0) and np.all(expected[2, 1::3] > 0)


def test_ancestral_sampling_is_x0_frozen_at_eta_1():
    """Ho et al. 2020, eq. 6 and 7, between neighbouring entries of the table."""
    table = VPTable()
    betas = np.asarray(table.betas)
    bar = np.cumprod(1 - betas)
    process = DiffusionProcess(table, 1.0)
    for i in (1, 20, 500, 999):  # from entry i to entry i - 1
        t0, t1 = jnp.asarray(1 - (i + 1) / 1000), jnp.asarray(1 - i / 1000)
        step = term_of(process).propagator(t0, t1)
        np.testing.assert_allclose(step.phi, np.sqrt(1 - betas[i]) * (1 - bar[i - 1]) / (1 - bar[i]), rtol=1e-9)
        np.testing.assert_allclose(step.psi, np.sqrt(bar[i - 1]) * betas[i] / (1 - bar[i]), rtol=1e-9)
        np.testing.assert_allclose(step.std**2, (1 - bar[i - 1]) / (1 - bar[i]) * betas[i], rtol=1e-9)
        in_action = process.transition(ExponentialEuler(), t0, t1)  # x0 = (x + (1 - bar) a) / sqrt(bar)
        np.testing.assert_allclose(in_action.phi, step.phi + step.psi / np.sqrt(bar[i]), rtol=1e-9)
        np.testing.assert_allclose(in_action.psi, step.psi * (1 - bar[i]) / np.sqrt(bar[i]), rtol=1e-9)
        np.testing.assert_allclose(in_action.std, step.std, rtol=1e-12)


@pytest.mark.parametrize("frozen", [X0, EPSILON], ids=["x0", "epsilon"])
@pytest.mark.parametrize("schedule", SCHEDULES, **by_name)
def test_ddim_is_both_frozen_forms_at_eta_0(schedule, frozen):
    """Song et al. 2021 (DDIM), eq. 12 without noise: `x1 = alpha1 x0_hat + sigma1 eps_hat`, over a large step."""
    process = DiffusionProcess(schedule, 0.0, frozen)
    tau0, tau1 = (jnp.asarray(c * schedule.horizon) for c in (0.8, 0.3))
    x, score = jr.normal(jr.key(0), (2, 4))
    eps = -schedule.sigma(tau0) * score
    x0 = (x - schedule.sigma(tau0) * eps) / schedule.alpha(tau0)
    phi, psi, std = process.transition(ExponentialEuler(), schedule.horizon - tau0, schedule.horizon - tau1)
    np.testing.assert_allclose(phi * x + psi * score, schedule.alpha(tau1) * x0 + schedule.sigma(tau1) * eps, rtol=1e-9)
    assert std == 0


def test_ddim_eta_is_another_family_between_0_and_1():
    """`std^2 = eta^2 sigma1^2 (1 - e^{-2h})` in DDIM(eta), `sigma1^2 (1 - e^{-2 eta^2 h})` in the propagator with x0 frozen."""
    schedule = VPLinear()
    tau0, tau1 = jnp.asarray(0.8), jnp.asarray(0.7)
    h = schedule.log_snr(tau1) - schedule.log_snr(tau0)
    for eta in (0.5, 1.0):
        std = term_of(DiffusionProcess(schedule, eta)).propagator(1 - tau0, 1 - tau1).std
        ddim = eta**2 * schedule.sigma_squared(tau1) * (1 - jnp.exp(-2 * h))
        exact = schedule.sigma_squared(tau1) * (1 - jnp.exp(-2 * eta**2 * h))
        np.testing.assert_allclose(std**2, exact, rtol=1e-10)
        assert (abs(ddim / exact - 1) < 1e-12) == (eta == 1.0)


@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), RectifiedFlow()], **by_name)
def test_noise_of_small_steps_keeps_its_digits_in_float32(schedule, eta):
    """The log-SNR step h is a difference of rounded numbers, to 6 roundings; std, which goes like its root, loses no more."""
    ts = np.arange(128, 1017) / 1024  # exact in both precisions
    process = DiffusionProcess(schedule, eta)

    def steps(dtype):
        t = jnp.asarray(ts, dtype)
        h = jnp.diff(schedule.log_snr(schedule.horizon - t))
        return np.asarray(h, np.float64), np.asarray(term_of(process).propagator(t[:-1], t[1:]).std, np.float64)

    (h, exact), (_, std) = steps(jnp.float64), steps(jnp.float32)
    np.testing.assert_array_less(np.abs(std / exact - 1), 6 * np.finfo(np.float32).eps * (1 + 1 / h))


@pytest.mark.parametrize("eta", ETAS)
def test_a_step_to_zero_noise_lands_on_the_denoised_state(eta):
    process = DiffusionProcess(VPLinear(tau_min=0.0), eta)
    step = term_of(process).propagator(jnp.asarray(0.9), jnp.asarray(1.0))
    np.testing.assert_array_equal(jnp.stack(step), (0.0, 1.0, 0.0))


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda p: p.name)
def test_exponential_euler_becomes_euler_maruyama(frozen):
    """Over a step `dt` the two Gaussian transitions in the action differ by `dt^2` in the mean and `dt^2` in the variance."""
    process = DiffusionProcess(VPLinear(), 0.5, frozen)
    t = jnp.asarray(0.4)

    @jax.jit
    def difference(dt):
        exponential, euler = (process.transition(solver, t, t + dt) for solver in (ExponentialEuler(), dfx.Euler()))
        a, b, g = process.coefficients(t)
        expected = jnp.stack([1 + a * dt, b * dt, g * jnp.sqrt(dt)])
        gap = jnp.stack([exponential.phi - euler.phi, exponential.psi - euler.psi, exponential.std**2 - euler.std**2])
        return jnp.stack(euler), expected, gap

    euler, expected, _ = difference(jnp.asarray(1e-3))
    np.testing.assert_allclose(euler, expected, rtol=1e-12)
    coarse, fine = difference(jnp.asarray(1e-3))[2], difference(jnp.asarray(5e-4))[2]
    np.testing.assert_allclose(coarse, 4 * fine, rtol=0.05)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("solver", [dfx.Euler(), ExponentialEuler()], ids=["euler", "exponential"])
def test_likelihood_ratio_and_pathwise_gradients_of_a_step_agree(solver, eta):
    """Stein: `E[grad_a log pi (V(t1, x1) - V(t, x))] = grad_a E V(t1, x1)`, and both become `c grad V dt`."""
    process = DiffusionProcess(VPLinear(), eta)
    problem = GaussianQuadratic(process, 1.0, 0.5, 1.0, -0.5, 0.7)
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)  # exact for these polynomials
    t, x, action = jnp.asarray(0.4), 0.3, -0.8

    @jax.jit
    def gradients(dt):
        phi, psi, std = process.transition(solver, t, t + dt)
        mean_over = jnp.asarray(weights / weights.sum())

        def values(action):
            return problem.value(t + dt, (phi * x + psi * action + std * nodes)[:, None])

        start = jnp.full((1, 1), x)
        score_function = nodes * psi / std  # grad_a of log N(x1; phi x + psi a, std^2)
        likelihood_ratio = mean_over @ (score_function * (values(action) - problem.value(t, start)))
        rate = process.coefficients(t)[1] * problem.value_gradient(t, start)[0, 0]
        return likelihood_ratio, jax.grad(lambda action: mean_over @ values(action))(action), rate * dt

    ratios = []
    for dt in (2e-3, 1e-3):
        likelihood_ratio, pathwise, rate = gradients(jnp.asarray(dt))
        np.testing.assert_allclose(likelihood_ratio, pathwise, rtol=1e-9)
        ratios.append(pathwise / rate - 1)
    assert abs(ratios[1]) < 0.02
    np.testing.assert_allclose(ratios[0] / ratios[1], 2, rtol=0.05)  # the limit is reached at first order


def test_denoise_is_the_posterior_mean_of_the_data():
    for schedule in SCHEDULES:
        problem = GaussianQuadratic(DiffusionProcess(schedule), 1.0, 0.5, 1.0, 0.0, 1.0)
        t = problem.process.t0 + 0.7 * (problem.process.t1 - problem.process.t0)
        tau = schedule.horizon - jnp.asarray(t)
        alpha, sigma_squared = schedule.alpha(tau), schedule.sigma_squared(tau)
        x = jr.normal(jr.key(0), (3, 2))
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma_squared)  # of the conjugate Gaussian
        action = problem.reference_action(None, jnp.asarray(t), x)
        denoised = problem.process.denoise(jnp.asarray(t), x, action)
        np.testing.assert_allclose(denoised, 1 + gain * (x - alpha), rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("schedule", SCHEDULES, **by_name)
def test_terminal_mean_is_the_state_itself_at_the_end(schedule, dtype):
    """Bit for bit, although `horizon - t1` is not `tau_min` in floating point; the score has the size that it has there."""
    process = DiffusionProcess(schedule)
    x, noise = jr.normal(jr.key(0), (2, 5, 3), dtype)
    end = jnp.asarray(process.t1, dtype)
    for t in (end, jnp.full(5, end)):
        score = -noise / schedule.sigma(process.tau(end))
        np.testing.assert_array_equal(process.terminal_mean(t, x, score), x)


def test_terminal_mean_is_the_posterior_mean_of_the_final_state():
    """Against the conditional law of the reverse SDE on Gaussian data; without `tau_min` it is the denoised state."""
    for schedule in (VPLinear(tau_min=0.2), RectifiedFlow(tau_min=0.3), VarianceExploding(tau_min=2.0)):
        problem = GaussianQuadratic(DiffusionProcess(schedule), 1.0, 0.5, 1.0, 0.0, 1.0)
        process = problem.process
        x, t = jr.normal(jr.key(0), (3, 2)), jnp.asarray(process.t0 + 0.6 * (process.t1 - process.t0))
        phi, shift, _ = problem.terminal_law(t)
        score = problem.reference_action(None, t, x)
        for eta in (0.0, 0.5, 1.0):  # the noising law knows no eta
            found = DiffusionProcess(schedule, eta).terminal_mean(t, x, score)
            np.testing.assert_allclose(found, shift + phi * x, rtol=1e-9)
        assert jnp.max(jnp.abs(process.terminal_mean(t, x, score) - process.denoise(t, x, score))) > 1e-3
    process = DiffusionProcess(VPLinear(tau_min=0.0))
    np.testing.assert_allclose(process.terminal_mean(t, x, score), process.denoise(t, x, score), rtol=1e-12)


@pytest.mark.parametrize("schedule", [*SCHEDULES, VarianceExploding(horizon=50.0, tau_max=40.0)], **by_name)
def test_initial_states_are_pure_noise_from_their_own_keys(schedule):
    process, count = DiffusionProcess(schedule), 4000
    keys = sample_keys(jr.key(0), count)
    x = process.initial(keys, (2,), jnp.float64)
    variance = schedule.sigma_squared(jnp.asarray(schedule.tau_max))
    n = 2 * count
    assert abs(jnp.mean(x)) < 4 * jnp.sqrt(variance / n)
    assert abs(jnp.var(x) / variance - 1) < 4 * np.sqrt(2 / n)
    np.testing.assert_array_equal(process.initial(keys[7:9], (2,), jnp.float64), x[7:9])
    assert process.initial(keys[:2], (2,), jnp.float32).dtype == jnp.float32


def test_control_time_runs_from_noise_to_data():
    process = DiffusionProcess(VarianceExploding(horizon=50.0, tau_max=40.0, tau_min=0.5))
    assert (process.t0, process.t1) == (10.0, 49.5)
    np.testing.assert_allclose(process.grid(4), np.linspace(10.0, 49.5, 5))
    assert process.running_cost(jnp.asarray(20.0), jnp.ones((3, 2))).tolist() == [0.0, 0.0, 0.0]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"eta=-0\.5 must be at least 0"):
        DiffusionProcess(VPLinear(), -0.5)
    with pytest.raises(ValueError, match="eta=nan must be at least 0"):
        DiffusionProcess(VPLinear(), float("nan"))
    still = DiffusionProcess(VPLinear(), 0.0)
    with pytest.raises(ValueError, match="eta=0: a likelihood is undefined for a deterministic sampler. Use eta > 0"):
        still.require_noise("a likelihood", "Use eta > 0.")
    with pytest.raises(ValueError, match="pass path=None exactly when eta is 0"):
        still.term(no_control, dfx.UnsafeBrownianPath((), jr.key(0)))
    with pytest.raises(ValueError, match="pass path=None exactly when eta is 0"):
        DiffusionProcess(VPLinear(), 0.5).term(no_control, None)
    assert DiffusionProcess(VPLinear(), 0.5).require_noise("a likelihood", "") is None
