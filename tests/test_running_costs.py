"""Running costs, off-policy paths, windows and settings that no published algorithm has: losses written out, to 1e-6 in float64.

The chain is Euler-Maruyama's of a drift process, `x' = x + a dt + G sqrt(dt) xi`, on a grid of unequal steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion.estimators import (
    LikelihoodRatio,
    PathConsistency,
    Pathwise,
    WeightedLikelihood,
    discount_per_time,
    exponential_return,
)
from ctrl_diffusion.values import NoValue

GRID, BATCH, DIM, NOISE, KL_WEIGHT = np.asarray([0.0, 0.1, 0.4, 0.6, 1.0]), 8, 2, 0.7, 0.4
STEPS, DT = len(GRID) - 1, np.diff(GRID)
KEY = jax.random.key(3)
PATHS, *_, TIMES = jax.random.split(KEY, 5)  # as an iteration splits it


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def cost(t, x):
    """It depends on both."""
    return (1 + jnp.asarray(t)) * jnp.sum(jnp.cos(x), axis=1)


def drift(params, t, x, cond=None):
    return jnp.tanh(x @ params["w"] + params["b"] * jnp.broadcast_to(t, x.shape[:1])[:, None]) - x


def reward(x):
    return jnp.sin(x[:, 0]) - 0.3 * jnp.sum(x**2, axis=1)


def weights(seed):
    keys = jax.random.split(jax.random.key(seed))
    return {"w": 0.5 * jax.random.normal(keys[0], (DIM, DIM)), "b": 0.5 * jax.random.normal(keys[1], (DIM,))}


def mean(params, j, x):
    return x + DT[j] * drift(params, GRID[j], x)


def log_prob(params, j, x, x_next):
    return -jnp.sum((x_next - mean(params, j, x)) ** 2, axis=1) / (2 * NOISE**2 * DT[j])


def kl(params, other, j, x):
    return jnp.sum((mean(params, j, x) - mean(other, j, x)) ** 2, axis=1) / (2 * NOISE**2 * DT[j])


def costs(x):
    """Of every interval of recorded paths, `[n, b]`."""
    return jnp.stack([DT[j] * cost(GRID[j], x[j]) for j in range(STEPS)])


def log_ratios(params, reference, x):
    """`log dP/dP^ref` of every interval of recorded paths, `[n, b]`."""
    return jnp.stack([log_prob(params, j, x[j], x[j + 1]) - log_prob(reference, j, x[j], x[j + 1]) for j in range(STEPS)])


def objective(kl_weight=KL_WEIGHT):
    process = cd.DriftProcess(NOISE, 1.0, 0.2, 0.5, cost)
    sampler = cd.Sampler(process, drift, (DIM,), grid=GRID, dtype=jnp.float64)
    return cd.Objective(sampler, cd.differentiable(reward), kl_weight)


SGD = cd.Training(optax.sgd(1.0), BATCH)


def iterated(algorithm, value_params=()):
    """The state after an iteration whose policy has left the reference, what it showed, and the paths it was made on."""
    state, info = algorithm.step(KEY, algorithm.init(weights(0), value_params)._replace(reference=weights(1)))
    path = objective().sampler.trajectory(weights(0), cd.sample_keys(PATHS, BATCH))
    return state, info, path.x, path.noise


def check(params, loss):
    """`weights(0) - params` is the gradient of `loss` there."""
    expected = jax.jit(jax.grad(loss))(weights(0))
    for name, gradient in expected.items():
        scale = float(jnp.max(jnp.abs(gradient)))
        assert scale > 1e-3  # the check is not vacuous
        np.testing.assert_allclose(weights(0)[name] - params[name], gradient, rtol=1e-6, atol=1e-6 * scale)


def no_critic():
    return cd.Critic(NoValue(0.0, 1.0))


@pytest.mark.slow
def test_pathwise_through_all_steps_is_the_gradient_of_the_objective():
    state, _, x, noise = iterated(cd.draft(objective(), SGD))

    def loss(params):
        at, total = x[0], 0.0
        for j in range(STEPS):
            total += DT[j] * cost(GRID[j], at) + KL_WEIGHT * kl(params, weights(1), j, at)
            at = mean(params, j, at) + NOISE * np.sqrt(DT[j]) * noise[j]
        return jnp.mean(total - reward(at))

    check(state.params, loss)


def test_a_discount_per_time_weighs_what_is_left_after_a_step():
    """One step into a reward at the end: windows from the last interval, of weight one, and from the first, `e^{-0.9 / 0.5}`."""
    value = cd.Critic(cd.PlainValue(lambda params, t, x, cond=None: reward(x), 0.0, 1.0), frozen=True)
    state, _, x, noise = iterated(cd.compose(objective(0.0), Pathwise(1, credit=discount_per_time(0.5)), value, SGD))

    def loss(params):
        ends = [mean(params, j, x[j]) + NOISE * np.sqrt(DT[j]) * noise[j] for j in range(STEPS)]
        return -sum(np.exp(-(1 - GRID[j + 1]) / 0.5) * jnp.mean(reward(end)) for j, end in enumerate(ends))

    check(state.params, loss)


@pytest.mark.slow
@pytest.mark.parametrize("horizon", [np.inf, 0.3])
def test_the_lean_adjoint_pays_for_where_it_passes(horizon):
    """By Jacobians written out; with a finite horizon mixed with what the policy takes for its mean, by the length of each step."""
    state, info, x, _ = iterated(cd.adjoint_matching(objective(), SGD, horizon=horizon))
    adjoint, targets = jax.vmap(jax.grad(lambda x: reward(x[None])[0]))(x[-1]), []
    for j in reversed(range(STEPS)):
        targets.insert(0, adjoint)
        apart = drift(weights(0), GRID[j], x[j]) - drift(weights(1), GRID[j], x[j])
        keep = np.exp(-DT[j] / horizon)
        mixed = (1 - keep) * KL_WEIGHT / NOISE**2 * apart + keep * adjoint
        jacobian = jax.vmap(jax.jacobian(lambda x, j=j: mean(weights(1), j, x[None])[0]))(x[j])
        paid = jax.vmap(jax.grad(lambda x, j=j: DT[j] * cost(GRID[j], x[None])[0]))(x[j])
        adjoint = jnp.einsum("bij,bi->bj", jacobian, mixed) - paid

    def loss(params):
        total = 0.0
        for j in range(STEPS):
            target = drift(weights(1), GRID[j], x[j]) + NOISE**2 / KL_WEIGHT * targets[j]
            total += DT[j] / (2 * NOISE**2) * jnp.mean(jnp.sum((drift(params, GRID[j], x[j]) - target) ** 2, axis=1))
        return KL_WEIGHT * total

    np.testing.assert_allclose(info.metrics["policy_loss"], loss(weights(0)), rtol=1e-6)
    check(state.params, loss)


def test_returns_pay_what_is_still_to_come():
    """DPOK's gradient with the running cost in its returns."""
    state, _, x, _ = iterated(cd.dpok(objective(), SGD))
    paid = costs(x) + KL_WEIGHT * jnp.stack([kl(weights(0), weights(1), j, x[j]) for j in range(STEPS)])
    to_go = jnp.stack([reward(x[-1]) - jnp.sum(paid[j:], axis=0) for j in range(STEPS)])
    advantage = to_go - jnp.mean(to_go, axis=1, keepdims=True)

    def loss(params):
        total = 0.0
        for j in range(STEPS):
            total += jnp.mean(KL_WEIGHT * kl(params, weights(1), j, x[j]) - log_prob(params, j, x[j], x[j + 1]) * advantage[j])
        return total

    check(state.params, loss)


