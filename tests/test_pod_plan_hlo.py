"""What is read off compiled programs, against counts by hand: products, memory traffic, collectives, loops in full."""

import jax
import jax.numpy as jnp
import pytest

from experiments.pod_plan.chips import COMPILERS, describe, parse_slice
from experiments.pod_plan.hlo import Collective, Shape, account, by_kind

B, N = 32, 64


def counted(f, *shapes):
    compiled = jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile()
    return account(compiled.as_text() or "", 1)


def layer(x, w):
    return jnp.tanh(x @ w)


def scanned(x, w, length):
    return jax.lax.scan(lambda x, _: (layer(x, w), None), x, None, length=length)[0]


# --- matrix products, loops counted in full

PRODUCTS = {
    "straight": (lambda x, w: layer(layer(x, w), w), 2),
    "scan": (lambda x, w: scanned(x, w, 7), 7),
    "nested scan": (lambda x, w: jax.lax.scan(lambda x, _: (layer(scanned(x, w, 5), w), None), x, None, 3)[0], 3 * (5 + 1)),
    "while": (lambda x, w: jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, layer(c[1], w)), (2, x))[1], 7),
    "gradient of a scan": (lambda x, w: jax.grad(lambda w: jnp.sum(scanned(x, w, 4)))(w), 3 * 4),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_counted_with_their_loops(name):
    """`[32, 64] @ [64, 64]`, so many times; a gradient of a layer takes two more."""
    f, products = PRODUCTS[name]
    found = counted(f, (B, N), (N, N))
    assert found.flops == products * 2 * B * N * N
    assert found.unknown_loops == 0


def test_a_loop_of_unknown_length_is_named():
    found = counted(
        lambda x, w: jax.lax.while_loop(lambda x: jnp.sum(x) > 1.0, lambda x: layer(x, w), x), (B, N), (N, N)
    )  # fmt: skip
    assert (found.flops, found.unknown_loops) == (2 * B * N * N, 1)


CONVOLUTION = """HloModule m
ENTRY %main (a: f32[4,8,8,3], b: f32[3,3,3,5]) -> f32[4,{n},{n},5] {
  %a = f32[4,8,8,3]{3,2,1,0} parameter(0)
  %b = f32[3,3,3,5]{3,2,1,0} parameter(1)
  ROOT %c = f32[4,{n},{n},5]{3,2,1,0} convolution(%a, %b), window={size=3x3 WINDOW}, dim_labels=b01f_01io->b01f, PRECISION
}
"""


@pytest.mark.parametrize(
    ("window", "n", "pairs"),
    [
        ("", 6, 6 * 3),
        ("pad=1_1x1_1", 8, 8 * 3 - 2),
        ("stride=2x2 pad=0_1x0_1", 4, 4 * 3 - 1),
        (
            "pad=2_1x2_1 lhs_dilate=2x2",
            16,
            8 * 3 - 1,
        ),  # the gradient of the one above, entry by entry; its last row has one less
        ("pad=2_2x2_2 rhs_dilate=2x2", 8, 8 * 3 - 4),
    ],
)
def test_convolutions_count_what_is_not_padding(window, n, pairs):
    """By hand: pairs of output and window positions along an axis that meet an entry, squared."""
    text = CONVOLUTION.replace("{n}", str(n)).replace("WINDOW", window)
    found = account(text.replace("PRECISION", "operand_precision={highest,highest}"), 1)
    assert found.flops == 2 * 4 * 3 * 5 * pairs**2
    assert found.bf16_flops == 6 * found.flops


# --- memory traffic and collectives, as the compiler for TPUs writes them

