"""Probability-flow log-likelihood against exact mixture densities."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from ctrl_diffusion.likelihood import log_likelihood
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.schedules import VPLinear, VPTable
from ctrl_diffusion.solvers import sample_keys
from experiments.solvers.problems import SCHEDULE, mixture, mixture_score, process


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def law(t, schedule=SCHEDULE):
    tau = jnp.asarray(schedule.horizon - t)
    return mixture().noised(schedule.alpha(tau), schedule.sigma_squared(tau))


@pytest.fixture
def points():
    return mixture().sample(sample_keys(jr.key(0), 12))


def test_exact_trace_is_within_1e_4_of_the_mixture(points):
    got = log_likelihood(process(), mixture_score, None, points, log_prior=law(process().t0).log_density, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(got.value, law(process().t1).log_density(points), atol=1e-4)
    assert np.all(got.standard_error == 0)


def test_the_eta_of_the_process_does_not_matter(points):
    one, zero = (log_likelihood(process(eta), mixture_score, None, points) for eta in (1.0, 0.0))
    np.testing.assert_array_equal(one.value, zero.value)


def test_default_prior_is_the_law_of_the_start(points):
    """With enough noise at the start, the mixture there is the normal law that samples start from."""
    schedule = VPLinear(beta_max=50.0, tau_min=0.02)

    def score(params, t, x, cond):
        return law(t, schedule).score(x)

    got = log_likelihood(DiffusionProcess(schedule), score, None, points, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(got.value, law(schedule.horizon - schedule.tau_min, schedule).log_density(points), atol=1e-4)


def test_hutchinson_agrees_within_its_standard_error(points):
    exact = log_likelihood(process(), mixture_score, None, points).value
    got = log_likelihood(process(), mixture_score, None, points, keys=sample_keys(jr.key(1), len(points)), probes=64)
    z = (got.value - exact) / got.standard_error
    assert np.all(got.standard_error > 0)
    assert np.max(np.abs(z)) < 4 and 0.4 < np.sqrt(np.mean(z**2)) < 1.8


def test_steps_adapt_to_a_tabulated_schedule(points):
    """The default tolerance is enough for 1e-4, as on a closed form, in as many steps as that takes: a table has no corners."""
    schedule = VPTable(tau_min=0.02)

    def score(params, t, x, cond):
        return law(t, schedule).score(x)

    prior = law(schedule.horizon - schedule.tau_max, schedule).log_density
    got = log_likelihood(DiffusionProcess(schedule), score, None, points, log_prior=prior, max_steps=40)
    np.testing.assert_allclose(got.value, law(schedule.horizon - schedule.tau_min, schedule).log_density(points), atol=1e-4)


@pytest.mark.slow
def test_hutchinson_is_exact_for_a_diagonal_jacobian_and_per_sample(points):
    """Random signs give the trace of a diagonal matrix without error; a sample does not depend on the rest of its batch."""
    keys = sample_keys(jr.key(2), len(points))

    def score(params, t, x, cond):
        return -x

    exact = log_likelihood(process(), score, None, points)
    got = log_likelihood(process(), score, None, points, keys=keys, probes=2)
    np.testing.assert_allclose(got.value, exact.value, atol=1e-10)
    np.testing.assert_allclose(got.standard_error, 0, atol=1e-10)
    tight = dict(probes=2, rtol=1e-8, atol=1e-8)
    whole = log_likelihood(process(), mixture_score, None, points, keys=keys, **tight)
    part = log_likelihood(process(), mixture_score, None, points[4:8], keys=keys[4:8], **tight)
    np.testing.assert_allclose(whole.value[4:8], part.value, atol=1e-5)


@pytest.mark.slow
def test_gradient_in_the_sample_is_the_score(points):
    def total(x):
        prior = law(process().t0).log_density
        adjoint = dfx.RecursiveCheckpointAdjoint()
        return jnp.sum(log_likelihood(process(), mixture_score, None, x, log_prior=prior, adjoint=adjoint, max_steps=256).value)

    np.testing.assert_allclose(jax.grad(total)(points[:3]), law(process().t1).score(points[:3]), atol=2e-3)


def test_too_few_steps_are_not_silent_and_one_probe_is_refused(points):
    assert np.all(np.isnan(log_likelihood(process(), mixture_score, None, points, max_steps=3).value))
    with pytest.raises(ValueError, match="probes=1"):
        log_likelihood(process(), mixture_score, None, points, keys=sample_keys(jr.key(0), len(points)), probes=1)
