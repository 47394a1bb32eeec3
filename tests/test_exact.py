"""The exact problems: the numbers of the literature tables, the HJB equation, and their definitions by quadrature."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.integrate

from ctrl_diffusion.exact import GaussianMixture, GaussianQuadratic, LinearReward, MixtureControl, QuadraticReward, ring
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.schedules import RectifiedFlow, VarianceExploding, VPCosine, VPLinear, VPTable
from ctrl_diffusion.solvers import sample_keys

SCHEDULES = [VPLinear(), VPCosine(), VPTable(), VarianceExploding(horizon=10.0, tau_max=10.0, tau_min=0.1), RectifiedFlow()]
ids = dict(ids=lambda value: type(value).__name__ if hasattr(value, "horizon") else str(value))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gaussian(schedule, eta, noise_start=False):
    """The Gaussian-quadratic problem of the table, on any schedule."""
    return GaussianQuadratic(DiffusionProcess(schedule, eta), 1.0, 0.5, 1.0, -0.5, 0.7, noise_start)


def constant_rate(tau_min=0.0):
    return VPLinear(beta_min=4.0, beta_max=4.0, horizon=2.0, tau_min=tau_min, tau_max=2.0)


def ring_problem(reward, kl_weight=1.0, schedule=None):
    return MixtureControl(DiffusionProcess(schedule or VPLinear(tau_min=0.0)), ring(), reward, kl_weight)


def uneven(reward, schedule=None):
    """A mixture without symmetry."""
    data = GaussianMixture([[1.0, 0.3], [-0.5, 0.8], [0.2, -1.1]], 0.4, [0.5, 0.2, 0.3])
    return MixtureControl(DiffusionProcess(schedule or VPLinear()), data, reward, 0.6)


# --- Gaussian data, quadratic reward


@pytest.mark.parametrize(
    "eta, optimal_value, mean, variance, path_kl, terminal_kl",
    [
        (0.25, -1.08259, 0.79478, 0.19937, 0.20668, 0.09612),
        (0.5, -0.95736, 0.63382, 0.18455, 0.31759, 0.28905),
        (1.0, -0.93585, 0.60529, 0.18421, 0.33273, 0.33271),
    ],
)
def test_gaussian_table(eta, optimal_value, mean, variance, path_kl, terminal_kl):
    problem = gaussian(constant_rate(), eta)
    numbers = (problem.optimal_value, *problem.optimal_terminal, problem.path_kl, problem.terminal_kl)
    np.testing.assert_allclose(numbers, (optimal_value, mean, variance, path_kl, terminal_kl), rtol=0, atol=0.51e-5)
    np.testing.assert_allclose(problem.tilted_law, (0.60526, 0.18421), rtol=0, atol=0.51e-5)


def test_gaussian_table_in_float32():
    with jax.enable_x64(False):
        problem = gaussian(constant_rate(), 0.5)
        numbers = (problem.optimal_value, *problem.optimal_terminal, problem.path_kl, problem.terminal_kl)
    np.testing.assert_allclose(numbers, (-0.95736, 0.63382, 0.18455, 0.31759, 0.28905), rtol=0, atol=0.51e-5 + 1e-6)


@pytest.mark.parametrize("eta", [0.25, 0.5, 1.0])
def test_gaussian_value_solves_the_riccati_equations(eta):
    """`V* = -P x^2/2 + Q x + R` with the three equations written for a constant rate beta."""
    problem, beta, weight = gaussian(constant_rate(), eta), 4.0, 0.7
    noise = eta**2 * beta / weight

    def coefficients(t):
        def value(x):
            return problem.value(t, x[None])[0]

        zero = jnp.zeros(1)
        return jnp.stack([-jax.hessian(value)(zero)[0, 0], jax.grad(value)(zero)[0], value(zero)])

    def both(t):
        (p, q, r), derivatives = jax.jvp(coefficients, (t,), (jnp.ones_like(t),))
        m, v = problem.marginal(t)
        a, c = beta / 2 - (1 + eta**2) * beta / (2 * v), (1 + eta**2) * beta * m / (2 * v)
        dp = -2 * a * p + noise * p**2
        dq = -a * q + c * p + noise * p * q
        dr = -c * q + eta**2 * beta * p / 2 - noise / 2 * q**2
        return derivatives, jnp.stack([dp, dq, dr]), jnp.stack([p, q, r])

    derivatives, expected, values = jax.jit(jax.vmap(both))(jnp.linspace(0.0, 2.0, 9))
    np.testing.assert_allclose(derivatives, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(values[-1], (1.0, -0.5, -0.125), rtol=1e-12)


def hamilton_jacobi_bellman(problem, t, x):
    """Residual `V_t + (A x + B a_ref).grad V + G^2/2 lap V + G^2/(2 lambda) |grad V|^2` and the size of its terms; `x [d]`."""

    def value(t, x):
        return problem.value(t, x[None])[0]

    a, b, g = problem.process.coefficients(t)
    slope, gradient = jax.grad(value, (0, 1))(t, x)
    drift = jnp.dot(a * x + b * problem.reference_action(None, t, x[None])[0], gradient)
    diffusion = 0.5 * g**2 * jnp.trace(jax.hessian(value, 1)(t, x))
    terms = jnp.stack([slope, drift, diffusion, 0.5 * g**2 / problem.kl_weight * jnp.dot(gradient, gradient)])
    return jnp.sum(terms), jnp.max(jnp.abs(terms))


def states(process, count=20, dim=2):
    ts = process.t0 + (process.t1 - process.t0) * jnp.linspace(0.03, 0.97, count)
    return ts, 1.5 * jr.normal(jr.key(0), (count, dim))


def check_value_and_action(problem, tolerance):
    """The HJB equation, and `a* = a_ref + 2 eta^2 / (lambda (1 + eta^2)) grad V*` with the gradient by differentiation."""
    eta = problem.process.eta

    @jax.jit
    def evaluate(ts, x):
        gradient = jax.grad(lambda x: jnp.sum(problem.value(ts, x)))(x)
        reference = problem.reference_action(None, ts, x)
        expected = reference + 2 * eta**2 / (problem.kl_weight * (1 + eta**2)) * gradient
        residual, size = jax.vmap(lambda t, x: hamilton_jacobi_bellman(problem, t, x))(ts, x)
        return residual, size, gradient, problem.value_gradient(ts, x), expected, problem.optimal_action(None, ts, x)

    residual, size, gradient, closed, expected, action = evaluate(*states(problem.process))
    assert jnp.all(jnp.abs(residual) < tolerance * size)
    scale = 1e-9 * (1 + jnp.max(jnp.abs(action)))  # near zero noise a* - a_ref is a difference of large numbers
    np.testing.assert_allclose(closed, gradient, rtol=1e-8, atol=scale)
    np.testing.assert_allclose(action, expected, rtol=1e-8, atol=scale)


@pytest.mark.parametrize("eta", [0.25, 1.0])
@pytest.mark.parametrize("schedule", SCHEDULES, **ids)
def test_gaussian_value_solves_the_hjb_equation_and_gives_the_optimal_action(schedule, eta):
    check_value_and_action(gaussian(schedule, eta), 1e-9)


@pytest.mark.parametrize("reward", [LinearReward((1.0, -0.4)), QuadraticReward(1.5, (2.0, 0.5))], ids=["linear", "quadratic"])
@pytest.mark.parametrize("schedule", [VPLinear(), SCHEDULES[3], RectifiedFlow()], **ids)
def test_mixture_value_solves_the_hjb_equation_and_gives_the_optimal_action(schedule, reward):
    """The action is coded as the score of the noised reweighted law, the value as a log-mean-exp over components."""
    check_value_and_action(uneven(reward, schedule), 1e-8)


@pytest.mark.parametrize("schedule, eta", list(zip([constant_rate(), *SCHEDULES], (0.25, 0.5, 1.0, 0.5, 0.25, 0.5))), **ids)
def test_gaussian_numbers_follow_from_the_moment_equations(schedule, eta):
    """Mean, variance and path KL by integrating the controlled SDE's moments: nothing of the closed form but the actions."""
    for noise_start in (False, True)[: 2 if schedule.horizon == 2 else 1]:
        problem = gaussian(schedule, eta, noise_start)
        process = problem.process

        @jax.jit
        def affine(t, problem=problem, process=process):
            a, b, g = process.coefficients(t)
            best, ref = (jnp.stack([f(None, t, jnp.full((1, 1), x))[0, 0] for x in (0.0, 1.0)]) for f in actions(problem))
            return a, b, g, best, ref, process.kl_rate(t, jnp.ones((1, 1)), jnp.zeros((1, 1)))[0]

        def moments(t, y, optimal, affine=affine):
            mean, variance, _ = y
            a, b, g, best, ref, k = (np.asarray(z) for z in affine(jnp.asarray(t)))
            offset, gain = (best[0], best[1] - best[0]) if optimal else (ref[0], ref[1] - ref[0])
            d0, d1 = best[0] - ref[0], best[1] - best[0] - ref[1] + ref[0]
            cost = k * ((d0 + d1 * mean) ** 2 + d1**2 * variance)
            return [a * mean + b * (gain * mean + offset), 2 * (a + b * gain) * variance + g**2, cost]

        def final(optimal, process=process, start=problem.start, moments=moments):
            y0 = [float(z) for z in (*start, 0.0)]
            span = (process.t0, process.t1)
            done = scipy.integrate.solve_ivp(moments, span, y0, "DOP853", args=(optimal,), rtol=1e-10, atol=1e-11)
            return done.y[:, -1]

        mean, variance, kl = final(True)
        np.testing.assert_allclose((mean, variance), problem.optimal_terminal, rtol=1e-7)
        np.testing.assert_allclose(kl, problem.path_kl, rtol=1e-7)
        np.testing.assert_allclose(final(False)[:2], problem.reference_terminal, rtol=1e-7)
        reward = -0.5 * ((mean + 0.5) ** 2 + variance)
        np.testing.assert_allclose(reward - 0.7 * kl, problem.optimal_value, rtol=1e-7)
        np.testing.assert_allclose(reward, problem.optimal_reward, rtol=1e-7)
        assert problem.terminal_kl <= problem.path_kl


