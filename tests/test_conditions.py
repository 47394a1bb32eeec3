"""Conditions (prompts, classes): each is judged for itself, and under one condition every algorithm is what it is without."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion.algorithms import lower
from ctrl_diffusion.groups import mean_within, same_condition, softmax_within, variance_within
from ctrl_diffusion.rewards import compute_reward_terms, compute_rewards
from experiments.algorithm_registry import ALGORITHMS, AlgorithmSettings, value_for

STEPS, BATCH, DIM, KINDS = 5, 12, 3, 2
PROCESS = cd.DiffusionProcess(cd.VPLinear(tau_min=0.05))
TABLE = np.random.default_rng(0).standard_normal((KINDS, DIM))


class Control(eqx.Module):
    """A score with a fixed table, of which the condition takes a row."""

    table: jax.Array

    def __call__(self, params, t, x, cond):
        t = jnp.broadcast_to(t, x.shape[:1])
        h = jnp.tanh(x @ params["w1"] + t[:, None] * params["b1"])
        return -(h @ params["w2"] + 0.3 * x) + self.table[cond]


class Liking(eqx.Module):
    """A reward that wants another direction for each condition."""

    table: jax.Array
    offset: float = eqx.field(static=True, default=0.0)

    def __call__(self, x, cond):
        return jnp.sum(jnp.sin(x) * self.table[cond], axis=1) + self.offset * cond


def value(params, t, x, cond):
    kind = jnp.zeros(x.shape[0], int) if cond is None else cond
    return jnp.sum(jnp.sin(x), axis=1) * params["a"] + params["b"][kind] * t


def weights(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"w1": (DIM, 5), "b1": (5,), "w2": (5, DIM)}
    return {name: 0.5 * jax.random.normal(k, shape, jnp.float64) for k, (name, shape) in zip(keys, shapes.items())}


def always(kind):
    return lambda key, n: jnp.full(n, kind)


def mixed(key, n):
    return jnp.arange(n) % KINDS


def objective(conditions=None, kind=None, offset=0.0, kl_weight=0.4, black_box=False):
    """With conditions, or the same for one condition that control and reward have inside."""
    control, liking = Control(jnp.asarray(TABLE)), Liking(jnp.asarray(TABLE[::-1].copy()), offset)
    if kind is None:
        make = cd.black_box if black_box else cd.differentiable
        reward = make(liking if not black_box else lambda x, c: np.asarray(liking(x, c)), "liking", conditional=True)
        chosen = control
    else:
        reward = cd.differentiable(lambda x: liking(x, jnp.full(len(x), kind)), "liking")

        def chosen(params, t, x, cond):
            assert cond is None
            return control(params, t, x, jnp.full(len(x), kind))

    sampler = cd.Sampler(PROCESS, chosen, (DIM,), grid=PROCESS.grid(STEPS), dtype=jnp.float64)
    return cd.Objective(sampler, reward, kl_weight, conditions=conditions)


def iterated(name, problem, count=2, **training):
    training = cd.Training(optax.sgd(1e-3), BATCH, 1, 2 if name != "log_variance" else 1, optax.sgd(1e-2), **training)
    algorithm = ALGORITHMS[name].make(AlgorithmSettings(problem, value_for(problem.reward, value, PROCESS), training))
    phi = {"a": jnp.ones(()), "b": jnp.ones(KINDS)} if ALGORITHMS[name].learns_value else ()
    state = algorithm.init(weights(0), phi)._replace(reference=weights(1))
    for i in range(count):
        state, info = algorithm.step(jax.random.key(i), state)
    return state, info, algorithm


def close(a, b, scale=1e-12):
    return all(np.allclose(x, y, rtol=scale, atol=scale) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_condition_is_none(name):
    """Everything that an algorithm evaluates is given the condition of its row; without it the table could not be read."""
    without, info, _ = iterated(name, objective(kind=1), 1)
    found, seen, _ = iterated(name, objective(always(1)), 1)
    np.testing.assert_allclose(seen.samples, info.samples, rtol=1e-10)
    assert close(found.params, without.params, 1e-9)
    assert not close(found.params, weights(0), 1e-5)


def test_another_condition_is_another_problem():
    one, other = (iterated("dpok", objective(always(kind)), 1)[0] for kind in (0, 1))
    assert not close(one.params, other.params, 1e-5)


@pytest.mark.parametrize("name", ["ddpo", "dpok", "flow_grpo", "rwr", "log_variance"])
def test_conditions_are_judged_each_for_itself(name):
    """What all samples of a condition gain in common tells nothing about the policy."""
    plain, _, _ = iterated(name, objective(mixed), 1)
    offset, _, _ = iterated(name, objective(mixed, offset=30.0), 1)
    assert close(offset.params, plain.params, 1e-9)
    assert not close(plain.params, weights(0), 1e-5)


@pytest.mark.slow
def test_a_black_box_is_given_the_conditions_in_every_part_of_a_rollout():
    whole, info, _ = iterated("ddpo", objective(mixed))
    for black_box, rollouts in ((True, 1), (True, 3), (False, 3)):
        found, seen, _ = iterated("ddpo", objective(mixed, black_box=black_box), rollouts=rollouts)
        np.testing.assert_allclose(seen.rewards, info.rewards, rtol=1e-12)
        assert close(found.params, whole.params, 1e-10)


def test_accumulation_with_conditions():
    """Metrics too: means over the parts, and the largest log-ratio, which is that of one of them."""
    whole, info, _ = iterated("dpok", objective(mixed))
    found, seen, _ = iterated("dpok", objective(mixed), accumulation=5)
    assert close(found.params, whole.params, 1e-12)
    assert float(info.metrics["max_log_ratio"]) > 1e-6
    for name, value in info.metrics.items():
        np.testing.assert_allclose(seen.metrics[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_each_condition_reaches_its_own_optimum():
    """Standard normal data, reward `s_c sum x`, no network: the optimum adds the constant `alpha s_c / lambda` to the score.

    The lean adjoint is then the same for all paths of a condition, so that matching is least squares, which converges to rounding.
    """
    signs, kl_weight = np.asarray([1.0, -2.0]), 0.7
    grid = PROCESS.grid(STEPS)

    def control(params, t, x, cond):
        j = jnp.clip(jnp.searchsorted(jnp.asarray(grid), t, side="right") - 1, 0, STEPS - 1)
        return -x + params[cond, jnp.broadcast_to(j, x.shape[:1])][:, None]

    reward = cd.differentiable(lambda x, c: jnp.asarray(signs)[c] * jnp.sum(x, axis=1), conditional=True)
    sampler = cd.Sampler(PROCESS, control, (DIM,), grid=grid, dtype=jnp.float64)
    problem = cd.Objective(sampler, reward, kl_weight, conditions=mixed)
    algorithm = cd.adjoint_matching(problem, cd.Training(optax.adam(0.05), 8, epochs=400))
    state, _ = algorithm.step(jax.random.key(0), algorithm.init(jnp.zeros((KINDS, STEPS))))
    step = sampler.transitions()
    adjoint = np.ones(STEPS + 1)  # of sum x: the reference chain is linear
    for j in reversed(range(STEPS)):
        adjoint[j] = (step.phi[j] - step.psi[j]) * adjoint[j + 1]
    expected = signs[:, None] * np.asarray(step.std**2 / step.psi)[None] * adjoint[None, 1:] / kl_weight
    np.testing.assert_allclose(state.params, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_fixed_arrays_are_arguments_of_the_programs():
    """A network of gigabytes must not be written into a program as a constant."""
    problem = objective(mixed)
    big = jnp.asarray(np.random.default_rng(1).standard_normal((4096, DIM)))
    problem = eqx.tree_at(lambda o: (o.sampler.control.table, o.reward.fn.fn.table), problem, (big, 2 * big))
    for name in ("score_as_action", "draft", "adjoint_matching"):
        _, _, algorithm = iterated(name, problem, 1)
        assert sum(v.size for v in jax.tree.leaves(algorithm.fixed)) == 2 * big.size
        phi = {"a": jnp.ones(()), "b": jnp.ones(KINDS)} if ALGORITHMS[name].learns_value else ()
        for program in lower(algorithm, weights(0), phi).values():
            constants = re.findall(r"stablehlo\.constant dense<(?!_|\d|-|\[\d)[^>]*> : tensor<([\dx]+)x", program.as_text())
            assert not [shape for shape in constants if np.prod([int(n) for n in shape.split("x")]) > 1000], constants


def test_statistics_within_conditions():
    cond = jnp.asarray([0, 1, 0, 1, 1, 2])
    v = np.random.default_rng(0).standard_normal((2, 6))
    same = same_condition(cond, jnp.float64)
    np.testing.assert_array_equal(same_condition({"a": cond, "b": jnp.stack([cond, cond], 1)}, jnp.float64), same)
    other = jnp.asarray([0, 0, 0, 1, 1, 1])
    both = same * same_condition(other, jnp.float64)
    np.testing.assert_array_equal(same_condition({"a": cond, "b": other}, jnp.float64), both)
    groups = [[0, 2], [1, 3, 4]]
    mean, soft = mean_within(jnp.asarray(v), same), softmax_within(jnp.asarray(v), same)
    for rows in groups:
        np.testing.assert_allclose(mean[:, rows], np.broadcast_to(v[:, rows].mean(1, keepdims=True), (2, len(rows))))
        weights = np.exp(v[:, rows])
        np.testing.assert_allclose(soft[:, rows], weights / weights.mean(1, keepdims=True))
    np.testing.assert_allclose(mean[:, 5], v.mean(1))  # alone: the mean of all
    np.testing.assert_allclose(soft[:, 5], 1)
    squares = sum(((v[0, rows] - v[0, rows].mean()) ** 2).sum() for rows in groups)
    np.testing.assert_allclose(variance_within(jnp.asarray(v[0]), same), squares / 3)
    np.testing.assert_allclose(variance_within(jnp.asarray(v[0]), None), v[0].var(ddof=1))
    np.testing.assert_allclose(softmax_within(jnp.asarray(v), None), np.exp(v) / np.exp(v).mean(1, keepdims=True))


def test_rewards_of_a_view():
    """A decoder in front of a reward: on the devices for a black box, inside the gradient for a JAX function, part by part in a sum."""
    double = jax.tree_util.Partial(lambda w, x: w * x, jnp.asarray(2.0))
    seen = []

    def host(x, cond):
        seen.append(type(x))
        return x[:, 0] + cond

    x, cond = jnp.arange(6.0).reshape(3, 2), jnp.arange(3)
    smooth = cd.differentiable(lambda x: jnp.sum(x, axis=1), "smooth")
    both = cd.weighted_sum((1.0, smooth), (10.0, cd.black_box(host, conditional=True)))
    reward = cd.seen_through(double, both)
    total, parts = compute_reward_terms(reward, x, cond)
    np.testing.assert_allclose(parts["smooth"], 2 * x.sum(1))
    np.testing.assert_allclose(parts["host"], 2 * x[:, 0] + cond)
    np.testing.assert_allclose(total, parts["smooth"] + 10 * parts["host"])
    np.testing.assert_allclose(compute_rewards(reward, x, cond), total)
    assert set(seen) == {np.ndarray}
    gradient = jax.grad(lambda x: jnp.sum(cd.seen_through(double, smooth)(x)))(x)
    np.testing.assert_allclose(gradient, 2)
    for inner in (smooth, cd.black_box(host, conditional=True)):  # views in views: the outer one first
        nested = cd.seen_through(lambda x: x + 1, cd.seen_through(double, inner))
        np.testing.assert_allclose(
            compute_rewards(nested, x, cond), compute_rewards(cd.seen_through(double, inner), x + 1, cond)
        )


def test_views_of_a_few_samples_at_a_time():
    """No more views are made than `chunk`, whatever a reward does with them."""
    sizes = []

    def double(x):
        sizes.append(len(x))
        return 2 * x

    x, cond = jnp.arange(10.0).reshape(5, 2), jnp.arange(5)
    scaled = cd.differentiable(lambda x, cond: jnp.sum(x, axis=1) * cond, "scaled", conditional=True)
    reward = cd.seen_through(double, scaled, chunk=2)
    np.testing.assert_allclose(compute_rewards(reward, x, cond), 2 * x.sum(1) * cond)
    gradient = jax.grad(lambda x: jnp.sum(reward(x, cond)))(x)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(2.0 * cond[:, None], x.shape))
    assert set(sizes) == {1, 2}