def test_weights_of_the_optimal_law_whoever_sampled():
    """`exp((r - costs) / lambda) dP^ref/dP^old` over its mean, for paths of a policy that has left the reference."""
    algorithm = cd.compose(objective(), WeightedLikelihood(exponential_return), no_critic(), SGD)
    state, _, x, _ = iterated(algorithm)
    log_weight = (reward(x[-1]) - jnp.sum(costs(x), axis=0)) / KL_WEIGHT
    weight = jnp.exp(log_weight - jnp.sum(log_ratios(weights(0), weights(1), x), axis=0))

    def loss(params):
        total = sum(log_prob(params, j, x[j], x[j + 1]) for j in range(STEPS))
        return -KL_WEIGHT * jnp.mean(weight / jnp.mean(weight) * total)

    check(state.params, loss)


def test_a_window_of_path_consistency_pays_its_own_costs():
    """Windows of two intervals, those at the end shorter; `V(t1, x) = r(x)`."""

    def value(params, t, x, cond=None):
        return params * jnp.cos(x[:, 0]) * jnp.broadcast_to(t, x.shape[:1])

    critic = cd.Critic(cd.PlainValue(value, 0.0, 1.0), frozen=True)
    algorithm = cd.compose(objective(), PathConsistency(2), critic, SGD)
    state, info, x, _ = iterated(algorithm, jnp.asarray(0.5))
    values = [value(0.5, jnp.asarray(GRID[j]), x[j]) for j in range(STEPS)] + [reward(x[-1])]

    def loss(params):
        ratio, paid, squares = log_ratios(params, weights(1), x), costs(x), []
        for j in range(STEPS):
            end = min(j + 2, STEPS)
            left = values[end] - values[j] - jnp.sum(paid[j:end] + KL_WEIGHT * ratio[j:end], axis=0)
            squares.append(jnp.mean(left**2))
        return jnp.mean(jnp.stack(squares)) / (2 * KL_WEIGHT)

    np.testing.assert_allclose(info.metrics["policy_loss"], loss(weights(0)), rtol=1e-6)
    check(state.params, loss)


