"""The same numbers whatever the devices and the parts that work is done in: samples, gradients and state, for every estimator.

Run by `test_parallel.py` where there are eight devices. Devices, parts and programs of a pass are combined, not gone through one by
one: whatever changes a number shows against the plain iteration on one device.
"""

import functools
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
from ctrl_diffusion.critics import log_ratio_to_go, soft_error
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
from ctrl_diffusion.runs import RunDirectory
from ctrl_diffusion.values import NoValue
from experiments.value_networks.cases import Size, ring_case
from experiments.value_networks.fit import FitBudget, learn
from experiments.value_networks.variants import BY_NAME

PROCESS = cd.DiffusionProcess(cd.VPLinear(tau_min=0.02))
BATCH, STEPS = 32, 8


def gain(x):
    """The reward."""
    return x[:, 0]


def control():
    """The score of standard normal data, and a network's change of it."""
    network = cd.ResidualMLP((2,), (2,), width=16, depth=1, rngs=nnx.Rngs(0))
    change, params = cd.score_control(network, PROCESS, cd.EPSILON)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])
    return (lambda params, t, x, cond: change(params, t, x) - x), params


CONTROL, PARAMS = control()
LEARNED, PHI = cd.value_network(cd.ResidualMLP((2,), (), width=16, depth=1, rngs=nnx.Rngs(2)))


def critic():
    return cd.Critic(cd.StructuredValue(LEARNED, PROCESS.t0, PROCESS.t1))


def soft_critic():
    return cd.Critic(critic().value, log_ratio_to_go, soft_error)


NONE = cd.Critic(NoValue(PROCESS.t0, PROCESS.t1))
CASES = {
    "likelihood ratio": lambda: (cd.estimators.LikelihoodRatio(clip=0.2), critic(), None),
    "weighted likelihood": lambda: (cd.estimators.WeightedLikelihood(), NONE, cd.replay.Reference()),
    "pathwise, one step": lambda: (Pathwise(1), critic(), None),
    "pathwise, all steps": lambda: (Pathwise(STEPS), NONE, None),
    "pathwise, replay": lambda: (Pathwise(1), critic(), cd.replay.ReplayBuffer(2 * BATCH)),
    "matching a gradient": lambda: (Matching(value_gradient), critic(), None),
    "matching the adjoint": lambda: (Matching(LeanAdjoint()), NONE, None),
    "detailed balance": lambda: (GradientBalance(), critic(), None),
    "log-variance": lambda: (LogVariance(), NONE, None),
    "path consistency": lambda: (PathConsistency(), critic(), None),
    "soft error": lambda: (Pathwise(1), soft_critic(), None),
    "natural gradient": lambda: (cd.estimators.LikelihoodRatio(), critic(), None),
}


@functools.cache
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


def composed(name, layout, reward=None, **settings):
    """An algorithm with plain gradient descent: differences of parameters are gradients. And what it starts from."""
    estimator, chosen, behaviour = CASES[name]()
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    sampler = cd.Sampler(PROCESS, CONTROL, (2,), grid=PROCESS.grid(STEPS), dtype=dtype)
    objective = cd.Objective(sampler, reward or cd.differentiable(gain), kl_weight=1.0)
    policy = cd.trust.NaturalGradient(0.1, fisher_transitions=64) if name == "natural gradient" else optax.sgd(1e-2)
    settings = {"minibatches": 2, "average": 0.9} | settings
    training = cd.Training(policy, BATCH, value=optax.sgd(1.0), layout=layout, **settings)
    algorithm = cd.compose(objective, estimator, chosen, training, behaviour=behaviour)
    params, phi = jax.tree.map(lambda v: v.astype(dtype), (PARAMS, PHI))
    return algorithm, algorithm.init(params, phi)


def iteration(name, layout, reward=None, **settings):
    algorithm, state = composed(name, layout, reward, **settings)
    return algorithm.step(jax.random.key(3), state)


@functools.cache
def known_iteration(name, layout, *settings, x64):
    return iteration(name, layouts()[layout], **dict(settings))


def made(name, layout="one", **settings):
    """The iteration on a layout, made once."""
    return known_iteration(name, layout, *sorted(settings.items()), x64=jax.config.jax_enable_x64)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]


