"""Plans for TPU slices and GPUs: what is read off compiled programs against counts by hand, and the digits compiled for a small slice."""

import json
import os
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments import pod_plan, pod_plan_chips
from experiments.pod_plan_chips import (
    CHIPS,
    COMPILERS,
    ENVIRONMENT,
    HOP_SECONDS,
    collective_seconds,
    describe,
    parse_slice,
    usual_slices,
)
from experiments.pod_plan_hlo import Collective, Shape, account, by_kind

ROOT = Path(__file__).resolve().parent.parent
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


def test_seconds_by_hand():
    """A link of v5e carries 50 GB/s one way. In 4x4 a corner has two and the opposite corner is six hops away; in 16x16 sides are
    closed: four links, sixteen hops; a box of v5p smaller than 4x4x4 has ends. Half of a square holds half of the pairs twice over:
    of `b` bytes per chip `n b / 4` cross its middle, which `n / side` links do one way."""
    number = 200_000_000
    slices = [("v5e:4x4", 2, 6, 4), ("v5e:16x16", 4, 16, 8), ("v5e:8x16", 3, 15, 8), ("v5e:2x2", 2, 2, 2)]
    for name, links, hops, side in slices:
        where = parse_slice("topology", name)
        n = where.chips
        gather = (n - 1) / n * number / (links * 50e9) + hops * HOP_SECONDS
        assert collective_seconds(Collective("all-gather", number, n, 1), where) == pytest.approx(gather)
        assert collective_seconds(Collective("all-reduce", number, n, 1), where) == pytest.approx(2 * gather)
        exchange = (n * number / 4) / (n / side * 50e9) + hops * HOP_SECONDS
        assert collective_seconds(Collective("all-to-all", number, n, 1), where) == pytest.approx(exchange)
        assert collective_seconds(Collective("collective-permute", number, n, 1), where) == pytest.approx(4e-3 + HOP_SECONDS)
        assert collective_seconds(Collective("all-reduce", number, 1, 1), where) == 0
    switched = parse_slice("topology", "h100:8")  # every GPU reaches every other by its own link to the switch
    assert collective_seconds(Collective("all-to-all", number, 8, 1), switched) == pytest.approx(
        7 / 8 * number / 450e9 + HOP_SECONDS
    )
    sizes = {"v5p:2x2x1": (2, 2), "v5p:2x4x4": (3, 7), "v5p:4x4x4": (6, 6), "v4:4x4x8": (6, 8)}
    for name, expected in sizes.items():
        where = parse_slice("topology", name)
        assert (where.links, where.hops) == expected, name


# --- slices


def test_slices_are_checked():
    assert parse_slice("topology", "v5p:2x2x4").chips == 16
    for text, message in {
        "v5e": "must be a generation",
        "v3:2x2": "must be a generation",
        "v4:4x4": "a slice of v4 has 3 sides",
        "v5e:3x3": "the first two even",
        "h100:2x2": "a machine has 1 to 8 GPUs",
        "h100:9": "a machine has 1 to 8 GPUs",
    }.items():
        with pytest.raises(ValueError, match=f"topology='{text}'.*{message}"):
            parse_slice("topology", text)


@pytest.mark.parametrize("name", CHIPS)
def test_usual_slices_double(name):
    slices = usual_slices(CHIPS[name])
    assert [v.chips for v in slices] == ([1, 2, 4, 8] if name == "h100" else [4, 8, 16, 32, 64, 128, 256])
    assert all(parse_slice("slices", v.name) == v for v in slices)


def test_without_a_compiler_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(pod_plan_chips.importlib.util, "find_spec", lambda name: None)
    assert pod_plan.main(["--topology", "v5e:2x2"]) == 1
    assert "libtpu is not installed" in (error := capsys.readouterr().err) and "'.[experiments,tpu]'" in error
    assert pod_plan.main(["--topology", "h100:1"]) == 1
    assert "jax_cuda12_plugin is not installed" in (error := capsys.readouterr().err) and "'jax[cuda12]'" in error
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(text.startswith("jax[tpu]") for text in extras["tpu"])


# --- the search for the largest batch


@pytest.mark.parametrize("largest", [0, 1, 2, 5, 11])
def test_the_largest_batch_is_found(largest):
    """Memory that grows by lines, which the compiler refuses beyond twice what there is."""
    tried = []

    def cell(batch):
        tried.append(batch)
        peak = 1000 + 7 * batch
        return {"peak_bytes": peak if peak < 4000 + 14 * 64 * 2**largest else None, "hbm_bytes": 1000 + 7 * 64 * 2**largest + 5}

    found = pod_plan.largest_batch(cell, 64, 2**31 - 1, 8)
    assert found["largest_batch"] == 64 * 2**largest and not found["is_lower_bound"]
    assert len(tried) == len(set(tried)) <= 6


def test_a_search_that_ends_early_says_so():
    found = pod_plan.largest_batch(lambda batch: {"peak_bytes": batch, "hbm_bytes": 2**60}, 64, 2**12, 9)
    assert found["largest_batch"] == 2**12 and found["is_lower_bound"]
    assert pod_plan.largest_batch(lambda batch: {"peak_bytes": 2, "hbm_bytes": 1}, 64, 2**12, 9)["largest_batch"] is None
    assert pod_plan.largest_batch(lambda batch: {}, 64, 2**12, 0)["largest_batch"] is None


# --- an interrupted plan


