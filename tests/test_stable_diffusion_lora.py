"""LoRA of the UNet: what it changes and what is trained, here and against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ctrl_diffusion.stable_diffusion import (
    LoRA,
    UNet,
    UNetConfig,
    abstract_network,
    add_lora,
    load_network,
    lora_parameters,
    merge_lora,
    save_lora,
    save_network,
    split_full,
    split_lora,
)
from tests.lora_reference import ALPHA, ATTENTION, INPUTS, RANK, TARGETS, changed, leaves, randomised
from tests.stable_diffusion_reference import GATE, call, compiled, diffusers, normal, relative, saved, unet

# one block on either side: 4 transformers of width 16
SMALL = UNetConfig(
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=24,
    attention_head_dim=2,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A network without LoRA, for tests that must not change it."""
    return load_network(UNet, saved(unet("SD 1"), tmp_path_factory.mktemp("unet")))


def small(param_dtype=jnp.float32):
    """A network that computes in bfloat16 and recomputes for the gradient."""

    def make(rngs):
        return UNet(SMALL, dtype=jnp.bfloat16, param_dtype=param_dtype, remat=True, rngs=rngs)

    graphdef, shapes = nnx.split(abstract_network(make))
    arrays = jax.tree.map(lambda leaf: jnp.asarray(0.1 * normal(leaf.size, *leaf.shape), leaf.dtype), shapes)
    return nnx.merge(graphdef, arrays)


@compiled
def apply(network, x, timesteps, context):
    return network(x, timesteps, context)


def bits(array):
    return np.asarray(array).view(np.uint32)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- the start


@pytest.mark.slow
def test_nothing_changes_at_first(plain):
    """Not a single bit."""
    network = nnx.clone(plain)
    add_lora(network, RANK, alpha=ALPHA, targets=TARGETS, rngs=nnx.Rngs(0))
    assert np.array_equal(bits(network(*INPUTS)), bits(plain(*INPUTS)))
    for name, array in leaves(lora_parameters(network)).items():
        assert array.dtype == jnp.float32
        if name.endswith("up"):
            assert not array.any()
        else:  # uniform in +- inputs^-1/2
            assert 0.8 < float(jnp.max(jnp.abs(array))) * array.shape[0] ** 0.5 <= 1, name


@pytest.mark.slow
def test_nothing_changes_at_first_when_compiled():
    """In bfloat16, where a compiler may keep more digits than it is asked for."""
    network = small()
    before = apply(network, *INPUTS)
    add_lora(network, RANK, alpha=ALPHA, rngs=nnx.Rngs(0))
    assert np.array_equal(bits(apply(network, *INPUTS)), bits(before))
    assert not np.array_equal(bits(apply(randomised(network), *INPUTS)), bits(before))


@pytest.mark.slow
def test_attention_is_the_default():
    """32 layers of attention in Stable Diffusion 1, four products each: 797,184 parameters at rank 4, as peft counts."""

    def make(rngs):
        network = UNet(UNetConfig(), rngs=rngs)
        add_lora(network, 4, rngs=rngs)
        return network

    network = abstract_network(make)
    layers = {path for path, module in nnx.iter_modules(network) if isinstance(module, LoRA)}
    assert {path[-1] for path in layers} == {"to_q", "to_k", "to_v", "to_out"} and len(layers) == 4 * 32
    assert size(lora_parameters(network)) == 797_184


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_types(param_dtype):
    """The change is computed in the type of the layer's output, which it keeps."""
    x = jnp.ones((2, 5), jnp.bfloat16)
    for dtype in (None, jnp.bfloat16):
        layer = nnx.Linear(5, 4, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
        lora = LoRA(layer, jnp.ones((5, 2)), jnp.ones((2, 4)), alpha=1.0)
        assert lora(x).dtype == layer(x).dtype
        assert np.allclose(lora(x) - layer(x), 0.5 * 5 * 2, rtol=0.02)


# --- training


@pytest.mark.slow
def test_only_lora_is_trained():
    """In bfloat16, with recomputation, inside `jit`: gradients, optimiser state and updates of LoRA alone."""
    network = small()
    base_size, before = size(nnx.state(network)), network(*INPUTS)
    add_lora(network, 2, alpha=8, targets=(*ATTENTION, "proj_out"), rngs=nnx.Rngs(1))
    function, lora, base = split_lora(network)
    assert jax.tree.leaves(lora)[0] is jax.tree.leaves(lora_parameters(network))[0]
    assert size(base) == base_size
    # eight products in attention (two from the context, of width 24) and a projection, in 4 transformers
    assert size(lora) == 4 * 2 * (6 * 32 + 2 * (24 + 16) + 32)
    optimiser = optax.adam(1e-2)
    state = optimiser.init(lora)
    assert size(state) == 2 * size(lora) + 1

    def loss(lora, base):
        return jnp.mean((function(lora, base, *INPUTS) - 1) ** 2)

    constants = jax.make_jaxpr(jax.grad(loss))(lora, base).consts
    assert size(constants) <= size(INPUTS)  # base is an argument, and not written into the program

    @compiled
    def step(lora, state, base):
        value, gradients = jax.value_and_grad(loss)(lora, base)
        updates, state = optimiser.update(gradients, state)
        return optax.apply_updates(lora, updates), state, value, gradients

    values = []
    for i in range(3):
        new, state, value, gradients = step(lora, state, base)
        values.append(float(value))
        for name, gradient in leaves(gradients).items():
            assert gradient.dtype == jnp.float32
            assert gradient.any() == (i > 0 or name.endswith("up")), name  # at up = 0 nothing depends on down
        lora = new
    assert values[2] < values[1] < values[0]
    assert np.isclose(values[0], np.mean((before - 1) ** 2), rtol=0.01)  # in bfloat16
    nnx.update(network, lora)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(lora_parameters(network)), jax.tree.leaves(lora)))