def same(found, expected, rtol=1e-4, atol=1e-6):
    """All that a state holds, to rounding: relative to the entries and to a hundredth of the largest of them."""
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * max(1.0, np.max(np.abs(b), initial=0.0)))


SCANNED = {"scan_minibatches": True}
WAYS = {
    "likelihood ratio": [("four by two", SCANNED | {"accumulation": 2})],
    "weighted likelihood": [("eight", {"rollouts": 2})],
    "pathwise, one step": [("four by two", {"accumulation": 4, "rollouts": 4})],
    "pathwise, all steps": [("two", SCANNED | {"accumulation": 4})],
    "pathwise, replay": [("eight", {})],
    "matching a gradient": [("eight", SCANNED)],
    "matching the adjoint": [("eight", {"rollouts": 4})],
    "detailed balance": [("four by two", {})],
    "log-variance": [("two", SCANNED | {"accumulation": 4})],
    "path consistency": [("two", {"accumulation": 4})],
    "soft error": [("four by two", {"accumulation": 4})],
    "natural gradient": [("eight", {"accumulation": 4})],
}


def same_samples(found, expected):
    """To rounding: the noise is the same, and the compiler chooses its kernels by the shapes that a device has.

    A step's rounding, relative to states of size about 3, grows by less than ten in all; in float64 the same bound is 2^29 times
    smaller.
    """
    eps = np.finfo(np.asarray(expected).dtype).eps
    np.testing.assert_allclose(found, expected, rtol=0, atol=3 * 10 * STEPS * eps)


@pytest.mark.parametrize("name", WAYS)
def test_the_numbers_do_not_depend_on_how_the_work_is_divided(name):
    """The natural gradient in float64: ten iterations of conjugate gradient amplify rounding."""
    with jax.enable_x64(name == "natural gradient"):
        alone, info = made(name)
        for layout, settings in WAYS[name]:
            state, found = made(name, layout, **settings)
            same_samples(found.samples, info.samples)
            np.testing.assert_allclose(found.rewards, info.rewards, atol=1e-4)
            same(state, alone)
    moved = [np.max(np.abs(a - b)) for a, b in zip(leaves(alone.params), leaves(PARAMS))]
    assert max(moved) > 1e-4


class Shifted(eqx.Module):
    """The control with a fixed table added, of which the condition takes a row."""

    table: jax.Array

    def __call__(self, params, t, x, cond):
        return CONTROL(params, t, x, None) + self.table[cond]


def test_conditions_and_fixed_arrays_do_not_depend_on_the_devices():
    def on(layout):
        reward = cd.differentiable(lambda x, cond: gain(x) * (1.0 + cond), conditional=True)
        sampler = cd.Sampler(PROCESS, Shifted(0.1 * jnp.arange(8.0).reshape(4, 2)), (2,), grid=PROCESS.grid(STEPS))
        objective = cd.Objective(sampler, reward, 1.0, conditions=lambda key, n: jax.random.randint(key, (n,), 0, 4))
        algorithm = cd.dpok(objective, cd.Training(optax.sgd(1e-2), BATCH, minibatches=2, layout=layout))
        return algorithm.step(jax.random.key(3), algorithm.init(PARAMS))

    (alone, info), (state, found) = (on(layouts()[name]) for name in ("one", "four by two"))
    np.testing.assert_array_equal(found.cond, info.cond)
    same_samples(found.samples, info.samples)
    same(state, alone)
    assert len(set(np.asarray(info.cond).tolist())) == 4


def test_a_pass_in_one_program_gives_the_same_update():
    """State and metrics, of the first minibatch (the largest log-ratio) and of the last."""
    with jax.enable_x64(True):
        settings = {"epochs": 2, "minibatches": 4}
        (alone, info), (state, found) = (
            iteration("likelihood ratio", Layout(), **settings, scan_minibatches=v) for v in (False, True)
        )
    same(state, alone, rtol=1e-8, atol=1e-10)
    assert set(found.metrics) == set(info.metrics) and "first_log_ratio" in found.metrics
    for metric, value in info.metrics.items():
        np.testing.assert_allclose(found.metrics[metric], value, rtol=1e-7, atol=1e-10, err_msg=metric)


