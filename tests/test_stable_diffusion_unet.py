"""The UNet against diffusers' and against itself under other options."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ctrl_diffusion.stable_diffusion import UNet, UNetConfig, abstract_network, load_network
from tests.stable_diffusion_reference import GATE, UNETS, call, compiled, normal, relative, saved, unet

TIMESTEPS = jnp.asarray([1.0, 981.0])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By name: diffusers' model, the folder it was written to, and the network that was read from there."""
    found = {}
    for name in UNETS:
        model, folder = unet(name), tmp_path_factory.mktemp("unet")
        found[name] = model, saved(model, folder), load_network(UNet, folder)
    return found


@compiled
def apply(network, x, timesteps, context):
    return network(x, timesteps, context)


def inputs(*size: int):
    return jnp.asarray(normal(0, 2, *size, 4)), TIMESTEPS, jnp.asarray(normal(1, 2, 7, 24))


@pytest.mark.parametrize(("name", "size"), [("SD 1", (8, 8)), ("SD 1", (5, 14)), ("SD 2", (4, 12)), ("SD 2", (10, 6))], ids=str)
def test_parity_with_diffusers(models, name, size):
    """At sizes that do not halve evenly, too."""
    model, _, network = models[name]
    assert relative(apply(network, *inputs(*size)), call(model, *inputs(*size))) < GATE


@pytest.mark.slow
def test_bfloat16_is_close_and_keeps_types(models):
    _, folder, exact = models["SD 2"]
    network = load_network(UNet, folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(network))} == {jnp.dtype("float32")}
    got = apply(network, *inputs(4, 12))
    assert got.dtype == jnp.float32
    assert 1e-4 < relative(got, apply(exact, *inputs(4, 12))) < 0.1  # bfloat16 has 8 bits: 4e-3 per operation


@pytest.mark.slow
def test_gradients_of_all_parameters_with_and_without_remat():
    """As a control uses the network: a pure function of its parameters, all of which matter."""
    config = UNetConfig(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    gradients, programs = [], []
    for remat in (False, True):
        graphdef, shapes = nnx.split(abstract_network(lambda rngs, remat=remat: UNet(config, remat=remat, rngs=rngs)))
        params = jax.tree.map(lambda leaf: jnp.asarray(0.1 * normal(leaf.size, *leaf.shape)), shapes)

        def loss(params, graphdef=graphdef):
            return jnp.sum(nnx.merge(graphdef, params)(*inputs(4, 6)) ** 2)

        gradients.append(dict(nnx.to_flat_state(compiled(jax.grad(loss))(params))))
        programs.append(str(jax.make_jaxpr(loss)(params)))
    assert "remat" not in programs[0] and programs[1].count("remat") == 8  # two layers down, two in the middle, four up
    for path, plain in gradients[0].items():
        assert float(jnp.max(jnp.abs(plain[...]))) > 0, path
        assert relative(gradients[1][path][...], plain[...]) < 1e-3, path


def test_another_attention_function(models):
    """It gets `[b, n, heads, width / heads]`."""
    _, folder, exact = models["SD 2"]
    shapes = []

    def attention(q, k, v, **options):
        shapes.append((q.shape, k.shape, v.shape))
        return jax.nn.dot_product_attention(q, k, v, **options)

    got = apply(load_network(UNet, folder, attention=attention), *inputs(4, 12))
    assert relative(got, apply(exact, *inputs(4, 12))) < GATE
    middle, coarse = (2, 12, 4, 12), (2, 3, 8, 8)  # 2 x 6 pixels, 4 heads of 12; 1 x 3 pixels, 8 heads of 8
    texts = [((2, 7, *q[2:]),) * 2 for q in (middle, coarse)]
    assert set(shapes) == {(middle,) * 3, (coarse,) * 3, (middle, *texts[0]), (coarse, *texts[1])}


def test_tensors_are_placed_one_by_one(models):
    """`sharding` sees the names and shapes of the network, and decides."""
    _, folder, _ = models["SD 1"]
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
    _, folder, _ = models["SD 1"]
    abstract, build = [], UNet.__init__

    def recorded(self, *arguments, **options):
        build(self, *arguments, **options)
        abstract.append(isinstance(self.conv_in.kernel[...], jax.core.Tracer))

    monkeypatch.setattr(UNet, "__init__", recorded)
    load_network(UNet, folder)
    assert abstract == [True]
