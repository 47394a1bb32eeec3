"""Plans for TPU slices and GPUs: least times by hand, the search for a batch, and the digits compiled for a small slice."""

import json
import os
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.commandline import INTERRUPTED
from experiments.pod_plan import chips as pod_plan_chips, plan as pod_plan
from experiments.pod_plan.__main__ import main
from experiments.pod_plan.chips import (
    CHIPS,
    ENVIRONMENT,
    HOP_SECONDS,
    collective_seconds,
    describe,
    parse_slice,
    usual_slices,
)
from experiments.pod_plan.hlo import Collective

ROOT = Path(__file__).resolve().parent.parent


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
    assert main(["--topology", "v5e:2x2"]) == 1
    assert "libtpu is not installed" in (error := capsys.readouterr().err) and "'.[experiments,tpu]'" in error
    assert main(["--topology", "h100:1"]) == 1
    assert "jax_cuda12_plugin is not installed" in (error := capsys.readouterr().err) and "'jax[cuda12]'" in error
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(text.startswith("jax[tpu]") for text in extras["tpu"])


# --- how hard the compiler tries


def test_a_low_effort_is_for_the_plan_alone():
    """What XLA is told is what it was told before, also after an error."""
    before = jax.config.jax_optimization_level, jax.config.jax_memory_fitting_level
    with pytest.raises(KeyError), pod_plan.compiling_with("low"):
        assert (jax.config.jax_optimization_level, jax.config.jax_memory_fitting_level) == ("O1", "O0") != before
        raise KeyError
    with pod_plan.compiling_with("full"):
        assert (jax.config.jax_optimization_level, jax.config.jax_memory_fitting_level) == before
    assert (jax.config.jax_optimization_level, jax.config.jax_memory_fitting_level) == before


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
    assert main(args) == INTERRUPTED
    assert compiled == ["v5e:4x4", "v5e:2x2", "v5e:4x8"]
    assert main(args) == 0
    assert compiled == ["v5e:4x4", "v5e:2x2", "v5e:4x8", "v5e:4x8", "v5e:8x8"]
    metrics = json.loads((tmp_path / "plan" / "metrics.json").read_text())
    weak = metrics["weak_scaling"]
    assert [(row["chips"], row["batch"]) for row in weak] == [(4, 128), (16, 512), (32, 1024), (64, 2048)]
    assert [row["efficiency"] for row in weak] == pytest.approx([1.0625 / (1 + row["chips"] / 64) for row in weak])
    assert (tmp_path / "plan" / "pod_plan.png").read_bytes()[:4] == b"\x89PNG"
    assert main([*args, "--fsdp", "2"]) == 1  # in the same folder


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
    assert metrics["programs"]["sample"]["flops"] == 24 * (256 // 4) * 2 * weights  # one evaluation per path and interval
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
