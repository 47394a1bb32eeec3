"""Convolutions whose gradients XLA has fast code for, in loops on CPUs."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import ctrl_diffusion as cd
from ctrl_diffusion import stable_diffusion as sd

NHWC = ("NHWC", "HWIO", "NHWC")
FAST = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"  # the order of axes that XLA has fast code for on CPUs
WINDOWS = {
    "3x3": (3, 1, ((1, 1), (1, 1))),
    "strided": (3, 2, ((0, 1), (0, 1))),
    "strided, by name": (3, 2, "SAME"),
    "1x1": (1, 1, "VALID"),
    "uneven": (4, 3, ((2, 0), (1, 3))),
}


def orders(function, *arguments, platform="cpu"):
    """Of all convolutions in the program, sorted."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return sorted(re.findall(r"dim_numbers = (\[.*?\]x\[.*?\]->\[.*?\])", lowered.as_text()))


def normal(i, *shape):
    return jax.random.normal(jax.random.key(i), shape)


def derivatives(convolution, x, kernel, dx, d_kernel, stride, padding):
    """Values and derivatives of the first and second order, forwards and backwards, of one and of several at a time."""

    def f(x, kernel):
        return jnp.sin(convolution(x, kernel, (stride, stride), padding, dimension_numbers=NHWC))

    def g(x, kernel):
        return jnp.sum(f(x, kernel) ** 3)

    gradient, both = jax.grad(g, (0, 1)), (jnp.stack([x, dx]), jnp.stack([kernel, d_kernel]))
    return {
        "value": f(x, kernel),
        "forwards": jax.jvp(f, (x, kernel), (dx, d_kernel))[1],
        "forwards in x": jax.jvp(lambda x: f(x, kernel), (x,), (dx,))[1],
        "forwards in kernel": jax.jvp(lambda kernel: f(x, kernel), (kernel,), (d_kernel,))[1],
        "backwards": gradient(x, kernel),
        "forwards over backwards": jax.jvp(gradient, (x, kernel), (dx, d_kernel))[1],
        "backwards over backwards": jax.grad(lambda *v: jnp.vdot(jax.grad(g, 1)(*v), d_kernel), (0, 1))(x, kernel),
        "images": jax.vmap(gradient, (0, None))(both[0], kernel),
        "kernels": jax.vmap(gradient, (None, 0))(x, both[1]),
        "both": jax.vmap(gradient)(*both),
        "jacobian": jax.jacrev(f, 1)(x[:1], kernel),
    }


@pytest.mark.parametrize("window", WINDOWS)
def test_values_and_derivatives_are_those_of_jax(window):
    size, stride, padding = WINDOWS[window]
    with jax.enable_x64(True):
        x, kernel, dx, d_kernel = (
            normal(0, 3, 9, 7, 5),
            normal(1, size, size, 5, 4),
            normal(2, 3, 9, 7, 5),
            normal(3, size, size, 5, 4),
        )
        arguments, how = (x, kernel, dx, d_kernel), dict(stride=stride, padding=padding)
        ours, exact = (jax.jit(partial(derivatives, c, **how))(*arguments) for c in (cd.convolution, lax.conv_general_dilated))
        for name, values in exact.items():  # sums of some hundred terms in another order
            for a, b in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(values), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * float(jnp.max(jnp.abs(b))), err_msg=name)


