"""Sampling: per-sample randomness, recorded paths, the chain's likelihood, and errors that name the remedy."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from ctrl_diffusion.exploration import ActionNoise, Brownian
from ctrl_diffusion.predictions import EPSILON, X0
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.sampler import Sampler, log_ratio, path_actions, step_kl
from ctrl_diffusion.schedules import RectifiedFlow, VPCosine, VPLinear
from ctrl_diffusion.solvers import ExponentialEuler, RecordedPath, integrate, sample_keys


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def control(params, t, x, cond):
    """A nonlinear field, with a parameter and a condition per sample."""
    return -params * (1 + t) * jnp.tanh(x[..., ::-1]) - x + cond


def sampler(eta=0.5, solver=None, steps=8, schedule=None, frozen=X0, dtype=jnp.float64):
    process = DiffusionProcess(schedule or VPLinear(tau_min=0.01), eta, frozen)
    return Sampler(process, control, (2,), grid=process.grid(steps), solver=solver, dtype=dtype)


def batch():
    """Keys and conditions of six samples."""
    return sample_keys(jr.key(3), 6), jnp.linspace(-1, 1, 12).reshape(6, 2)


@functools.cache
def compiled(solver, eta=0.5, frozen=X0):
    """A sampler and its two functions, compiled; called inside the tests, hence in float64."""
    paths = sampler(eta, SOLVERS[solver], frozen=frozen)
    return paths, eqx.filter_jit(paths.sample), eqx.filter_jit(paths.trajectory)


SOLVERS = {"euler": dfx.Euler(), "exponential": ExponentialEuler(), "heun": dfx.Heun(), "sra1": dfx.SRA1()}


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["exponential", "heun"])
def test_a_sample_depends_on_its_own_key_and_condition_only(solver):
    """Splitting or reordering the batch changes nothing beyond rounding."""
    (keys, cond), (_, sample, _) = batch(), compiled(solver)
    whole = sample(1.0, keys, cond)
    parts = jnp.concatenate([sample(1.0, keys[:3], cond[:3]), sample(1.0, keys[3:], cond[3:])])
    np.testing.assert_allclose(parts, whole, rtol=1e-10, atol=1e-12)
    order = jr.permutation(jr.key(0), 6)
    np.testing.assert_allclose(sample(1.0, keys[order], cond[order]), whole[order], rtol=1e-10, atol=1e-12)
    assert jnp.min(jnp.abs(whole[1:] - whole[:-1])) > 1e-6  # samples do differ


def test_keys_number_samples_globally():
    parts = [sample_keys(jr.key(3), 4), sample_keys(jr.key(3), 2, start=4)]
    np.testing.assert_array_equal(jr.key_data(jnp.concatenate(parts)), jr.key_data(batch()[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver, eta", [("euler", 0.5), ("exponential", 0.5), ("exponential", 0.0), ("heun", 0.5), ("sra1", 0.5)]
)
def test_trajectory_ends_where_sample_ends(solver, eta):
    (keys, cond), (paths, sample, trajectory) = batch(), compiled(solver, eta)
    path = trajectory(1.0, keys, cond)
    assert path.x.shape == (9, 6, 2) and path.noise.shape == (8, 6, 2)
    np.testing.assert_allclose(path.t, paths.grid)
    np.testing.assert_allclose(path.x[-1], sample(1.0, keys, cond), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(path.x[0], paths.start(keys)[0])
    assert jnp.all(path.noise == 0) == (eta == 0)


def test_a_trajectory_can_be_replayed_from_its_noise():
    (keys, cond), (paths, _, trajectory) = batch(), compiled("heun")
    path = trajectory(1.0, keys, cond)
    term = paths.process.term(control, RecordedPath(ts=path.t, noise=path.noise))
    replayed = integrate(term, paths.solver, paths.grid, path.x[0], (1.0, cond), every_step=True)
    np.testing.assert_allclose(replayed, path.x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver, frozen", [("euler", X0), ("exponential", X0), ("exponential", EPSILON)])
def test_recorded_noise_and_transition_explain_every_step(solver, frozen):
    """`x1 = phi x0 + psi a + std noise`, with the actions recomputed afterwards: the likelihood is of this chain."""
    (keys, cond), (paths, _, trajectory) = batch(), compiled(solver, frozen=frozen)
    path = trajectory(1.0, keys, cond)
    actions = path_actions(control, 1.0, path, cond)
    step = jax.vmap(lambda t0, t1: paths.process.transition(paths.solver, t0, t1))(path.t[:-1], path.t[1:])
    phi, psi, std = (z[:, None, None] for z in step)
    noise = (path.x[1:] - phi * path.x[:-1] - psi * actions) / std
    np.testing.assert_allclose(noise, path.noise, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(paths.chain_scales(), step.psi / step.std, rtol=1e-12)


def test_noise_is_standard_normal_and_independent():
    paths = sampler(steps=40, solver=dfx.SRA1())
    start, keys = paths.start(sample_keys(jr.key(0), 500))
    path = paths.brownian(paths.ts, keys)

    @jax.jit
    @jax.vmap
    def increments(t0, t1):
        found = path.evaluate(t0, t1, use_levy=True)
        return found.W / jnp.sqrt(t1 - t0), found.H / jnp.sqrt((t1 - t0) / 12)

    noise, area = increments(paths.ts[:-1], paths.ts[1:])
    np.testing.assert_allclose(noise, path.tabulate(), rtol=1e-12)
    start = start / jnp.std(start)
    for v in (noise, area):
        assert abs(jnp.mean(v)) < 4 / np.sqrt(v.size)
        assert abs(jnp.var(v) - 1) < 4 * np.sqrt(2 / v.size)
        products = [v[1:] * v[:-1], v[:, 1:] * v[:, :-1], v[..., 1] * v[..., 0], noise * area, start * v[0], start * v[1]]
        for product in products:
            assert abs(jnp.mean(product)) < 4 / np.sqrt(product.size)


def test_euler_maruyama_scales_are_girsanov_s():
    """`psi / std = (B / G) sqrt(dt)` at the left ends; the exponential chain tends to it at first order."""
    euler = sampler(0.5, dfx.Euler())
    np.testing.assert_allclose(euler.chain_scales(), euler.girsanov_scales(), rtol=1e-12)
    rate = (1 + 0.25) / (2 * 0.5) * jnp.sqrt(euler.process.schedule.g_squared(1 - euler.ts[:-1]))
    np.testing.assert_allclose(euler.girsanov_scales(), rate * jnp.sqrt(jnp.diff(euler.ts)), rtol=1e-12)
    errors = []
    for steps in (500, 1000):
        exponential = sampler(0.5, ExponentialEuler(), steps=steps)
        errors.append((exponential.chain_scales() / exponential.girsanov_scales() - 1)[:: steps // 10][:9])
    np.testing.assert_allclose(errors[0], 2 * errors[1], rtol=0.05)


def test_step_kl_and_log_ratio_are_those_of_gaussians():
    """Against the log-densities of `N(psi a, std^2)`, summed over state dimensions."""
    scales, std = jnp.asarray([0.5, 2.0, 0.1]), jnp.asarray([0.3, 0.2, 1.0])[:, None, None]
    psi = scales[:, None, None] * std
    a, a_old, noise = jr.normal(jr.key(0), (3, 3, 4, 2))
    x = psi * a_old + std * noise
    new, old = (jnp.sum(jax.scipy.stats.norm.logpdf(x, psi * action, std), axis=-1) for action in (a, a_old))
    z = scales[:, None, None] * (a - a_old)
    ratio = jax.vmap(log_ratio)(z, noise)
    np.testing.assert_allclose(ratio, new - old, rtol=1e-10, atol=1e-12)
    kl = jnp.sum((psi * (a - a_old)) ** 2 / (2 * std**2), axis=-1)
    np.testing.assert_allclose(step_kl(scales, a, a_old), kl, rtol=1e-12)


def test_eta_0_is_deterministic():
    (keys, cond), (paths, sample, _) = batch(), compiled("exponential", 0.0)
    assert not paths.is_stochastic and sampler(0.5).is_stochastic
    end = integrate(paths.process.term(control, None), paths.solver, paths.grid, paths.start(keys)[0], (1.0, cond))
    np.testing.assert_allclose(sample(1.0, keys, cond), end, rtol=1e-12)


def test_gradients_flow_through_a_solve():
    """Reverse mode under a checkpointed adjoint against central differences."""
    (keys, cond), paths = batch(), sampler(0.5, ExponentialEuler())
    adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=8)

    @jax.jit
    def mean(scale):
        return jnp.mean(paths.sample(scale, keys, cond, adjoint=adjoint)[:, 0])

    step = 1e-5
    difference = (mean(1.0 + step) - mean(1.0 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(mean)(1.0), difference, rtol=1e-6)


def test_the_default_is_fifty_exponential_steps_in_float32():
    process = DiffusionProcess(VPCosine())
    paths = Sampler(process, control, (2,))
    assert isinstance(paths.solver, ExponentialEuler) and paths.ts.dtype == jnp.float32
    np.testing.assert_allclose(paths.grid, np.linspace(process.t0, process.t1, 51))
    assert eqx.filter_jit(paths.sample)(1.0, batch()[0], jnp.zeros(2, jnp.float32)).dtype == jnp.float32


def test_action_noise_is_scaled_per_unit_time():
    """`sum_j scale_j^2 -> int g^2 dt / strength^2`, whatever the number of intervals: 10.04 for this schedule."""
    for steps in (100, 400):
        paths = sampler(0.0, steps=steps, schedule=VPLinear(tau_min=0.0))
        total = jnp.sum(ActionNoise(strength=2.0).scales(paths) ** 2)
        slope = 19.9 / steps  # left ends over a linear beta that falls from 20 to 0.1: the error is half its fall over a step
        np.testing.assert_allclose(total, (10.05 + slope / 2) / 4, rtol=1e-9)
    stochastic = sampler(0.5)
    np.testing.assert_allclose(ActionNoise().kl_scales(stochastic), stochastic.girsanov_scales())
    np.testing.assert_allclose(Brownian().kl_scales(stochastic), stochastic.chain_scales())
    still = sampler(0.0)
    np.testing.assert_allclose(ActionNoise(strength=3.0).kl_scales(still), ActionNoise(strength=3.0).scales(still))


def test_action_noise_adds_its_diffusion():
    """At zero score the exploring state is Gaussian, with variance rate `(c strength / g)^2 + eta^2 g^2`."""
    process = DiffusionProcess(VPLinear(beta_min=2.0, beta_max=2.0), 0.5)
    zero = Sampler(process, lambda params, t, x, cond: 0 * x, (2,), grid=process.grid(100), solver=dfx.Euler(), dtype=float)
    count = 2000
    trajectory = eqx.filter_jit(ActionNoise(strength=3.0).trajectory)(zero, None, sample_keys(jr.key(0), count))
    dt, expected = process.t1 / 100, 1 - np.exp(-2)
    for _ in range(100):  # dx = x dt + ... in Euler steps
        expected = (1 + dt) ** 2 * expected + (0.25 * 2 + (0.625 * 2 * 3 / np.sqrt(2)) ** 2) * dt
    assert abs(jnp.var(trajectory.x[-1]) / expected - 1) < 4 * np.sqrt(2 / (2 * count))


# --- errors


def test_bad_grids_are_named():
    process = DiffusionProcess(VPLinear())
    cases = [
        (np.linspace(0, 1, 11), "grid ends at t=1, but the data is at t1=0.999"),
        (np.linspace(0, 0.5, 11), "grid ends at t=0.5, but the data is at t1=0.999"),
        (np.linspace(0.1, 0.999, 11), "grid starts at t=0.1, but the process starts at t0=0"),
        (np.linspace(0.999, 0, 11), "grid must increase strictly"),
        ([0.0, 0.5, 0.5, 0.999], r"grid must increase strictly .*grid\[1\] = 0.5 and grid\[2\] = 0.5"),
        ([0.0, np.nan, 0.999], "non-finite time at index 1"),
        ([0.0], "at least two times"),
    ]
    for grid, message in cases:
        with pytest.raises(ValueError, match=message):
            Sampler(process, control, (2,), grid=grid)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        process.grid(0)


def test_brownian_exploration_needs_noise():
    for use in (Brownian().scales, Brownian().kl_scales, lambda still: Brownian().trajectory(still, 1.0, *batch())):
        with pytest.raises(ValueError, match=r"eta=0: Brownian exploration is undefined .*ActionNoise"):
            use(sampler(0.0))


def test_likelihoods_need_a_gaussian_transition():
    for solver in (dfx.Heun(), dfx.SRA1(), dfx.Tsit5()):
        with pytest.raises(TypeError, match=f"solver={type(solver).__name__} has no Gaussian transition .*ActionNoise"):
            sampler(0.5, solver).chain_scales()


def test_a_step_to_zero_noise_has_no_likelihood():
    paths = sampler(1.0, ExponentialEuler(), schedule=VPLinear(tau_min=0.0))
    with pytest.raises(ValueError, match=r"step from t=0\.875 to t=1 has no noise.*tau_min > 0"):
        paths.chain_scales()
    frozen = sampler(1.0, ExponentialEuler(), schedule=VPLinear(tau_min=0.0), frozen=EPSILON)
    assert jnp.all(jnp.isfinite(frozen.chain_scales()))  # a frozen epsilon keeps its noise to the end
    with pytest.raises(ValueError, match="tau_max=1"):
        RectifiedFlow(tau_max=1.0)


def test_bad_exploration_is_named():
    with pytest.raises(ValueError, match=r"strength=0\.0 must be positive"):
        ActionNoise(strength=0.0)
    with pytest.raises(ValueError, match="substeps=0 must be at least 1"):
        ActionNoise(substeps=0)
