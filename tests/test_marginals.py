"""Laws of the chains that solvers make: orders of convergence, and the exact marginals of the uncontrolled process."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from ctrl_diffusion.exact import GaussianQuadratic
from ctrl_diffusion.predictions import EPSILON, X0
from ctrl_diffusion.process import DiffusionProcess
from ctrl_diffusion.sampler import Sampler
from ctrl_diffusion.solvers import ExponentialEuler, sample_keys
from tests.affine_chains import SCHEDULES, affine, chains, table

SOLVERS = [dfx.Euler(), ExponentialEuler()]
by_solver = dict(ids=lambda solver: type(solver).__name__)

by_name = dict(ids=lambda value: type(value).__name__ if hasattr(value, "horizon") else str(value))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# --- 6: halving the step


@pytest.mark.parametrize("frozen", [X0, EPSILON], ids=lambda p: p.name)
@pytest.mark.parametrize("solver", SOLVERS, **by_solver)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_weak_order_one(solver, frozen, eta):
    """Mean, variance and path KL of the optimal chain, and moments of the reference chain, converge at first order."""
    problem = table(eta, frozen=frozen)
    exact = [*problem.optimal_terminal, problem.path_kl, *problem.reference_terminal]
    cases = [(action, steps) for steps in (200, 400) for action in (problem.optimal_action, problem.reference_action)]
    done = chains(problem, solver, cases)
    errors = [np.asarray([*best[:3], *reference[:2]]) - np.asarray(exact) for best, reference in (done[:2], done[2:])]
    size = np.max(np.abs(errors[0]))
    np.testing.assert_allclose(size / np.max(np.abs(errors[1])), 2, rtol=0.1)
    np.testing.assert_allclose(2 * errors[1], errors[0], rtol=0, atol=0.1 * size)  # each of them, those with a small error too


@pytest.mark.parametrize(
    "solver, order", [(dfx.Euler(), 1), (ExponentialEuler(), 1), (dfx.Heun(), 2)], ids=["euler", "exponential", "heun"]
)
def test_order_on_the_probability_flow(solver, order):
    """The flow of Gaussian data is `x -> m_1 + sqrt(v_1 / v_0) (x - m_0)`."""
    problem = table()
    process = DiffusionProcess(problem.process.schedule, 0.0)
    (m0, v0), (m1, v1) = (problem.marginal(jnp.asarray(t)) for t in (process.t0, process.t1))
    errors = []
    for steps in (100, 200):
        sampler = Sampler(process, problem.reference_action, (2,), grid=process.grid(steps), solver=solver, dtype=jnp.float64)
        keys = sample_keys(jr.key(0), 3)
        errors.append(eqx.filter_jit(sampler.sample)(None, keys) - (m1 + jnp.sqrt(v1 / v0) * (sampler.start(keys)[0] - m0)))
    np.testing.assert_allclose(errors[0] / errors[1], 2**order, rtol=0.1)


# --- 7: marginals of the uncontrolled process


@pytest.mark.parametrize("schedule", SCHEDULES, **by_name)
def test_marginals_are_the_noised_data_at_every_eta(schedule):
    """The noised mean and variance solve the moment equations of the process under the true score, at all times and eta."""
    processes = [DiffusionProcess(schedule, eta) for eta in (0.0, 0.25, 0.5, 1.0, 1.5)]
    data = GaussianQuadratic(DiffusionProcess(schedule), 1.0, 0.5, 1.0, 0.0, 1.0)

    @jax.jit
    @jax.vmap
    def rates(t):
        (mean, variance), slopes = jax.jvp(data.marginal, (t,), (jnp.ones_like(t),))
        offset, gain = affine(data.reference_action, t)
        equations = []
        for process in processes:
            a, b, g = process.coefficients(t)
            equations.append((a * mean + b * (offset + gain * mean), 2 * (a + b * gain) * variance + g**2))
        return jnp.stack(slopes), jnp.asarray(equations), jnp.abs(a) * variance  # the size of the terms that cancel

    ts = np.linspace(processes[0].t0, processes[0].t1, 9)[1:-1] + 1e-4
    slopes, equations, size = map(np.asarray, rates(jnp.asarray(ts)))
    assert np.all(np.abs(equations - slopes[:, None]) < 1e-9 * (1 + np.max(np.abs(slopes), axis=1) + size)[:, None, None])


@pytest.mark.parametrize("schedule", SCHEDULES, **by_name)
def test_chains_on_point_data_are_exact_for_any_steps(schedule):
    """With x0 frozen the exponential chain has the noised marginals `N(alpha m, sigma^2)` at each of five grid times."""
    processes = [DiffusionProcess(schedule, eta) for eta in (0.0, 0.5, 1.0)]
    ts = processes[0].grid(5)

    def marginal(t):
        tau = schedule.horizon - t
        return jnp.stack([1.3 * schedule.alpha(tau), schedule.sigma_squared(tau)])

    @jax.jit
    def step(state, t0, t1):
        centre, spread = marginal(t0)
        states = []
        for process, mean, variance in zip(processes, *state):
            phi, psi, std = process.transition(ExponentialEuler(), t0, t1)
            mean = phi * mean - psi * (mean - centre) / spread  # the action is the score, -(x - alpha m) / sigma^2
            states.append(jnp.stack([mean, (phi - psi / spread) ** 2 * variance + std**2]))
        return jnp.stack(states, axis=1), marginal(t1)

    state = jnp.repeat(marginal(jnp.asarray(ts[0]))[:, None], 3, axis=1)
    for t0, t1 in zip(ts[:-1], ts[1:]):
        state, expected = step(state, jnp.asarray(t0), jnp.asarray(t1))
        np.testing.assert_allclose(state, np.repeat(np.asarray(expected)[:, None], 3, axis=1), rtol=1e-7)
