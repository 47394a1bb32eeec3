"""The same numbers whatever the devices: samples, gradients and state, for every estimator, on one, two and eight devices."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import ctrl_diffusion as cd
from ctrl_diffusion import exact
from ctrl_diffusion.estimators import (
    GradientBalance,
    LeanAdjoint,
    LogVariance,
    Matching,
    PathConsistency,
    Pathwise,
    value_gradient,
)
from ctrl_diffusion.parallel import Layout, make_mesh
from ctrl_diffusion.values import NoValue
from experiments.discretization.cells import Samplers, collect
from experiments.exact.units import budget_for, solve
from experiments.rundir import RunDirectory
from experiments.value_networks.cases import Size, ring_case
from experiments.value_networks.fit import Budget, learn
from experiments.value_networks.variants import BY_NAME

PROCESS = cd.DiffusionProcess(cd.VPLinear(tau_min=0.02))
EXACT = exact.MixtureControl(PROCESS, exact.ring(), exact.LinearReward((1.0, 0.0)), kl_weight=1.0)
BATCH, STEPS = 32, 8


def control():
    network = cd.ResidualMLP((2,), (2,), width=16, depth=1, rngs=nnx.Rngs(0))
    change, params = cd.score_control(network, PROCESS, cd.EPSILON)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])
    return (lambda params, t, x, cond: EXACT.reference_action(None, t, x) + change(params, t, x)), params


CONTROL, PARAMS = control()
LEARNED, PHI = cd.value_network(cd.ResidualMLP((2,), (), width=16, depth=1, rngs=nnx.Rngs(2)))


def critic():
    return cd.Critic(cd.StructuredValue(LEARNED, PROCESS.t0, PROCESS.t1), optax.sgd(1.0))


NONE = cd.Critic(NoValue(PROCESS.t0, PROCESS.t1))
CASES = {
    "likelihood ratio": lambda: (cd.estimators.LikelihoodRatio(clip=0.2), critic(), None),
    "weighted likelihood": lambda: (cd.estimators.WeightedLikelihood(), NONE, cd.states.Reference()),
    "pathwise, one step": lambda: (Pathwise(1), critic(), None),
    "pathwise, all steps": lambda: (Pathwise(STEPS), NONE, None),
    "pathwise, replay": lambda: (Pathwise(1), critic(), cd.states.Replay(2 * BATCH)),
    "matching a gradient": lambda: (Matching(value_gradient), critic(), None),
    "matching the adjoint": lambda: (Matching(LeanAdjoint()), NONE, None),
    "detailed balance": lambda: (GradientBalance(), critic(), None),
    "log-variance": lambda: (LogVariance(), NONE, None),
    "path consistency": lambda: (PathConsistency(), critic(), None),
    "natural gradient": lambda: (cd.estimators.LikelihoodRatio(), critic(), None),
}


def layouts():
    devices = jax.devices()
    return {
        "one": Layout(),
        "two": Layout(make_mesh(devices=devices[:2]), min_size=1),
        "eight": Layout(make_mesh(), min_size=1),
        "four by two": Layout(make_mesh(fsdp=2), min_size=1),
    }


def host_reward(x):
    return np.asarray(x)[:, 0]


def iteration(name, layout, reward=None, **settings):
    """One iteration with plain gradient descent: differences of parameters are gradients."""
    estimator, chosen, states = CASES[name]()
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    sampler = cd.Sampler(PROCESS, CONTROL, (2,), grid=PROCESS.grid(STEPS), dtype=dtype)
    objective = cd.Objective(sampler, reward or cd.differentiable(EXACT.reward), kl_weight=1.0)
    policy = cd.NaturalGradient(0.1, fisher_rows=64) if name == "natural gradient" else optax.sgd(1e-2)
    settings = {"minibatches": 2, "average": 0.9} | settings
    training = cd.Training(policy, BATCH, layout=layout, **settings)
    algorithm = cd.compose(objective, estimator, chosen, training, states=states)
    params, phi = jax.tree.map(lambda v: v.astype(dtype), (PARAMS, PHI))
    state, info = algorithm.step(jax.random.key(3), algorithm.init(params, phi))
    return state, info


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


@pytest.mark.parametrize("name", [name for name in CASES if name != "natural gradient"])
def test_the_numbers_do_not_depend_on_the_devices(name):
    same_numbers(name)


def test_the_natural_gradient_does_not_depend_on_the_devices():
    """In float64: ten iterations of conjugate gradient amplify rounding."""
    with jax.enable_x64(True):
        same_numbers("natural gradient")


def same_numbers(name):
    alone, info = iteration(name, Layout())
    chosen = ("eight", "four by two") if name in ("likelihood ratio", "pathwise, replay", "natural gradient") else ("eight",)
    for state, found in (iteration(name, layouts()[layout]) for layout in chosen):
        if jax.config.jax_enable_x64:
            np.testing.assert_allclose(found.samples, info.samples, rtol=1e-12)
        else:
            np.testing.assert_array_equal(found.samples, info.samples)  # bit for bit
        np.testing.assert_allclose(found.rewards, info.rewards, atol=1e-4)
        for a, b in zip(leaves(state), leaves(alone)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    moved = [np.max(np.abs(a - b)) for a, b in zip(leaves(alone.params), leaves(PARAMS))]
    assert max(moved) > 1e-4


class Shifted(eqx.Module):
    """The control with a fixed table added, of which the condition takes a row."""

    table: jax.Array

    def __call__(self, params, t, x, cond):
        return CONTROL(params, t, x, None) + self.table[cond]


def test_conditions_and_fixed_arrays_do_not_depend_on_the_devices():
    def alone_or_together(layout):
        reward = cd.differentiable(lambda x, cond: EXACT.reward(x) * (1.0 + cond), conditional=True)
        sampler = cd.Sampler(PROCESS, Shifted(0.1 * jnp.arange(8.0).reshape(4, 2)), (2,), grid=PROCESS.grid(STEPS))
        objective = cd.Objective(sampler, reward, 1.0, conditions=lambda key, n: jax.random.randint(key, (n,), 0, 4))
        algorithm = cd.dpok(objective, cd.Training(optax.sgd(1e-2), BATCH, minibatches=2, layout=layout))
        return algorithm.step(jax.random.key(3), algorithm.init(PARAMS))

    alone, info = alone_or_together(Layout())
    for name in ("eight", "four by two"):
        state, found = alone_or_together(layouts()[name])
        np.testing.assert_array_equal(found.cond, info.cond)
        np.testing.assert_array_equal(found.samples, info.samples)  # bit for bit
        for a, b in zip(leaves(state), leaves(alone)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert len(set(np.asarray(info.cond).tolist())) == 4


@pytest.mark.parametrize("name", ["likelihood ratio", "pathwise, all steps", "path consistency"])
def test_accumulation_gives_the_same_update(name):
    alone = iteration(name, Layout(), minibatches=1)[0]
    for layout in (Layout(), layouts()["two"]):
        state = iteration(name, layout, minibatches=1, accumulation=4)[0]
        for a, b in zip(leaves(state), leaves(alone)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["likelihood ratio", "natural gradient", "path consistency"])
def test_a_pass_in_one_program_gives_the_same_update(name):
    """State and metrics, of the first minibatch (the largest log-ratio) and of the last."""
    with jax.enable_x64(True):
        settings = {"epochs": 2, "minibatches": 4}
        (alone, info), (state, found) = (iteration(name, Layout(), **settings, scan_minibatches=v) for v in (False, True))
    for a, b in zip(leaves(state), leaves(alone)):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)
    assert set(found.metrics) == set(info.metrics) and ("first_log_ratio" in found.metrics) == (name == "likelihood ratio")
    for metric, value in info.metrics.items():
        np.testing.assert_allclose(found.metrics[metric], value, rtol=1e-7, atol=1e-10, err_msg=metric)


def test_a_natural_gradient_in_parts_is_the_same_update():
    """In float64; also where parameters are divided."""
    with jax.enable_x64(True):
        alone = iteration("natural gradient", Layout(), minibatches=1)[0]
        for layout in ("two", "four by two"):
            state = iteration("natural gradient", layouts()[layout], minibatches=1, accumulation=4)[0]
            for a, b in zip(leaves(state), leaves(alone)):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["likelihood ratio", "path consistency"])
def test_stratified_minibatches_do_not_depend_on_the_devices(name):
    """Rows that are (time, sample) pairs, and rows that are paths; also where a pass is one program."""
    alone, info = iteration(name, Layout(), stratified=True)
    for layout, scanned in (("eight", False), ("eight", True), ("four by two", True)):
        state, found = iteration(name, layouts()[layout], stratified=True, scan_minibatches=scanned)
        np.testing.assert_array_equal(found.samples, info.samples)
        for a, b in zip(leaves(state), leaves(alone)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    shuffled = iteration(name, Layout())[0]
    assert max(np.max(np.abs(a - b)) for a, b in zip(leaves(shuffled.params), leaves(alone.params))) > 1e-6  # other minibatches


@pytest.mark.parametrize("name", ["pathwise, one step", "matching the adjoint"])
def test_rollouts_in_parts_are_the_same_paths(name):
    alone, info = iteration(name, Layout(), minibatches=1)
    state, found = iteration(name, Layout(), minibatches=1, rollouts=4, reward=cd.differentiable(EXACT.reward))
    np.testing.assert_array_equal(found.samples, info.samples)
    for a, b in zip(leaves(state), leaves(alone)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="rollouts=5 must divide batch=32"):
        iteration(name, Layout(), rollouts=5)


def test_the_devices_sample_while_the_host_judges(monkeypatch):
    """All parts are handed to the devices before the host waits for the first."""
    events = []
    module = sys.modules["ctrl_diffusion.algorithms.compose"]
    paced, judge = Layout.paced, module.evaluate_parts
    monkeypatch.setattr(Layout, "paced", lambda layout, tree: events.append("device") or paced(layout, tree))
    monkeypatch.setattr(module, "evaluate_parts", lambda *args: events.append("host") or judge(*args))
    iteration("weighted likelihood", Layout(), reward=host_reward, rollouts=2)
    assert events[:8] == ["device"] * 5 + ["host", "host", "device"]  # conditions (here none), then paths and their actions


def test_statistics_of_a_minibatch_are_not_accumulated():
    with pytest.raises(ValueError, match="accumulation=4: the loss of LogVariance is a statistic"):
        iteration("log-variance", Layout(), accumulation=4)
    with pytest.raises(ValueError, match="accumulation=3 must divide the rows of a minibatch, 128"):
        iteration("likelihood ratio", Layout(), accumulation=3)


def test_batches_are_divided_evenly():
    with pytest.raises(ValueError, match="batch=32 must be a multiple of the number of devices, 3"):
        iteration("likelihood ratio", Layout(make_mesh(devices=jax.devices()[:3])))
    with pytest.raises(ValueError, match="fsdp=3 must divide the number of devices, 8"):
        make_mesh(fsdp=3)


def test_parameters_and_their_optimiser_are_divided_over_fsdp():
    """Every large array has one divided axis; each device holds its part alone."""
    layout = layouts()["four by two"]
    state, _ = iteration("likelihood ratio", layout)
    specs = [leaf.sharding.spec for leaf in jax.tree.leaves((state.params, state.reference, state.average))]
    assert sum("fsdp" in spec for spec in specs) > len(specs) / 2
    kernel = next(leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim == 2)
    assert kernel.addressable_shards[0].data.size == kernel.size // 2


def test_small_parameters_stay_whole():
    layout = Layout(make_mesh(fsdp=2))
    shardings = layout.parameters({"small": jnp.zeros((8, 8)), "large": jnp.zeros((64, 512)), "odd": jnp.zeros((2**15 + 1,))})
    assert {name: s.spec for name, s in shardings.items()} == {
        "small": PartitionSpec(None, None),
        "large": PartitionSpec(None, "fsdp"),
        "odd": PartitionSpec(None),
    }


def test_the_average_of_parameters_is_that_of_the_updates():
    """Two updates by hand: `avg <- 0.9 avg + 0.1 params` after each."""
    one = iteration("pathwise, one step", Layout(), minibatches=1)[0]
    for average, params, start in zip(leaves(one.average), leaves(one.params), leaves(PARAMS)):
        np.testing.assert_allclose(average, 0.9 * start + 0.1 * params, rtol=1e-5, atol=1e-7)
    assert iteration("pathwise, one step", Layout(), average=None)[0].average == ()
    natural = iteration("natural gradient", Layout(), minibatches=2)[0]  # one update an iteration, whatever the minibatches
    for average, params, start in zip(leaves(natural.average), leaves(natural.params), leaves(PARAMS)):
        np.testing.assert_allclose(average, 0.9 * start + 0.1 * params, rtol=1e-5, atol=1e-7)


def test_black_box_rewards_see_every_sample_once():
    seen = []

    def counted(x):
        seen.append(len(x))
        return x[:, 0]

    alone, other = (iteration("likelihood ratio", layouts()[name], reward=counted)[0] for name in ("one", "eight"))
    assert seen == [BATCH, BATCH * STEPS] * 2
    for a, b in zip(leaves(other), leaves(alone)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chain", [True, False])
def test_samples_of_the_discretisation_experiment_are_the_same_bit_for_bit(chain):
    samplers = Samplers(lambda params, t, x, cond: params * x, PROCESS.schedule, (2,), max_steps=STEPS)
    draw = (samplers.draw_chain if chain else samplers.draw)(cd.solvers.ExponentialEuler(), 1.0)
    found = []
    for layout in (Layout(), layouts()["eight"]):
        params, reference = layout.put((jnp.asarray(-1.0), jnp.asarray(-0.9)), layout.replicated)
        found.append(collect(draw, params, reference, PROCESS.grid(STEPS - 2), jax.random.key(0), 40, 16, layout))
    for one, eight in zip(*found):
        np.testing.assert_array_equal(eight, one)
    assert found[0][0].shape == (40, 2) and (found[0][1] is not None) == chain


def test_the_value_network_experiment_does_not_depend_on_the_devices(tmp_path):
    case = ring_case("ring_linear")(RunDirectory(tmp_path / "run", {}), Size(seeds=1, paths=64, states=16), Layout())
    budget = Budget(iterations=2, evaluations=1, updates=2, rows=64)
    one, eight = (learn(case, BY_NAME["structured"], budget, layout) for layout in (Layout(), layouts()["eight"]))
    np.testing.assert_allclose(eight["square_soft"], one["square_soft"], rtol=1e-4)
    assert one["square_soft"][0][0] != one["square_soft"][0][-1]
    with pytest.raises(ValueError, match="rows of an update=60 must be a multiple of the number of devices, 8"):
        learn(case, BY_NAME["structured"], budget._replace(rows=60), layouts()["eight"])


def test_a_unit_of_the_leaderboard_does_not_depend_on_the_devices():
    budget = budget_for("log_variance", "linear_ou")._replace(iterations=2)
    one, eight = (solve("log_variance", "linear_ou", 0, budget, layout) for layout in (Layout(), layouts()["eight"]))
    assert one["relative_gap"] < 0.5  # it has learned something
    for name in ("relative_gap", "control_l2_error", "reward", "path_kl"):
        assert eight[name] == pytest.approx(one[name], rel=1e-4)


def test_samples_of_a_larger_network_are_the_same_bit_for_bit():
    """The network and batch of the digits."""
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02))
    model = cd.make_model(cd.ResidualMLP((8, 8, 1), (8, 8, 1), rngs=nnx.Rngs(0)), process, (8, 8, 1), grid=process.grid(6))
    leaves, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([leaf + 0.05 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])
    found = []
    for layout in (Layout(), Layout(make_mesh(devices=jax.devices()[:2])), Layout(make_mesh())):
        keys = layout.put(cd.sample_keys(jax.random.key(0), 512), layout.batch)
        found.append(np.asarray(jax.jit(model.sampler.sample)(layout.put(params, layout.parameters), keys)))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])