@pytest.mark.parametrize(
    ("name", "ways"),
    [("likelihood ratio", [("four by two", SCANNED)]), ("path consistency", [("eight", {})])],
    ids=["pairs", "paths"],
)
def test_stratified_minibatches_do_not_depend_on_the_devices(name, ways):
    """Losses on transitions, and on whole paths; also where a pass is one program."""
    alone, _ = made(name, stratified=True)
    for layout, settings in ways:
        same(made(name, layout, stratified=True, **settings)[0], alone)
    shuffled = made(name)[0]
    assert max(np.max(np.abs(a - b)) for a, b in zip(leaves(shuffled.params), leaves(alone.params))) > 1e-6  # other minibatches


def test_the_devices_sample_while_the_host_computes_rewards(monkeypatch):
    """All parts are handed to the devices before the host waits for the first."""
    events = []
    module = sys.modules["ctrl_diffusion.algorithms.collect"]
    paced, terms = Layout.paced, module.compute_reward_terms
    monkeypatch.setattr(Layout, "paced", lambda layout, tree: events.append("device") or paced(layout, tree))
    monkeypatch.setattr(module, "compute_reward_terms", lambda *args: events.append("host") or terms(*args))
    iteration("weighted likelihood", Layout(), reward=host_reward, rollouts=2)
    assert events[:8] == ["device"] * 6 + ["host", "device"]  # keys, conditions (here none), then paths and their actions


REFUSED = {
    "accumulation=3 must divide the transitions of a minibatch, 128": {"accumulation": 3},
    "rollouts=5 must divide batch=32": {"rollouts": 5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_parts_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        composed("likelihood ratio", Layout(), **REFUSED[message])


def test_batches_are_divided_evenly():
    with pytest.raises(ValueError, match="batch=32 must be a multiple of the number of devices, 3"):
        composed("likelihood ratio", Layout(make_mesh(devices=jax.devices()[:3])))
    with pytest.raises(ValueError, match="fsdp=3 must divide the number of devices, 8"):
        make_mesh(fsdp=3)


def test_parameters_and_their_optimiser_are_divided_over_fsdp():
    """Every large array has one divided axis; each device holds its part alone."""
    state, _ = made("detailed balance", "four by two")
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
    """By hand, `avg <- 0.9 avg + 0.1 params` after each; a natural gradient is one update an iteration, whatever the minibatches."""
    one = made("pathwise, one step", minibatches=1)[0]
    with jax.enable_x64(True):
        natural = made("natural gradient")[0]
    for state in (one, natural):
        for average, params, start in zip(leaves(state.average), leaves(state.params), leaves(PARAMS)):
            np.testing.assert_allclose(average, 0.9 * start + 0.1 * params, rtol=1e-5, atol=1e-7)
    assert composed("pathwise, one step", Layout(), average=None)[1].average == ()


def test_black_box_rewards_see_every_sample_once():
    seen = []

    def counted(x):
        seen.append(len(x))
        return x[:, 0]

    state = iteration("likelihood ratio", layouts()["eight"], reward=counted)[0]
    assert seen == [BATCH, BATCH * STEPS]
    same(state, made("likelihood ratio")[0])  # whose reward is the same


def test_the_value_network_experiment_does_not_depend_on_the_devices(tmp_path):
    case = ring_case("ring_linear")(RunDirectory(tmp_path / "run", {}), Size(seeds=1, paths=64, states=16), Layout())
    budget = FitBudget(iterations=2, evaluations=1, updates=2, transitions=64)
    one, eight = (learn(case, BY_NAME["structured"], budget, layouts()[name]) for name in ("one", "eight"))
    np.testing.assert_allclose(eight["square_soft"], one["square_soft"], rtol=1e-4)
    assert one["square_soft"][0][0] != one["square_soft"][0][-1]
    with pytest.raises(ValueError, match="transitions of an update=60 must be a multiple of the number of devices, 8"):
        learn(case, BY_NAME["structured"], budget._replace(transitions=60), layouts()["eight"])