TPU = """HloModule m
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %s = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,8]{1,0:T(8,128)} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[16,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={16,8}
}

%body (c: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %c = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %v = f32[64,8]{1,0:T(8,128)S(1)} get-tuple-element(%c), index=1
  %one = s32[]{:T(128)} constant(1)
  %j = s32[]{:T(128)S(6)} add(%i, %one)
  %u = f32[64,8]{1,0:T(8,128)S(1)} all-reduce(%v), replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_1'}, to_apply=%add
  ROOT %t = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)S(1)}) tuple(%j, %u)
}

%condition (c: (s32[], f32[64,8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  %n = s32[]{:T(128)} constant(24)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[64,8]) -> (f32[16,8], f32[256,8]) {
  %p = f32[64,8]{1,0:T(8,128)} parameter(0)
  %four = s32[]{:T(128)} constant(4)
  %start = s32[]{:T(128)S(6)} copy(%four)
  %copy-start = (f32[64,8]{1,0:T(8,128)S(1)}, f32[64,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[64,8]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %init = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)S(1)}) tuple(%start, %copy-done)
  %while = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)S(1)}) while(%init), condition=%condition, body=%body
  %v = f32[64,8]{1,0:T(8,128)S(1)} get-tuple-element(%while), index=1
  %scattered = f32[16,8]{1,0:T(8,128)S(1)} fusion(%v), kind=kCustom, calls=%all-reduce-scatter
  %gathered = f32[256,8]{1,0:T(8,128)S(1)} all-gather(%v), replica_groups=[4,4]<=[16], dimensions={0}
  ROOT %t = (f32[16,8]{1,0:T(8,128)S(1)}, f32[256,8]{1,0:T(8,128)S(1)}) tuple(%scattered, %gathered)
}
"""


def test_collectives_of_a_program_for_tpus():
    """Twenty rounds, from 4 to 24; a sum of which every chip keeps a part is a scatter; a gather counts what it gathers."""
    found = account(TPU, 16)
    part = 4 * 64 * 8
    expected = [("all-reduce", part, 8, 20), ("reduce-scatter", part, 4, 1), ("all-gather", 4 * part, 4, 1)]
    assert sorted(found.collectives) == sorted(Collective(*v) for v in expected)
    assert by_kind(found.collectives)["all-reduce"] == {"count": 20, "bytes": 20 * part}
    assert found.unknown_loops == 0


CHAIN = """HloModule m
%first (a: bf16[64,256]) -> bf16[256,256] {
  %a = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=5, GROUPS, dimensions={0}, frontend_attributes={chain_id="7"}
}

%second (b: bf16[64,256]) -> bf16[256,256] {
  %b = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %h = bf16[256,256]{1,0:T(8,128)(2,1)} all-gather(%b), channel_id=5, GROUPS, dimensions={0}, frontend_attributes={chain_id="7"}
}

ENTRY %main (p: bf16[64,256]) -> bf16[256,256] {
  %p = bf16[64,256]{1,0:T(8,128)(2,1)} parameter(0)
  %begun = bf16[256,256]{1,0:T(8,128)(2,1)} fusion(%p), kind=kLoop, calls=%first
  ROOT %done = bf16[256,256]{1,0:T(8,128)(2,1)} fusion(%p), kind=kLoop, calls=%second
}
"""


def test_a_collective_spread_over_fusions_counts_once():
    """In groups of four, written with the order of the devices. Two that are not of one chain are two, also on one channel."""
    groups = "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_0'}"
    expected = Collective("all-gather", 2 * 256 * 256, 4, 1)
    text = CHAIN.replace("GROUPS", groups)
    assert account(text, 16).collectives == [expected]
    assert account(text.replace('chain_id="7"', "", 1), 16).collectives == [expected] * 2


def test_memory_traffic_is_that_with_hbm():
    """The one transfer of `p` to the chip, and scalars: where the loop starts, its counter and its condition. All else stays there."""
    assert account(TPU, 16).hbm_bytes == 4 * 64 * 8 + 4 + 20 * (4 + 4) + 20 * (4 + 4 + 1)
    assert Shape("f32", (1536, 8, 8), "2,1,0:T(8,128)").hbm_bytes == 1536 * 8 * 128 * 4
    assert Shape("bf16", (100, 256), "0,1:T(8,128)(2,1)").hbm_bytes == 128 * 256 * 2
    assert Shape("pred", (7,), "0").hbm_bytes == 7