@pytest.mark.slow
def test_gradients_inside_shard_map():
    """Of replicated parameters, on divided samples: the gradients of one program on all samples."""
    network = small()
    add_lora(network, 2, rngs=nnx.Rngs(1))
    function, lora, base = split_lora(randomised(network))
    whole, rows = jax.P(), jax.P("data")
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))

    def gradient(lora, base, *inputs):
        return jax.grad(lambda lora: jnp.sum(function(lora, base, *inputs) ** 2))(lora)

    divided = jax.shard_map(gradient, mesh=mesh, in_specs=(whole, whole, rows, rows, rows), out_specs=whole)
    expected, got = (leaves(compiled(f)(lora, base, *INPUTS)) for f in (gradient, divided))
    assert got.keys() == expected.keys()
    for name in got:
        assert got[name].any() and np.allclose(got[name], expected[name], rtol=1e-3, atol=1e-5), name


def test_full_fine_tuning(plain):
    function, params, base = split_full(plain)
    assert not jax.tree.leaves(base) and size(params) == size(nnx.state(plain))
    assert np.array_equal(function(params, base, *INPUTS), plain(*INPUTS))
    with pytest.raises(ValueError, match=r"network has LoRA: train it alone, split_lora\(network\)"):
        split_full(changed(plain))


# --- merging


@pytest.mark.slow
def test_merging(plain, tmp_path):
    network = changed(plain)
    with pytest.raises(ValueError, match=r"network has LoRA: merge_lora\(network\)"):
        save_network(network, tmp_path / "merged")
    output = network(*INPUTS)
    assert relative(plain(*INPUTS), output) > 0.1
    merge_lora(network)
    assert nnx.graphdef(network) == nnx.graphdef(plain)
    assert relative(network(*INPUTS), output) < GATE
    save_network(network, tmp_path / "merged")
    other = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "merged")
    assert relative(call(other, *INPUTS), output) < GATE


@pytest.mark.slow
def test_merging_rounds_once():
    """Kernels in bfloat16 become the exact sum to 8 bits, and keep their type."""
    network = small(jnp.bfloat16)
    add_lora(network, 2, alpha=8, targets=["mid_block.attentions.0.proj_in"], rngs=nnx.Rngs(1))
    lora = randomised(network).mid_block.attentions[0].proj_in
    assert isinstance(lora, LoRA)
    kernel, down, up = (np.asarray(v[...], np.float64) for v in (lora.layer.kernel, lora.down, lora.up))
    merge_lora(network)
    merged, exact = network.mid_block.attentions[0].proj_in.kernel[...], kernel + 4 * (down @ up)
    assert merged.dtype == jnp.bfloat16 and merged.shape == (1, 1, 16, 16)
    assert np.all(np.abs(np.asarray(merged, np.float64) - exact) <= (2**-8 + 2**-20) * np.abs(exact))


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rank=0), "rank=0 must be at least 1"),
        (dict(alpha=0), "alpha=0.0 must be positive"),
        (dict(targets="to_q"), r"targets='to_q' must be a sequence of strings: pass \[targets\]"),
        (dict(targets=[]), r"targets=\[\] names no layer"),
        (
            dict(targets=["to_q", "o_k"]),
            "'o_k' ends the name of no .*: take from conv_shortcut, linear_1, linear_2, net.2, .*to_out.0",
        ),
        (dict(targets=["conv1"]), "'conv1' is down_blocks.0.resnets.0.conv1, a convolution of more than one pixel"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_refused(plain, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        add_lora(plain, **(dict(rank=2, rngs=nnx.Rngs(0)) | options))
    assert not jax.tree.leaves(lora_parameters(plain))


def test_lora_that_is_missing_or_there_already(plain, tmp_path):
    for refused in (merge_lora, split_lora, lambda network: save_lora(network, tmp_path / "lora")):
        with pytest.raises(ValueError, match="network has no LoRA: add_lora"):
            refused(plain)
    with pytest.raises(ValueError, match=r"down_blocks.0.attentions.0.\S+to_q has LoRA already: merge_lora"):
        add_lora(changed(plain), 2, targets=["to_q"], rngs=nnx.Rngs(0))
    assert not (tmp_path / "lora").exists()
