"""The same samples bit for bit whatever the devices, in the programs that users have; run by `test_parallel.py`.

Products of the few rows that eight devices have each may be rounded otherwise than those of all rows: on some machines the samples of
`parallel_cases.py` differ in the last digits. Those of an experiment's size do not.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.parallel import Layout, make_mesh
from experiments.discretization.cells import Samplers, collect
from tests.parallel_cases import PROCESS, STEPS, layouts

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("chain", [True, False])
def test_samples_of_the_discretisation_experiment(chain):
    samplers = Samplers(lambda params, t, x, cond: params * x, PROCESS.schedule, (2,), max_steps=STEPS)
    draw = (samplers.draw_chain if chain else samplers.draw)(cd.solvers.ExponentialEuler(), 1.0)
    found = []
    for layout in (Layout(), layouts()["eight"]):
        params, reference = layout.put((jnp.asarray(-1.0), jnp.asarray(-0.9)), layout.replicated)
        found.append(collect(draw, params, reference, PROCESS.grid(STEPS - 2), jax.random.key(0), 40, 16, layout))
    for one, eight in zip(*found):
        np.testing.assert_array_equal(eight, one)
    assert found[0][0].shape == (40, 2) and (found[0][1] is not None) == chain


def test_samples_of_a_larger_network():
    """The network and batch of the digits."""
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02))
    model = cd.make_model(cd.ResidualMLP((8, 8, 1), (8, 8, 1), rngs=nnx.Rngs(0)), process, (8, 8, 1), grid=process.grid(6))
    leaves, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([leaf + 0.05 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])
    found = []
    for layout in (Layout(), Layout(make_mesh())):
        keys = layout.put(cd.sample_keys(jax.random.key(0), 512), layout.batch)
        found.append(np.asarray(jax.jit(model.sampler.sample)(layout.put(params, layout.parameters), keys)))
    np.testing.assert_array_equal(found[1], found[0])
