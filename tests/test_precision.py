"""Matrix products in bfloat16, and nothing else: states, likelihoods, prices and parameters stay float32."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import ctrl_diffusion as cd

PROCESS = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02))
SHAPE = (4, 4, 1)


def controls():
    """The same weights with products in float32 and in bfloat16."""
    found = []
    for dtype in (None, "bfloat16"):
        network = cd.ResidualMLP(SHAPE, SHAPE, width=32, depth=2, dtype=dtype, rngs=nnx.Rngs(0))
        control, params = cd.score_control(network, PROCESS)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        params = tree.unflatten([leaf + 0.1 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])
        found.append((control, params))
    return found


def products(jaxpr):
    """Types of the operands of every matrix product, those inside other programs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(v.aval.dtype.name for v in eqn.invars)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from products(inner)


def test_products_are_bfloat16_and_results_float32():
    (exact, params), (half, half_params) = controls()
    x = jax.random.normal(jax.random.key(2), (64, *SHAPE))
    t = jnp.linspace(PROCESS.t0, 0.9, 64)
    assert set(products(jax.make_jaxpr(half)(half_params, t, x).jaxpr)) == {("bfloat16", "bfloat16")}
    assert set(products(jax.make_jaxpr(exact)(params, t, x).jaxpr)) == {("float32", "float32")}
    a, b = exact(params, t, x), half(half_params, t, x)
    assert b.dtype == jnp.float32
    error = float(jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(a**2)))
    assert 1e-5 < error < 0.02  # a few roundings of 2^-9


@pytest.mark.slow
def test_an_iteration_keeps_its_state_in_float32():
    _, (control, params) = controls()
    sampler = cd.Sampler(PROCESS, control, SHAPE, grid=PROCESS.grid(4))
    objective = cd.Objective(sampler, cd.differentiable(lambda x: jnp.mean(x, axis=(1, 2, 3))), kl_weight=0.1)
    algorithm = cd.dpok(objective, cd.Training(optax.adam(1e-3), batch=16, minibatches=2))
    state, info = algorithm.step(jax.random.key(0), algorithm.init(params))
    floats = [leaf for leaf in jax.tree.leaves((state, info)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floats} == {"float32"}
    assert (
        float(info.metrics["first_log_ratio"]) < 1e-3
    )  # the policy has not moved: the ratio is 1 but for a rare other rounding
    assert max(np.max(np.abs(a - b)) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.reference))) > 0