GPU = """HloModule m
ENTRY %main (x: bf16[4,8,8,3], w: bf16[5,3,3,3], a: bf16[6,10], b: bf16[10,7], q: bf16[2,16,8,4], k: bf16[2,12,8,4]) -> bf16[6,7] {
  %x = bf16[4,8,8,3]{3,2,1,0} parameter(0)
  %w = bf16[5,3,3,3]{3,2,1,0} parameter(1)
  %a = bf16[6,10]{1,0} parameter(2)
  %b = bf16[10,7]{1,0} parameter(3)
  %q = bf16[2,16,8,4]{3,2,1,0} parameter(4)
  %k = bf16[2,12,8,4]{3,2,1,0} parameter(5)
  %y = (bf16[4,8,8,5]{3,2,1,0}, u8[64]{0}) custom-call(%x, %w), LABELS, custom_call_target="__cudnn$convForward"
  %z = bf16[4,8,8,5]{3,2,1,0} get-tuple-element(%y), index=0
  %dx = (bf16[4,8,8,3]{3,2,1,0}, u8[0]{0}) custom-call(%z, %w), LABELS, custom_call_target="__cudnn$convBackwardInput"
  %dw = (bf16[5,3,3,3]{3,2,1,0}, u8[0]{0}) custom-call(%x, %z), LABELS, custom_call_target="__cudnn$convBackwardFilter"
  %h = (bf16[2,8,16,4]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  %g = bf16[2,8,16,4]{3,1,2,0} get-tuple-element(%h), index=0
  %dh = (bf16[2,8,16,4]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k, %g), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  %other = (bf16[6,10]{1,0}, u8[0]{0}) custom-call(%a), custom_call_target="__other"
  ROOT %c = bf16[6,7]{1,0} custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{DIMENSIONS}}
}
"""


def test_products_of_libraries_for_gpus():
    """A convolution and its two gradients take the same, padding included; attention has two products of `n m d`, its gradient five.
    Each reads its operands and writes its results."""
    text = GPU.replace("LABELS", "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f")
    text = text.replace(
        "DIMENSIONS", '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}'
    )
    found = account(text, 1)
    assert found.flops == 3 * 2 * (4 * 8 * 8) * 9 * 3 * 5 + 2 * 6 * 10 * 7 + (2 + 5) * 2 * (2 * 8) * (16 * 12 * 4)
    x, w, y = 2 * 4 * 8 * 8 * 3, 2 * 9 * 3 * 5, 2 * 4 * 8 * 8 * 5
    q, k = 2 * 2 * 16 * 8 * 4, 2 * 2 * 12 * 8 * 4
    assert found.hbm_bytes == 3 * (x + w + y) + 64 + 2 * (60 + 70 + 42) + (2 * q + 2 * k) + (3 * q + 2 * k)


@pytest.mark.slow
def test_a_program_for_a_gpu_does_what_it_says():
    """Products of matrices and a convolution with its gradients, compiled for a GPU that is not there."""
    pytest.importorskip("jax_cuda12_plugin", reason="needs the compiler for GPUs: pip install 'jax[cuda12]'")
    where = parse_slice("topology", "h100:1")
    sharding = jax.sharding.SingleDeviceSharding(describe(where)[0])
    shapes = (4, 16, 16, 32), (3, 3, 32, 64), (48, 80), (80, 96)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]

    def f(x, w, a, b):
        y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.sum(jnp.tanh(y)) + jnp.sum(jnp.tanh(a @ b))

    compiled = jax.jit(jax.grad(f, (0, 1, 2, 3))).lower(*arguments).compile(COMPILERS["cuda"].options)
    found = account(compiled.as_text() or "", 1)
    assert found.flops == 3 * 2 * (4 * 16 * 16) * 9 * 32 * 64 + 3 * 2 * 48 * 80 * 96


def test_collectives_of_a_compiled_program():
    """On the devices that there are."""
    mesh = jax.make_mesh((jax.device_count(),), ("x",), (jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    summed = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    text = summed.lower(jax.ShapeDtypeStruct((8 * jax.device_count(), 128), jnp.float32, sharding=sharding)).compile().as_text()
    expected = [] if jax.device_count() == 1 else [Collective("all-reduce", 4 * 128, jax.device_count(), 1)]
    assert account(text or "", jax.device_count()).collectives == expected