def a_row(case, where, fsdp, batch):
    """What `compile_all` returns, with made-up numbers: more chips, more time."""
    names = ("parameter_bytes", "reference_bytes", "value_parameter_bytes", "optimizer_bytes", "value_optimizer_bytes")
    names += ("flops", "hbm_traffic_bytes", "product_seconds", "hbm_seconds", "collective_seconds", "compile_seconds")
    names += ("lower_seconds", "unknown_loops")
    row = {"slice": where.name, "chips": where.chips, "batch": batch, "hbm_bytes": where.chip.usable}
    row |= {"peak_bytes": 2**20 * batch, "peak_program": "update", "programs": {}, "collectives": {}}
    return row | dict.fromkeys(names, 1) | {"seconds": 1.0 + where.chips / 64}


def test_an_interrupted_plan_keeps_what_is_finished(tmp_path, monkeypatch):
    """Stopped while the third of four slices is compiled: the same command compiles that one and the next; other settings are refused."""
    compiled = []

    def compile_all(case, where, fsdp, batch):
        if where.name == "v5e:4x8" and compiled.count(where.name) == 0:
            compiled.append(where.name)
            raise KeyboardInterrupt
        compiled.append(where.name)
        return a_row(case, where, fsdp, batch)

    monkeypatch.setattr(pod_plan, "describe", lambda where: [])
    monkeypatch.setattr(pod_plan, "compile_all", compile_all)
    args = ["--topology", "v5e:4x4", "--batch", "512", "--compiles", "0", "--out", str(tmp_path / "plan")]
    args += ["--slices", "v5e:2x2", "v5e:4x4", "v5e:4x8", "v5e:8x8"]
    with pytest.raises(KeyboardInterrupt):
        pod_plan.main(args)
    assert compiled == ["v5e:4x4", "v5e:2x2", "v5e:4x8"]
    assert pod_plan.main(args) == 0
    assert compiled == ["v5e:4x4", "v5e:2x2", "v5e:4x8", "v5e:4x8", "v5e:8x8"]
    metrics = json.loads((tmp_path / "plan" / "metrics.json").read_text())
    weak = metrics["weak_scaling"]
    assert [(row["chips"], row["batch"]) for row in weak] == [(4, 128), (16, 512), (32, 1024), (64, 2048)]
    assert [row["efficiency"] for row in weak] == pytest.approx([1.0625 / (1 + row["chips"] / 64) for row in weak])
    assert (tmp_path / "plan" / "pod_plan.png").read_bytes()[:4] == b"\x89PNG"
    assert pod_plan.main([*args, "--fsdp", "2"]) == 1  # in the same folder


# --- the real programs


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The digits on four chips, at half their batch."""
    pytest.importorskip("libtpu", reason="needs libtpu, the compiler for TPUs: the extra `tpu`")
    out = tmp_path_factory.mktemp("plan")
    before = dict(os.environ)
    config = pod_plan.Config(topology="v5e:2x2", out=out, slices=("v5e:2x2",), compiles=0, batch=256)
    pod_plan.run(config)
    assert dict(os.environ) == before
    return config


@pytest.mark.slow
def test_digits_on_four_chips(plan, monkeypatch):
    metrics = json.loads((plan.out / "metrics.json").read_text())
    assert 0 < metrics["peak_bytes"] < metrics["hbm_bytes"]
    for name in ("parameter_bytes", "optimizer_bytes", "flops", "hbm_traffic_bytes", "seconds", "collective_seconds"):
        assert metrics[name] > 0, name
    assert metrics["unknown_loops"] == 0
    weights = 64 * 256 + 256 * 256 + 3 * (256 * 256 + 256 * 512 + 256 * 256) + 256 * 64
    assert metrics["programs"]["collect"]["flops"] == 24 * (256 // 4) * 2 * weights  # one evaluation per path and interval
    sums = [c for c in metrics["programs"]["update"]["collectives"] if c["bytes"] > 1024]
    size = metrics["parameter_bytes"] + metrics["value_parameter_bytes"]
    assert [(c["kind"], c["chips"], c["times"]) for c in sums] == [("all-reduce", 4, 1)]
    assert size <= sums[0]["bytes"] < 1.01 * size
    assert (plan.out / "pod_plan.png").exists() and "| v5e:2x2 | 256 |" in (plan.out / "table.md").read_text()

    monkeypatch.setattr(pod_plan, "lower", None)  # a repeated run compiles nothing
    assert pod_plan.run(plan)["peak_bytes"] == metrics["peak_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, chip in CHIPS.items() if chip.platform == "tpu"])
def test_memory_is_what_the_compiler_says(name):
    """A program with an argument larger than the memory of a chip is refused, with what there is, GiB."""
    pytest.importorskip("libtpu", reason="needs libtpu, the compiler for TPUs: the extra `tpu`")
    chip = CHIPS[name]
    device = describe(usual_slices(chip)[0])[0]
    x = jax.ShapeDtypeStruct((chip.hbm // 4, 2), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refused:
        jax.jit(lambda x: x + 1).lower(x).compile()
    assert f"{chip.usable / 2**30:.2f}G" in str(refused.value)


def test_describing_a_slice_leaves_the_environment_alone():
    pytest.importorskip("libtpu", reason="needs libtpu, the compiler for TPUs: the extra `tpu`")
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    assert len(describe(parse_slice("topology", "v4:2x2x1"))) == 4
    assert {name: os.environ.get(name) for name in ENVIRONMENT} == before