def test_a_ratio_with_a_mask_and_a_proximal_penalty():
    """The second of two steps, whose policy has moved: rows of which some have moved too far, each with its weight in time."""
    rate, proximal, far = 0.5, 0.3, 0.01
    times = cd.algorithms.TimeSampling(3, lambda t: 0.2 + t)
    estimator = LikelihoodRatio(float("inf"), proximal=proximal, max_step_kl=far)
    problem, training = objective(), cd.Training(optax.sgd(rate), BATCH, epochs=2, times=times)
    state, info, x, _ = iterated(cd.compose(problem, estimator, no_critic(), training))
    density = (0.2 + GRID[:-1]) / np.sum(0.2 + GRID[:-1])
    chosen = np.asarray(jax.random.choice(TIMES, STEPS, (3, BATCH), p=jnp.asarray(density)))
    counts = np.stack([np.sum(chosen == j, axis=0) / (STEPS * density[j]) for j in range(STEPS)]) * STEPS / 3
    paid = costs(x) + KL_WEIGHT * jnp.stack([kl(weights(0), weights(1), j, x[j]) for j in range(STEPS)])
    masked = []

    def loss(params):
        total = 0.0
        for j in range(STEPS):
            moved = kl(params, weights(0), j, x[j])
            masked.append(moved > far)
            advantage = reward(x[-1]) - jnp.sum(paid[j:], axis=0)
            ratio = jnp.exp(log_prob(params, j, x[j], x[j + 1]) - log_prob(weights(0), j, x[j], x[j + 1]))
            gain = jnp.where(moved > far, 0, ratio * advantage) - proximal * moved
            total += jnp.mean(counts[j] * (KL_WEIGHT * kl(params, weights(1), j, x[j]) - gain))
        return total

    first = jax.tree.map(lambda p, g: p - rate * g, weights(0), jax.grad(loss)(weights(0)))
    second = jax.tree.map(lambda p, g: p - rate * g, first, jax.grad(loss)(first))
    masked.clear()
    np.testing.assert_allclose(info.metrics["policy_loss"], loss(first), rtol=1e-6)
    assert 0.1 < np.mean(np.stack(masked)) < 0.9
    for name in second:
        np.testing.assert_allclose(state.params[name], second[name], rtol=1e-6, atol=1e-9)


def test_a_trust_region_that_gives_way_halves_its_kl():
    """A proximal price that makes long steps worse: the KL is that of the radius (a hair inside), halved so many times."""
    radius = 0.05
    region = cd.trust.NaturalGradient(radius, damping=0.0)
    estimator = LikelihoodRatio(float("inf"), proximal=30.0)

    def linear(params, t, x, cond=None):  # the KL is quadratic in the parameters
        return params["b"] * jnp.sin(x)

    sampler = cd.Sampler(cd.DriftProcess(NOISE, 1.0, 0.2, 0.5), linear, (DIM,), grid=GRID, dtype=jnp.float64)
    problem = cd.Objective(sampler, cd.differentiable(reward), 0.0)
    algorithm = cd.compose(problem, estimator, no_critic(), cd.Training(region, 64))
    _, info = algorithm.step(KEY, algorithm.init({"b": jnp.zeros(DIM)}))
    halvings = float(info.metrics["backtracks"])
    assert 2 <= halvings <= 8
    np.testing.assert_allclose(info.metrics["update_kl"], 0.99**2 * radius * 0.5**halvings, rtol=1e-5)