def actions(problem):
    return problem.optimal_action, problem.reference_action


def test_reference_law_is_the_noised_data():
    problem = gaussian(RectifiedFlow(tau_min=0.2), 0.5)
    np.testing.assert_allclose(problem.reference_terminal, (0.8, 0.8**2 * 0.25 + 0.2**2), rtol=1e-12)
    np.testing.assert_allclose(problem.reference_value, -0.5 * (1.3**2 + 0.2), rtol=1e-12)


@pytest.mark.parametrize("make", [lambda: gaussian(VPLinear(), 0.5), lambda: uneven(LinearReward((1.0, 0.5)))])
def test_value_is_the_reward_at_the_end_in_both_precisions(make):
    for dtype in (jnp.float32, jnp.float64):
        problem = make()
        x = jr.normal(jr.key(1), (5, 2), dtype)
        value = jax.jit(problem.value)(jnp.asarray(problem.process.t1, dtype), x)
        assert value.dtype == dtype
        np.testing.assert_allclose(value, problem.reward(x), rtol=20 * jnp.finfo(dtype).eps)


def test_states_of_any_shape_and_times_per_sample():
    ts, images = jnp.linspace(0.1, 0.9, 4), jr.normal(jr.key(1), (4, 2, 3))
    independent = gaussian(VPLinear(), 0.5)
    for problem, x in ((independent, images), (uneven(LinearReward((1.0, 0.5))), images[..., 0])):

        @jax.jit
        def evaluate(ts, x, problem=problem):
            return problem.value(ts, x), problem.value_gradient(ts, x), problem.optimal_action(None, ts, x)

        for together, one in zip(evaluate(ts, x), zip(*[evaluate(t, y[None]) for t, y in zip(ts, x)])):
            np.testing.assert_allclose(together, np.concatenate(one), rtol=1e-9)
    value = jax.jit(independent.value)
    flat = [value(ts, y) for y in jnp.moveaxis(images.reshape(4, 6, 1), 1, 0)]
    np.testing.assert_allclose(value(ts, images), sum(flat), rtol=1e-12)


