"""Identities of the optimality gap, of likelihood ratios and of gradients, which hold for any action."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from ctrl_diffusion.exact import GaussianQuadratic, LinearReward, MixtureControl, QuadraticReward, ring
from ctrl_diffusion.exploration import ActionNoise, shift
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.sampler import Sampler, log_ratio, path_actions, step_kl
from ctrl_diffusion.schedules import RectifiedFlow, VPLinear
from ctrl_diffusion.solvers import ExponentialEuler, sample_keys
from tests.affine_chains import SCHEDULES, WEIGHT, chains, constant_rate, moments, path_log_ratio, table, tilted, within

by_name = dict(ids=lambda value: type(value).__name__ if hasattr(value, "horizon") else str(value))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# --- 1: the optimality gap


@pytest.mark.parametrize(
    "schedule, eta", [(constant_rate(0.0), 0.25), (constant_rate(0.0), 1.0), (RectifiedFlow(), 0.5)], **by_name
)
def test_gap_is_the_kl_from_the_optimum(schedule, eta):
    """`J* - J(a) = lambda E^a int k |a - a*|^2 dt`, with `J(a) = E r - lambda KL` on the left."""
    problem = table(eta, schedule)
    for control in (problem.reference_action, tilted(problem), problem.optimal_action):
        mean, variance, kl, kl_from_optimum = moments(problem, control)
        value = -0.5 * ((mean + 0.5) ** 2 + variance) - WEIGHT * kl
        np.testing.assert_allclose(problem.optimal_value - value, WEIGHT * kl_from_optimum, rtol=1e-6, atol=1e-8)
    assert kl_from_optimum == 0


@pytest.mark.slow
@pytest.mark.parametrize("solver", [dfx.Euler(), ExponentialEuler()], ids=lambda solver: type(solver).__name__)
def test_gap_in_the_accounting_of_the_chain_is_never_negative(solver):
    """With the chain's own KL and the chain's own optimum, `E lambda log E^ref[exp(r/lambda) | X_0]`, at any number of steps.

    By rates and against the continuous J*, the same actions read as better than optimal (see test_gap.py).
    """
    problem = table()
    controls = problem.reference_action, tilted(problem), problem.optimal_action
    cases = [(control, steps) for steps in (4, 16, 64) for control in controls]
    done = chains(problem, solver, cases)
    from_zero, from_one = (chains(problem, solver, cases, (jnp.asarray(x), jnp.asarray(0.0))) for x in (0.0, 1.0))
    mean, variance = map(float, problem.start)
    relative = []
    for i in range(0, len(cases), len(controls)):
        # the reference chain's final state given X_0: slope, intercept and variance
        intercept, spread = from_zero[i].mean, from_zero[i].variance
        slope, shrink = from_one[i].mean - intercept, 1 + spread / WEIGHT
        distance = (intercept + slope * mean + 0.5) ** 2 + slope**2 * variance
        optimal_value = -distance / (2 * shrink) - WEIGHT / 2 * np.log(shrink)
        gaps = [optimal_value + 0.5 * ((c.mean + 0.5) ** 2 + c.variance) + WEIGHT * c.kl for c in done[i : i + len(controls)]]
        assert min(gaps) > 0
        relative.append(gaps[2] / gaps[0])
    assert relative[2] < 0.3 * relative[1] < 0.1 * relative[0]  # the continuous a* becomes the optimum of the chain


# --- 2 and 3: likelihood ratios of paths


def paths(problem, solver, control, other, count, steps=25, seed=0):
    """Paths of `control` in two dimensions: first and last states, `log dP^control/dP^other`, and its KL given the states."""
    sampler = Sampler(problem.process, control, (2,), grid=problem.process.grid(steps), solver=solver, dtype=jnp.float64)

    @jax.jit
    def run(keys):
        trajectory = sampler.trajectory(None, keys)
        actions, others = (path_actions(f, None, trajectory) for f in (control, other))
        scales = sampler.girsanov_scales() if isinstance(solver, dfx.Heun) else sampler.chain_scales()
        log_weight = -path_log_ratio(scales, others, actions, trajectory.noise)
        return trajectory.x[0], trajectory.x[-1], log_weight, jnp.sum(step_kl(scales, actions, others), axis=0)

    return jax.tree.map(np.asarray, run(sample_keys(jr.key(seed), count)))


def reward(x):
    return -0.5 * np.sum((x + 0.5) ** 2, axis=1)


SOLVERS = [dfx.Euler(), ExponentialEuler()]
by_solver = dict(ids=lambda solver: type(solver).__name__)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS, **by_solver)
def test_log_likelihood_ratios_have_the_path_kl_as_mean_and_normalise(solver):
    """`E^a log dP^a/dP^ref = KL`, `E^ref dP^a/dP^ref = 1`, `E^a[exp(r/lambda) dP^ref/dP^a] = E^ref exp(r/lambda)`: exact for chains."""
    problem, count = table(), 4000
    control, reference = tilted(problem), problem.reference_action
    exact, exact_reference = chains(problem, solver, [(control, 25), (reference, 25)])
    shrink = 1 + exact_reference.variance / WEIGHT
    normaliser = np.exp(-((exact_reference.mean + 0.5) ** 2) / (2 * WEIGHT * shrink)) / np.sqrt(shrink)  # of one dimension

    _, x, log_weight, kl = paths(problem, solver, control, reference, count)
    assert within(kl, 2 * exact.kl)  # two dimensions
    assert within(log_weight, 2 * exact.kl)
    assert within(log_weight - kl, 0.0)
    assert within(np.exp(reward(x) / WEIGHT - log_weight), normaliser**2)

    _, x, log_weight, _ = paths(problem, solver, reference, control, count, seed=1)
    assert within(np.exp(reward(x) / WEIGHT), normaliser**2)
    assert within(np.exp(-log_weight), 1.0)
    assert np.std(np.exp(-log_weight)) > 0.3  # the policies are different


def test_girsanov_ratios_of_recorded_increments_normalise_for_a_multi_stage_solver():
    """`x_j` knows only earlier increments, so `E exp(z . xi - |z|^2/2) = 1` for Heun steps as well, at any step count."""
    problem = table()
    _, _, log_weight, kl = paths(problem, dfx.Heun(), problem.reference_action, tilted(problem), 4000, steps=20)
    assert within(np.exp(-log_weight), 1.0) and np.std(np.exp(-log_weight)) > 0.3
    assert within(log_weight - kl, 0.0)


def test_importance_weights_have_no_variance_at_the_optimum():
    """`exp(r / lambda) dP^ref/dP^a* = exp(V*(t0, X_0) / lambda)` path by path: what remains is discretisation, of order dt."""
    problem, variances = table(), []
    start_value = jax.jit(lambda x: problem.value(jnp.asarray(problem.process.t0), x))
    for steps in (100, 400):
        x0, x1, log_weight, _ = paths(problem, dfx.Euler(), problem.optimal_action, problem.reference_action, 1000, steps)
        variances.append(np.var((reward(x1) - start_value(x0)) / WEIGHT - log_weight))
    assert variances[1] < 0.002 * np.var(reward(x1) / WEIGHT)
    # a variance from 1000 samples with the kurtosis of a squared normal, 15, has a relative error of sqrt(14 / 1000) = 0.12
    assert 4 / 1.6 < variances[0] / variances[1] < 4 * 1.6


# --- 4: the likelihood ratio of an unchanged policy is one


@pytest.mark.parametrize("solver, dtype", [(SOLVERS[0], jnp.float32), (SOLVERS[1], jnp.float64), (dfx.Heun(), jnp.float64)])
def test_ratio_of_an_unchanged_policy_is_one_for_every_batch_split(solver, dtype):
    """Chains and, for Heun, recorded increments with Girsanov's scales."""
    problem = table()
    control = tilted(problem)
    sampler = Sampler(problem.process, control, (2,), grid=problem.process.grid(25), solver=solver, dtype=dtype)
    trajectory = eqx.filter_jit(sampler.trajectory)(None, sample_keys(jr.key(0), 12))
    scales = sampler.girsanov_scales() if isinstance(solver, dfx.Heun) else sampler.chain_scales()
    whole = jax.jit(lambda trajectory: path_actions(control, None, trajectory))(trajectory)

    @jax.jit
    def ratio_and_rounding(part, old):
        new = path_actions(control, None, part)
        # actions agree to a few roundings, and enter multiplied by scale and noise
        exposure = jnp.sum(scales[:, None, None] * jnp.max(jnp.abs(old)) * jnp.abs(part.noise), axis=(0, 2))
        return jnp.exp(path_log_ratio(scales, new, old, part.noise)), 8 * jnp.finfo(dtype).eps * exposure

    for size in (1, 3):
        for i in range(0, 12, size):
            part = trajectory._replace(x=trajectory.x[:, i : i + size], noise=trajectory.noise[:, i : i + size])
            ratio, rounding = map(np.asarray, ratio_and_rounding(part, whole[:, i : i + size]))
            assert ratio.dtype == dtype
            assert np.all(np.abs(ratio - 1) <= rounding)


