"""The UNet against diffusers' and against itself under other options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ctrl_diffusion.stable_diffusion import UNet, load_network
from tests.stable_diffusion_reference import GATE, UNETS, call, normal, relative, saved, unet

TIMESTEPS = jnp.asarray([1.0, 981.0])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name: diffusers' model, and the folder it was written to."""
    folder = tmp_path_factory.mktemp("unets")
    return {name: (model, saved(model, folder / name)) for name, model in ((name, unet(name)) for name in UNETS)}


@jax.jit
def apply(network, x, timesteps, context):
    return network(x, timesteps, context)


def inputs(*size: int):
    return jnp.asarray(normal(0, 2, *size, 4)), TIMESTEPS, jnp.asarray(normal(1, 2, 7, 24))


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (10, 6)], ids=str)
@pytest.mark.parametrize("name", UNETS)
def test_parity_with_diffusers(models, name, size):
    """At sizes that cannot be halved twice, too."""
    model, folder = models[name]
    assert relative(apply(load_network(UNet, folder), *inputs(*size)), call(model, *inputs(*size))) < GATE


@pytest.mark.parametrize("name", UNETS)
def test_bfloat16_is_close_and_keeps_types(models, name):
    _, folder = models[name]
    network = load_network(UNet, folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(network))} == {jnp.dtype("float32")}
    got, exact = apply(network, *inputs(8, 8)), apply(load_network(UNet, folder), *inputs(8, 8))
    assert got.dtype == jnp.float32
    assert 1e-4 < relative(got, exact) < 0.1  # bfloat16 has 8 bits: 4e-3 per operation


def loss(network, x, timesteps, context):
    return jnp.sum(network(x, timesteps, context) ** 2)


def test_remat_changes_memory_and_not_the_gradient(models):
    _, folder = models["SD 1"]
    gradients, memory = [], []
    for remat in (False, True):
        network = load_network(UNet, folder, remat=remat)
        compiled = jax.jit(jax.grad(loss)).lower(network, *inputs(16, 16)).compile()
        gradients.append(jax.tree.leaves(compiled(network, *inputs(16, 16))))
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
    assert memory[1] < 0.7 * memory[0]
    for plain, recomputed in zip(*gradients):
        np.testing.assert_allclose(recomputed, plain, rtol=1e-4, atol=1e-4 * float(jnp.std(plain)) + 1e-6)


def test_split_merge_and_gradients_of_all_parameters(models):
    """As a control uses the network: pure functions of the parameters, all of which matter."""
    _, folder = models["SD 2"]
    graphdef, params = nnx.split(load_network(UNet, folder))
    gradient = jax.jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params), *inputs(4, 4))))(params)
    for path, leaf in nnx.to_flat_state(gradient):
        assert float(jnp.max(jnp.abs(leaf[...]))) > 0, path


def test_another_attention_function(models):
    """Which gets `[b, n, heads, width / heads]`."""
    _, folder = models["SD 2"]
    shapes = []

    def attention(q, k, v, **options):
        shapes.append((q.shape, k.shape, v.shape))
        return jax.nn.dot_product_attention(q, k, v, **options)

    got = load_network(UNet, folder, attention=attention)(*inputs(8, 8))
    assert relative(got, apply(load_network(UNet, folder), *inputs(8, 8))) < GATE
    heads = (8, 8)  # heads, and their width at the coarse resolution
    assert set(shapes) == {((2, 16, *heads),) * 3, ((2, 16, *heads), *((2, 7, *heads),) * 2)}


def test_tensors_are_placed_one_by_one(models):
    """`sharding` sees the names and shapes of the network, and decides."""
    _, folder = models["SD 1"]
    seen = {}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def sharding(name, shape):
        seen[name] = shape
        return device

    network = load_network(UNet, folder, sharding=sharding)
    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(network))}
    assert seen == {name: array.shape for name, array in flat.items()}
    assert seen["down_blocks.0.resnets.0.conv1.kernel"] == (3, 3, 32, 32)
    assert {array.sharding for array in flat.values()} == {device}


def test_no_random_parameters_are_made_when_loading(models, monkeypatch):
    """The network is built for its shapes alone."""
    _, folder = models["SD 1"]
    abstract, build = [], UNet.__init__

    def recorded(self, *arguments, **options):
        build(self, *arguments, **options)
        abstract.append(isinstance(self.conv_in.kernel[...], jax.core.Tracer))

    monkeypatch.setattr(UNet, "__init__", recorded)
    load_network(UNet, folder)
    assert abstract == [True]


def test_random_parameters(models):
    _, folder = models["SD 1"]
    config = load_network(UNet, folder).config
    first, again, other = (UNet(config, rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    out = functools.partial(apply, x=inputs(8, 8)[0], timesteps=TIMESTEPS, context=inputs(8, 8)[2])
    np.testing.assert_array_equal(out(first), out(again))
    assert relative(out(other), out(first)) > 0.1