@pytest.mark.parametrize(("rank", "order"), [(1, ("NWC", "WIO", "NWC")), (3, ("NDHWC", "DHWIO", "NDHWC"))])
def test_in_one_and_three_dimensions(rank, order):
    x, kernel = normal(0, 2, *(5, 4, 6)[:rank], 3), normal(1, *(3, 2, 3)[:rank], 3, 4)

    def gradient(convolution):
        def loss(*v):
            return jnp.sum(jnp.sin(convolution(*v, (1,) * rank, "SAME", dimension_numbers=order)))

        return jax.grad(loss, (0, 1))

    for a, b in zip(gradient(cd.convolution)(x, kernel), gradient(lax.conv_general_dilated)(x, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    labels = orders(gradient(cd.convolution), x, kernel)
    assert len(set(labels)) == 1 and len(labels) == 3  # value and both gradients
    assert len(set(orders(gradient(lax.conv_general_dilated), x, kernel))) == 3


def gradients_in_a_loop(convolution, stride=1):
    """`(xs [k, b, h, w, c], kernel) -> gradients`, of one batch after the other."""

    def loss(x, kernel):
        y = convolution(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=NHWC)
        return jnp.sum(jnp.tanh(y) ** 2)

    return lambda xs, kernel: lax.map(lambda x: jax.grad(loss, (0, 1))(x, kernel), xs)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_a_loop_have_the_order_of_axes_that_is_fast_on_cpus(stride):
    shapes = jax.ShapeDtypeStruct((3, 2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)
    assert orders(gradients_in_a_loop(cd.convolution, stride), *shapes) == [FAST] * 3
    assert orders(gradients_in_a_loop(lax.conv_general_dilated, stride), *shapes).count(FAST) == 1
    compiled = jax.jit(gradients_in_a_loop(cd.convolution, stride)).lower(*shapes).compile().as_text()
    assert set(re.findall(r" convolution\(.*dim_labels=(\S+?)[,\s]", compiled)) == {"b01f_01io->b01f"}
    assert "conditional" not in compiled


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_devices_have_the_program_of_jax(platform):
    shapes = jax.ShapeDtypeStruct((3, 2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)
    ours, theirs = (gradients_in_a_loop(convolution) for convolution in (cd.convolution, lax.conv_general_dilated))
    assert orders(ours, *shapes, platform=platform) == orders(theirs, *shapes, platform=platform)


def test_a_derivative_in_one_argument_computes_one_convolution_and_the_value():
    """Frozen kernels, as under LoRA, and images that are data, have no gradient."""
    x, kernel = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 4, 6)

    def loss(x, kernel):
        return jnp.sum(cd.convolution(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC) ** 2)

    for of_one, v in ((lambda x: loss(x, kernel), x), (lambda kernel: loss(x, kernel), kernel)):
        assert len(orders(jax.grad(of_one), v)) == 2
        assert len(orders(partial(jax.jvp, of_one), (v,), (v,))) == 2


def test_what_is_kept_for_the_gradient_are_the_arguments():
    x, kernel = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 4, 6)

    def kept(convolution):
        _, pullback = jax.vjp(lambda *v: convolution(*v, (1, 1), "SAME", dimension_numbers=NHWC), x, kernel)
        return sorted(v.shape for v in jax.tree.leaves(pullback))

    assert kept(cd.convolution) == kept(lax.conv_general_dilated) == sorted([x.shape, kernel.shape])


@pytest.mark.parametrize(
    "options",
    [
        dict(feature_group_count=2),
        dict(rhs_dilation=(2, 2)),
        dict(lhs_dilation=(2, 1)),
        dict(dimension_numbers=("NCHW", "OIHW", "NCHW")),
        dict(preferred_element_type=jnp.float64),
    ],
    ids=str,
)
def test_what_is_not_as_usual_is_jax_s_own(options):
    x, kernel = normal(0, 2, 8, 8, 8), normal(1, 3, 3, 8 // options.get("feature_group_count", 1), 6)
    if options.get("dimension_numbers"):
        kernel = jnp.transpose(kernel, (3, 2, 0, 1))
    options = dict(dimension_numbers=NHWC) | options

    def gradient(convolution):
        return jax.grad(lambda *v: jnp.sum(convolution(*v, (1, 1), ((1, 0), (0, 1)), **options) ** 2), (0, 1))

    with jax.enable_x64(True):
        ours, theirs = (jax.make_jaxpr(gradient(c))(x, kernel) for c in (cd.convolution, lax.conv_general_dilated))
    assert str(ours) == str(theirs) and "custom_jvp" not in str(ours)


def test_bfloat16_is_rounded_as_by_jax():
    x, kernel = normal(0, 2, 8, 8, 4).astype(jnp.bfloat16), normal(1, 3, 3, 4, 6).astype(jnp.bfloat16)

    def gradient(convolution):
        options = dict(dimension_numbers=NHWC)
        return jax.grad(lambda *v: jnp.sum(convolution(*v, (1, 1), "SAME", **options).astype(jnp.float32) ** 2), (0, 1))

    for a, b in zip(gradient(cd.convolution)(x, kernel), gradient(lax.conv_general_dilated)(x, kernel), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2**-6, atol=2**-6 * float(jnp.max(jnp.abs(b)))
        )


def test_precision_is_that_of_where_the_value_is_computed():
    """Asked for, or by default at that time; gradients have it, too, also if they are asked for later."""
    x, kernel = normal(0, 2, 8, 8, 4), normal(1, 3, 3, 4, 6)

    def pullback(precision, default):
        @jax.checkpoint  # differentiated when the default is another one again
        def f(x, kernel):
            with jax.default_matmul_precision(default):
                return cd.convolution(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, precision=precision)

        return jax.jit(lambda x, kernel: jax.vjp(f, x, kernel)[1](f(x, kernel)))

    for precision, default in ((lax.Precision.HIGHEST, None), (None, "float32")):
        text = pullback(precision, default).lower(x, kernel).as_text()
        assert len(re.findall("#stablehlo<precision HIGHEST>, #stablehlo<precision HIGHEST>", text)) == text.count(
            "stablehlo.convolution"
        )


def unet_loss(network, x):
    t, context = jnp.zeros(x.shape[0]), jnp.zeros((x.shape[0], 3, network.config.cross_attention_dim))
    return jnp.sum(network(x, t, context) ** 2)


TINY = dict(block_out_channels=(8, 16), norm_num_groups=4)
NETWORKS = {
    "UNet": (
        lambda rngs: sd.UNet(
            sd.UNetConfig(
                **TINY, layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            ),
            rngs=rngs,
        ),
        unet_loss,
        (2, 8, 8, 4),
    ),
    "VAE": (
        lambda rngs: sd.VAE(
            sd.VAEConfig(
                **TINY, layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
            ),
            rngs=rngs,
        ),
        lambda network, x: jnp.sum(network.decode(network.encode(x).mean) ** 2),
        (2, 8, 8, 3),
    ),
    "LatentValue": (
        lambda rngs: sd.LatentValue(4, 3, width=8, depth=2, rngs=rngs),
        lambda network, x: jnp.sum(network(x, jnp.zeros(x.shape[0]), jnp.zeros(x.shape[0], int))),
        (2, 8, 8, 4),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_this_library_use_it(name):
    make, loss, shape = NETWORKS[name]
    graphdef, params = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def in_a_loop(params, xs):
        return lax.map(lambda x: jax.grad(lambda *v: loss(nnx.merge(graphdef, v[0]), v[1]), (0, 1))(params, x), xs)

    found = orders(in_a_loop, params, jax.ShapeDtypeStruct((2, *shape), jnp.float32))
    assert len(found) >= 9 and set(found) == {FAST}