@pytest.mark.slow
@pytest.mark.parametrize("solver, eta, substeps", [(dfx.Heun(), 0.5, 2), (dfx.Tsit5(), 0.0, 1)], ids=["heun", "tsit5"])
def test_action_noise_has_a_likelihood_for_any_solver(solver, eta, substeps):
    """One for an unchanged policy; for a policy shifted by a constant, reweighted old paths have the new policy's law exactly."""
    process, count = DiffusionProcess(constant_rate(0.05), eta), 2000
    reference = GaussianQuadratic(DiffusionProcess(constant_rate(0.05)), 1.0, 0.5, 1.0, -0.5, WEIGHT).reference_action
    change = jnp.asarray([0.25, -0.15])

    def control(params, t, x, cond):
        return reference(None, t, x) - 0.2 * jnp.tanh(x) + params * change

    sampler = Sampler(process, control, (2,), grid=process.grid(6), solver=solver, dtype=jnp.float64)
    exploration = ActionNoise(strength=2.0, substeps=substeps)
    run = eqx.filter_jit(exploration.trajectory)
    keys = sample_keys(jr.key(0), count)
    old, new = run(sampler, jnp.asarray(0.0), keys), run(sampler, jnp.asarray(1.0), sample_keys(jr.key(1), count))
    half = run(sampler, jnp.asarray(0.0), keys[: count // 2])
    np.testing.assert_allclose(half.x, old.x[:, : count // 2], rtol=1e-9, atol=1e-10)

    scales = exploration.scales(sampler)

    @jax.jit
    def ratios(old, half):
        before, after, again = (path_actions(control, p, path) for p, path in ((0.0, old), (1.0, old), (0.0, half)))
        unchanged = path_log_ratio(scales, again, before[:, : count // 2], half.noise)
        return jnp.exp(unchanged), jnp.exp(path_log_ratio(scales, after, before, old.noise))

    unchanged, ratio = map(np.asarray, ratios(old, half))
    np.testing.assert_allclose(unchanged, 1, rtol=0, atol=1e-7)  # paths of the two batches agree to 1e-9
    assert within(ratio, 1.0) and np.std(ratio) > 0.3
    x_old, x_new = np.asarray(old.x[-1]), np.asarray(new.x[-1])
    for statistic in (lambda x: x[:, 0], lambda x: x[:, 1], lambda x: np.sum(x**2, axis=1)):
        reweighted, fresh = ratio * statistic(x_old), statistic(x_new)
        error = np.sqrt((np.var(reweighted) + np.var(fresh)) / count)
        assert abs(np.mean(reweighted) - np.mean(fresh)) < 4 * error
    moved = np.mean(x_new, axis=0) - np.mean(x_old, axis=0)
    assert np.all(np.abs(moved) > 4 * np.std(x_old, axis=0) * np.sqrt(2 / count))


# --- 5: at the optimum the gradient of every objective vanishes


def check_stationary(problems, t, x):
    """`h` has its maximum over the action at `a*` for credit 1, at `a_ref + w (a* - a_ref)` for credit `w`."""

    def slopes(problem):
        process = problem.process
        gradient = jax.grad(lambda x: jnp.sum(problem.value(t, x)))(x)
        reference, optimum = problem.reference_action(None, t, x), problem.optimal_action(None, t, x)

        def h(a, credit):
            gain = credit * process.coefficients(t)[1] * jnp.sum(gradient * (a - reference), axis=1)
            return jnp.sum(gain - WEIGHT * process.kl_rate(t, a, reference))

        half = reference + 0.5 * (optimum - reference)
        return jax.grad(h)(optimum, 1.0), jax.grad(h)(half, 0.5), jax.grad(h)(reference, 1.0)

    for result in jax.jit(lambda: [slopes(problem) for problem in problems])():
        at_optimum, at_half, at_reference = map(np.asarray, result)
        scale = np.max(np.abs(at_reference), axis=1, keepdims=True)
        assert np.all(scale > 0)
        assert np.all(np.abs(at_optimum) < 1e-7 * scale) and np.all(np.abs(at_half) < 1e-7 * scale)


@pytest.mark.parametrize("schedule", SCHEDULES, **by_name)
def test_advantage_rate_is_stationary_at_the_optimum(schedule):
    """`h(t, x, a) = w c <grad V*, a - a_ref> - lambda k |a - a_ref|^2`, at random times and states, off any path."""
    rng = np.random.default_rng(0)
    t0, t1 = table(1.0, schedule).process.t0, table(1.0, schedule).process.t1
    t, x = jnp.asarray(t0 + (t1 - t0) * np.linspace(0.05, 0.95, 6)), jnp.asarray(2 * rng.standard_normal((6, 2)))
    check_stationary([table(eta, schedule) for eta in (0.25, 0.5, 1.0)], t, x)


def test_advantage_rate_is_stationary_at_the_optimum_of_the_ring():
    t, x = jnp.linspace(0.05, 0.95, 6), jnp.asarray(2 * np.random.default_rng(0).standard_normal((6, 2)))
    rewards = LinearReward((1.0, 0.0)), QuadraticReward(2.0, (2.0, 0.0))
    check_stationary([MixtureControl(DiffusionProcess(VPLinear()), ring(), reward, WEIGHT) for reward in rewards], t, x)


@pytest.mark.parametrize("solver", SOLVERS, **by_solver)
def test_likelihood_ratio_gradient_vanishes_at_the_optimum(solver):
    """`grad E sum_j [ratio_j (V*_{j+1} - V*_j) - lambda kl_j]` along a shift of `a*`: known in the chain, and of order dt.

    The library's `log_ratio` and `step_kl`, differentiated on sampled paths, have that expectation.
    """
    problem, count = table(), 2000
    best, reference = problem.optimal_action, problem.reference_action
    at_reference, at_50, at_200, at_400 = (
        chain.gradient for chain in chains(problem, solver, [(reference, 50), (best, 50), (best, 200), (best, 400)])
    )
    assert abs(at_400) < 0.01 * abs(at_reference)
    np.testing.assert_allclose(at_200 / at_400, 2, rtol=0.1)

    sampler = Sampler(problem.process, best, (2,), grid=problem.process.grid(50), solver=solver, dtype=jnp.float64)
    scales = sampler.chain_scales()

    @jax.jit
    def gradients(keys):
        trajectory = sampler.trajectory(None, keys)
        actions, references = (path_actions(f, None, trajectory) for f in (best, reference))
        values = jax.lax.map(lambda tx: problem.value(*tx), (trajectory.t, trajectory.x))

        def objective(theta):
            new = actions + theta[:, None]  # one shift per sample, for standard errors
            ratio = jnp.exp(jax.vmap(log_ratio)(jax.vmap(shift)(scales, new, actions), trajectory.noise))
            return jnp.sum(ratio * jnp.diff(values, axis=0) - WEIGHT * step_kl(scales, new, references))

        return jax.grad(objective)(jnp.zeros(count))

    sampled = gradients(sample_keys(jr.key(0), count))
    assert within(sampled, 2 * at_50)  # both dimensions are shifted
    assert not within(sampled, 2 * at_reference)