# --- mixtures


@pytest.mark.parametrize(
    "reward, kl_weight, log_z, reward_mean, kl",
    [
        (LinearReward((1.0, 0.0)), 1.0, 1.51056382, 2.37963250, 0.86906869),
        (LinearReward((1.0, 0.0)), 0.5, 4.15656781, 2.83663406, 1.51670030),
        (LinearReward((1.0, 0.0)), 0.25, 10.30650323, 3.27277051, 2.78457882),
        (QuadraticReward(0.5, (2.0, 0.0)), 1.0, -1.56807947, -0.75736931, 0.81071017),
        (QuadraticReward(2.0, (2.0, 0.0)), 1.0, -2.71998544, -0.90341132, 1.81657412),
    ],
)
def test_ring_table(reward, kl_weight, log_z, reward_mean, kl):
    problem = ring_problem(reward, kl_weight)
    numbers = (problem.log_normaliser, problem.tilted_reward, problem.tilted_kl)
    np.testing.assert_allclose(numbers, (log_z, reward_mean, kl), rtol=0, atol=0.51e-8)


def plane(half=6.0, count=241):
    """A square grid and its cell area: the trapezoidal rule converges exponentially for Gaussians."""
    axis = jnp.linspace(-half, half, count)
    return jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2), (axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("reward", [LinearReward((1.0, -0.4)), QuadraticReward(1.5, (2.0, 0.5))], ids=["linear", "quadratic"])
@pytest.mark.parametrize("schedule", [VPLinear(tau_min=0.1), RectifiedFlow(tau_min=0.2)], **ids)
def test_mixture_value_is_the_log_mean_exp_over_the_posterior_of_the_final_state(schedule, reward):
    """By quadrature over `X(t1)`, which is at `tau_min > 0`, with the noising kernel from `tau_min` to `tau`."""
    problem = uneven(reward, schedule)
    process = problem.process
    y, area = plane()
    law = problem.terminal()
    density, tilt = jnp.exp(law.log_density(y)), jnp.exp(problem.reward(y) / problem.kl_weight)
    alpha, sigma_squared = schedule.alpha(jnp.asarray(schedule.tau_min)), schedule.sigma_squared(jnp.asarray(schedule.tau_min))
    data = problem.data.components()
    np.testing.assert_allclose(law.means, alpha * data.means, rtol=1e-12)
    np.testing.assert_allclose(law.variance, alpha**2 * 0.4**2 + sigma_squared, rtol=1e-12)
    np.testing.assert_allclose(area * jnp.sum(density * tilt), jnp.exp(problem.log_normaliser), rtol=1e-9)
    rewards = area * jnp.sum(density * tilt * problem.reward(y)) / jnp.exp(problem.log_normaliser)
    np.testing.assert_allclose(rewards, problem.tilted_reward, rtol=1e-9)
    value = jax.jit(problem.value)
    for t, x in zip((0.3, 0.6, 0.75), jr.normal(jr.key(2), (3, 2))):
        tau = process.tau(jnp.asarray(t))
        scale = schedule.alpha(tau) / alpha
        noise = schedule.sigma_squared(tau) - scale**2 * sigma_squared
        posterior = density * jnp.exp(-0.5 * jnp.sum((x - scale * y) ** 2, axis=1) / noise)
        expected = problem.kl_weight * jnp.log(jnp.sum(posterior * tilt) / jnp.sum(posterior))
        np.testing.assert_allclose(value(jnp.asarray(t), x[None])[0], expected, rtol=1e-8, atol=1e-9)


def test_score_is_the_gradient_of_the_log_density():
    law = ring_problem(LinearReward((1.0, 0.0))).tilted()
    x = jr.normal(jr.key(3), (6, 2))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(law.log_density(x))))(x)
    np.testing.assert_allclose(law.score(x), gradient, rtol=1e-10)
    y, area = plane()
    np.testing.assert_allclose(area * jnp.sum(jnp.exp(law.log_density(y))), 1.0, rtol=1e-9)


