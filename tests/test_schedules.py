"""Noise schedules against their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_diffusion.schedules import RectifiedFlow, VarianceExploding, VPCosine, VPLinear, VPTable


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def vp_linear(tau, beta_min, beta_max, horizon):
    beta = beta_min + (beta_max - beta_min) * tau / horizon
    integral = beta_min * tau + (beta_max - beta_min) * tau**2 / (2 * horizon)
    return np.exp(-integral / 2), 1 - np.exp(-integral), -beta / 2, beta


def vp_cosine(tau, s=0.008):
    angle = np.pi / 2 * (tau + s) / (1 + s)
    alpha, f = np.cos(angle) / np.cos(np.pi / 2 * s / (1 + s)), -np.pi / 2 / (1 + s) * np.tan(angle)
    return alpha, 1 - alpha**2, f, -2 * f


CLOSED_FORMS = [
    (VPLinear(), lambda tau: vp_linear(tau, 0.1, 20.0, 1.0)),
    (VPLinear(beta_min=4.0, beta_max=4.0, horizon=2.0, tau_max=2.0), lambda tau: vp_linear(tau, 4.0, 4.0, 2.0)),
    (VPLinear(beta_min=0.5, beta_max=3.0, horizon=5.0, tau_max=4.0), lambda tau: vp_linear(tau, 0.5, 3.0, 5.0)),
    (VPCosine(), vp_cosine),
    (VPCosine(s=0.02), lambda tau: vp_cosine(tau, 0.02)),
    (VarianceExploding(), lambda tau: (np.ones_like(tau), tau**2, np.zeros_like(tau), 2 * tau)),
    (RectifiedFlow(), lambda tau: (1 - tau, tau**2, -1 / (1 - tau), 2 * tau / (1 - tau))),
]
EVERY = [schedule for schedule, _ in CLOSED_FORMS] + [VPTable(), VPTable(betas=(0.1, 0.3, 0.2), horizon=3.0, tau_max=3.0)]


def inside(schedule, count=7):
    """Noising times strictly between `tau_min` and `tau_max`."""
    return np.linspace(schedule.tau_min, schedule.tau_max, count + 2)[1:-1] + 1e-4


@pytest.mark.parametrize("schedule, closed", CLOSED_FORMS, ids=[repr(schedule) for schedule, _ in CLOSED_FORMS])
def test_alpha_sigma_f_and_g_against_closed_forms(schedule, closed):
    tau = inside(schedule)
    alpha, sigma_squared, f, g_squared = closed(tau)
    times = jnp.asarray(tau)
    np.testing.assert_allclose(schedule.alpha(times), alpha, rtol=1e-12)
    np.testing.assert_allclose(schedule.log_alpha(times), np.log(alpha), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(schedule.sigma_squared(times), sigma_squared, rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(times), np.sqrt(sigma_squared), rtol=1e-12)
    np.testing.assert_allclose(schedule.log_snr(times), np.log(alpha) - 0.5 * np.log(sigma_squared), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(schedule.f(times), f, rtol=1e-12)
    np.testing.assert_allclose(schedule.g_squared(times), g_squared, rtol=1e-12)


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_g_squared_is_the_rate_of_the_log_snr(schedule):
    """`g^2 = -2 sigma^2 d log(alpha / sigma) / dtau`, which also says that noise only grows."""
    tau = jnp.asarray(inside(schedule))
    slope = jax.vmap(jax.grad(schedule.log_snr))(tau)
    np.testing.assert_allclose(schedule.g_squared(tau), -2 * schedule.sigma_squared(tau) * slope, rtol=1e-9)
    assert jnp.all(slope < 0)


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_elementwise_in_any_shape(schedule):
    tau = jnp.asarray(inside(schedule, 6))
    for function in (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.f, schedule.g_squared):
        assert function(tau.reshape(2, 3)).shape == (2, 3)
        np.testing.assert_allclose(function(tau.reshape(2, 3)).ravel(), [function(t) for t in tau], rtol=1e-13, atol=1e-15)


def test_stable_diffusion_table_is_exact_at_its_nodes():
    """`alphas_cumprod` of the scaled-linear table, computed as the product it is defined by."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    cumulative = np.cumprod(1 - betas)
    np.testing.assert_allclose(cumulative[[0, -1]], (0.99915, 0.0046600), atol=5e-7)
    schedule, tau = VPTable(), jnp.arange(1, 1001) / 1000
    np.testing.assert_allclose(schedule.alpha(tau) ** 2, cumulative, rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma_squared(tau), 1 - cumulative, rtol=1e-11)
    assert schedule.alpha(jnp.asarray(0.0)) == 1.0


def test_table_in_float32_is_exact_to_rounding():
    cumulative = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    alpha = VPTable().alpha(jnp.arange(1, 1001, dtype=jnp.float32) / 1000)
    np.testing.assert_allclose(alpha**2, cumulative, rtol=20 * np.finfo(np.float32).eps)  # log alpha is of order 3


def test_the_rate_of_a_table_is_continuous_and_of_its_entries_in_the_mean():
    """Its integral over an interval is the entry's `log(1 - beta) / 2`; it never changes sign, and does not jump at nodes."""
    betas = np.array([0.1, 0.3, 0.2])
    schedule = VPTable(betas=tuple(betas.tolist()), horizon=6.0, tau_max=6.0)  # two units of time per entry
    nodes, weights = np.polynomial.legendre.leggauss(3)  # exact for the quadratic rate
    for i, beta in enumerate(betas):
        integral = weights @ np.asarray(schedule.f(jnp.asarray(2.0 * i + 1 + nodes)))
        np.testing.assert_allclose(integral, 0.5 * np.log1p(-beta), rtol=1e-12)
    everywhere = jnp.linspace(0.0, 6.0, 601)
    assert np.all(schedule.f(everywhere[1:-1]) < 0) and np.all(schedule.g_squared(everywhere[1:-1]) > 0)
    inner = jnp.asarray([2.0, 4.0])
    np.testing.assert_allclose(schedule.f(inner - 1e-9), schedule.f(inner + 1e-9), atol=1e-8)


def test_small_noise_survives_float32():
    """`1 - alpha^2` and differences of `log cos` would lose their digits near the data."""
    tau = jnp.asarray(1e-3, jnp.float32)
    for schedule in (VPLinear(), VPCosine(), VPTable()):
        single, double = schedule.sigma_squared(tau), schedule.sigma_squared(tau.astype(float))
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, double, rtol=8 * np.finfo(np.float32).eps, err_msg=repr(schedule))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: VPLinear(horizon=0.0), "horizon=0.0 must be positive"),
        (lambda: VPLinear(tau_min=-0.1), "tau_min=-0.1, tau_max=1.0 must satisfy"),
        (lambda: VPLinear(tau_min=0.5, tau_max=0.5), "tau_min=0.5, tau_max=0.5 must satisfy"),
        (lambda: VPLinear(tau_max=1.5), "tau_min < tau_max <= horizon=1.0"),
        (lambda: VarianceExploding(horizon=50.0), "tau_max=80.0 must satisfy"),
        (lambda: VPCosine(tau_max=1.0), "tau_max=1.0 must be below 1: the cosine schedule"),
        (lambda: RectifiedFlow(tau_max=1.0), "tau_max=1.0 must be below 1: rectified flow"),
        (lambda: VPTable(betas=(0.1, 1.0)), "betas must all lie strictly between 0 and 1"),
        (lambda: VPTable(betas=(0.0, 0.1)), "betas must all lie strictly between 0 and 1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
