"""What compiled programs exchange between eight devices, and that it is no more than it must be."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ctrl_diffusion as cd
from ctrl_diffusion.chunks import in_chunks
from ctrl_diffusion.stable_diffusion import GuidedScore, Noising
from tests.parallel_cases import BATCH, CASES, CONTROL, PARAMS, PHI, PROCESS, STEPS, gain, layouts

REDUCTION = re.compile(r"= (.*?) (all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute)(?:-start)?\(")


def collectives(text):
    """Kind and number of entries of every collective in a compiled program's text."""
    found = []
    for shapes, kind in REDUCTION.findall(text):
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found.append((kind, sum(sizes)))
    return found


def programs(name, layout, **settings):
    """The programs of an iteration, lowered, not yet compiled."""
    estimator, chosen, behaviour = CASES[name]()
    sampler = cd.Sampler(PROCESS, CONTROL, (2,), grid=PROCESS.grid(STEPS))
    objective = cd.Objective(sampler, cd.differentiable(gain), kl_weight=1.0)
    training = cd.Training(optax.adam(1e-2), BATCH, value=optax.adam(1e-2), layout=layout, **settings)
    algorithm = cd.compose(objective, estimator, chosen, training, behaviour=behaviour)
    return cd.algorithms.lower(algorithm, PARAMS, PHI)


def compiled(lowered):
    """The text of a program."""
    return lowered.compile().as_text()


def loop_bodies(text):
    """The computations of a compiled program's text that are bodies of loops."""
    names = set(re.findall(r"body=%?([\w.-]+)", text))
    return [part for part in text.split("\n\n") if part.strip().split(" ")[0].lstrip("%") in names]


@pytest.mark.parametrize("name", ["likelihood ratio", "path consistency"])
def test_stratified_rows_stay_on_their_devices(name):
    """The compiled `select` exchanges nothing; that of shuffled rows does."""
    found = {v: compiled(programs(name, layouts()["eight"], minibatches=2, stratified=v)["select"]) for v in (True, False)}
    assert collectives(found[True]) == [] and collectives(found[False]) != []


def test_chunks_leave_rows_on_their_devices():
    layout = layouts()["eight"]
    x = layout.put(jnp.arange(192.0).reshape(64, 3), layout.batch)
    double = jax.jit(in_chunks(lambda x: 2 * x, 16))
    assert collectives(double.lower(x).compile().as_text()) == []
    np.testing.assert_array_equal(double(x), 2 * np.asarray(x))


def test_both_branches_of_guidance_are_on_the_device_of_their_row():
    """The compiled guided score exchanges nothing; of two prompts, the second is the row's."""
    layout, noising = layouts()["eight"], Noising()
    x = layout.put(jnp.arange(256.0).reshape(16, 2, 2, 4) / 256, layout.batch)
    prompt = layout.put(jnp.ones(16, jnp.int32), layout.batch)
    contexts, empty = jnp.asarray([[[5.0]], [[3.0]]]), jnp.asarray([[1.0]])
    process, half = noising.process(10, 1.0), jnp.asarray(0.5)
    denoise = lambda params, base, x, timesteps, context: x * context[:, :, :, None]  # noqa: E731
    score = jax.jit(lambda x, prompt: GuidedScore(denoise, (), contexts, empty, 2.0, noising, process)((), half, x, prompt))
    assert collectives(score.lower(x, prompt).compile().as_text()) == []
    tau = jnp.full(16, process.tau(half))
    expected = noising.prediction.to_score(process.schedule, tau, x, x * (1 + 2 * (3 - 1)))
    np.testing.assert_allclose(score(x, prompt), expected, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "natural gradient"])
def test_one_gradient_reduction_per_update(name):
    """The compiled update reduces the gradients of policy and value once, together or apart; all else is a few numbers."""
    text = compiled(programs(name, layouts()["eight"])["update"])
    found, loops = collectives(text), collectives("".join(loop_bodies(text)))
    size = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    large = [entries for kind, entries in found if entries >= 100]
    print(name, found, size, loops)
    assert {kind for kind, _ in found} == {"all-reduce"} and not loops
    learns = CASES[name]()[1].learns
    assert len(large) <= 1 + learns and sum(large) < 2.5 * size + 100


@pytest.mark.parametrize("stratified", [True, False])
def test_a_pass_in_one_program_reduces_once_per_update(stratified):
    """The loop over minibatches has in its body what the update has, and, of shuffled rows, their exchange."""
    settings = {"minibatches": 4, "stratified": stratified}
    apart = programs("pathwise, one step", layouts()["eight"], **settings)
    swept = programs("pathwise, one step", layouts()["eight"], scan_minibatches=True, **settings)
    assert not {"select", "update"} & set(swept) and "sweep" not in apart

    text = compiled(swept["sweep"])
    assert f'"known_trip_count":{{"n":"{settings["minibatches"]}"}}' in text
    inside, once = collectives("".join(loop_bodies(text))), collectives(compiled(apart["update"]))
    assert inside == collectives(text)  # none outside of the loop
    if stratified:
        assert inside == once

    def reduced(found):
        return sum(entries for kind, entries in found if kind == "all-reduce")

    assert 0 < reduced(once) <= reduced(inside) <= reduced(once) + reduced(collectives(compiled(apart["select"])))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_gradients_of_convolutions_are_reduced_once(axes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    x, w = (jax.random.normal(jax.random.key(0), shape) for shape in ((16, 8, 8, 4), (3, 3, 4, 8)))
    layer = functools.partial(cd.convolution, strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum(layer(x, w) ** 2)))
    divided = [jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in ((w, PartitionSpec()), (x, PartitionSpec("data")))]
    assert collectives(gradient.lower(*divided).compile().as_text()) == [("all-reduce", w.size)]
    np.testing.assert_allclose(gradient(*divided), gradient(w, x), rtol=1e-4)