def test_ring_is_the_published_one():
    means = np.asarray(ring().means)
    np.testing.assert_allclose(means[0], (2.828854, 0.0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 4 / 1.414)
    np.testing.assert_allclose(np.linalg.norm(means[1:] - means[:-1], axis=1), 2 * 4 / 1.414 * np.sin(np.pi / 8))
    assert ring().std == 0.5 / 1.414 and ring().weights == (0.125,) * 8


def test_memory_costs_the_ring_1e_4():
    """`J* = E V*(t0, X(t0))` is below `lambda log Z` by the variance of `V*(t0, .)` over 2 lambda, to second order."""
    problem = ring_problem(LinearReward((1.0, 0.0)))
    x0 = problem.process.initial(sample_keys(jr.key(4), 4000), (2,), jnp.float64)
    values = jax.jit(problem.value)(jnp.asarray(0.0), x0)
    deficit = problem.log_normaliser - jax.jit(problem.optimal_value)()
    np.testing.assert_allclose(deficit, 1.22e-4, atol=0.01e-4)
    # E V* = log Z - Var / 2 + O(skewness): the standard error of a variance is about sqrt(2 / n) of it
    np.testing.assert_allclose(jnp.var(values) / 2, deficit, rtol=4 * np.sqrt(2 / 4000))
    assert abs(jnp.mean(values) + deficit - problem.log_normaliser) < 4 * jnp.std(values) / np.sqrt(4000)


def test_samples_of_a_mixture_have_its_moments():
    problem, count = ring_problem(QuadraticReward(2.0, (2.0, 0.0))), 4000
    for law in (problem.tilted(), problem.terminal()):
        draws = law.sample(sample_keys(jr.key(5), count))
        rewards = problem.reward(draws)
        assert abs(jnp.mean(rewards) - law.expectation(problem.reward)) < 4 * jnp.std(rewards) / np.sqrt(count)


def test_bad_arguments_are_named():
    process = DiffusionProcess(VPLinear())
    with pytest.raises(ValueError, match="eta=0"):
        GaussianQuadratic(DiffusionProcess(VPLinear(), 0.0), 0.0, 1.0, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"data_std=0\.0 must be positive"):
        GaussianQuadratic(process, 0.0, 0.0, 1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match=r"kl_weight=0\.0 must be positive"):
        GaussianQuadratic(process, 0.0, 1.0, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"kl_weight=-1\.0 must be positive"):
        MixtureControl(process, ring(), LinearReward((1.0, 0.0)), -1.0)
    with pytest.raises(ValueError, match=r"curvature=-1\.0 must be positive"):
        QuadraticReward(-1.0, (0.0,))
    with pytest.raises(ValueError, match="sum to 1"):
        GaussianMixture([[0.0], [1.0]], 1.0, [0.5, 0.6])
    with pytest.raises(ValueError, match="one row of equal length per component"):
        GaussianMixture([[0.0], [1.0, 2.0]], 1.0)
    with pytest.raises(ValueError, match=r"std=0\.0 must be positive"):
        GaussianMixture([[0.0]], 0.0)
    half = MixtureControl(DiffusionProcess(VPLinear(), 0.5), ring(), LinearReward((1.0, 0.0)), 1.0)
    x = jnp.zeros((1, 2))
    assert half.reference_action(None, jnp.asarray(0.5), x).shape == (1, 2)  # a score at any eta
    for function in (half.value, half.value_gradient, lambda t, x: half.optimal_action(None, t, x)):
        with pytest.raises(ValueError, match=r"eta=0\.5: the mixture's V\* and optimal action"):
            function(jnp.asarray(0.5), x)
    high = MixtureControl(process, GaussianMixture(np.zeros((1, 4)), 1.0), LinearReward((1.0, 0.0, 0.0, 0.0)), 1.0)
    with pytest.raises(ValueError, match="dimension 4"):
        high.optimal_value()
