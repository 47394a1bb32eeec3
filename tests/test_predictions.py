"""Predictions by their definitions: with the noise and the data known, every network output is known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from ctrl_diffusion.predictions import EPSILON, SCORE, VELOCITY, X0, V, expand
from ctrl_diffusion.schedules import RectifiedFlow, VarianceExploding, VPCosine, VPLinear, VPTable

SCHEDULES = [VPLinear(), VPCosine(), VPTable(), VarianceExploding(), RectifiedFlow()]
PREDICTIONS = [EPSILON, X0, V, SCORE, VELOCITY]
by_name = dict(ids=lambda value: getattr(value, "name", type(value).__name__))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def pair(schedule, batch=4, shape=(3, 2)):
    """Times, data, noise, the noised state and the score of the noising given the data."""
    tau = schedule.tau_min + (schedule.tau_max - schedule.tau_min) * jr.uniform(jr.key(0), (batch,))
    data, noise = jr.normal(jr.key(1), (2, batch, *shape))
    t = tau[:, None, None]
    return tau, data, noise, schedule.alpha(t) * data + schedule.sigma(t) * noise, -noise / schedule.sigma(t)


@pytest.mark.parametrize("schedule", SCHEDULES, **by_name)
def test_definitions(schedule):
    tau, data, noise, x, score = pair(schedule)
    t = tau[:, None, None]
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    alpha_rate = jax.vmap(jax.grad(schedule.alpha))(tau)[:, None, None]
    sigma_rate = jax.vmap(jax.grad(schedule.sigma))(tau)[:, None, None]
    definitions = {
        EPSILON: noise,
        X0: data,
        V: alpha * noise - sigma * data,
        SCORE: score,
        VELOCITY: alpha_rate * data + sigma_rate * noise,
    }
    for prediction, expected in definitions.items():
        actual = prediction.from_score(schedule, tau, x, score)
        # a prediction is a difference of terms of the size of x / alpha and sigma / alpha: relative to those
        scale = jnp.max(jnp.abs(expected)) + jnp.max(jnp.abs(x / alpha))
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-13 * scale, err_msg=prediction.name)


@pytest.mark.parametrize("schedule", SCHEDULES, **by_name)
@pytest.mark.parametrize("prediction", PREDICTIONS, **by_name)
def test_round_trips(schedule, prediction):
    tau, _, _, x, score = pair(schedule)
    back = prediction.to_score(schedule, tau, x, prediction.from_score(schedule, tau, x, score))
    np.testing.assert_allclose(back, score, rtol=1e-6)  # x0 at sigma = 1e-2 loses alpha / sigma^2 of the digits
    one = prediction.from_score(schedule, tau[0], x[:1], score[:1])  # a scalar time
    np.testing.assert_allclose(one, prediction.from_score(schedule, tau, x, score)[:1], rtol=1e-14)


def test_velocity_is_the_drift_of_the_probability_flow_ode():
    for schedule in SCHEDULES:
        tau, _, _, x, score = pair(schedule)
        t = tau[:, None, None]
        drift = schedule.f(t) * x - 0.5 * schedule.g_squared(t) * score
        np.testing.assert_allclose(VELOCITY.from_score(schedule, tau, x, score), drift, rtol=1e-12, atol=1e-12)


def test_rectified_flow_velocity_is_noise_minus_data():
    tau, data, noise, x, score = pair(RectifiedFlow())
    np.testing.assert_allclose(VELOCITY.from_score(RectifiedFlow(), tau, x, score), noise - data, rtol=1e-7, atol=1e-9)


def test_predictions_are_finite_at_zero_noise():
    schedule = VPLinear(tau_min=0.0)
    x, score = jr.normal(jr.key(0), (2, 3, 2))
    expected = {EPSILON: 0 * x, X0: x, V: 0 * x, SCORE: score, VELOCITY: -0.05 * x - 0.05 * score}
    for prediction, value in expected.items():
        np.testing.assert_allclose(prediction.from_score(schedule, jnp.asarray(0.0), x, score), value, atol=1e-15)


def test_expand_appends_axes_to_times_only():
    x = jnp.zeros((4, 3, 2))
    assert expand(jnp.asarray(1.0), x).shape == ()
    assert expand(jnp.ones(4), x).shape == (4, 1, 1)
    np.testing.assert_array_equal(expand(jnp.arange(4.0), x) + x, jnp.broadcast_to(jnp.arange(4.0)[:, None, None], x.shape))
