"""The benchmark compares like with like: the same samples, loss and gradient on every side, or nothing is timed."""

import builtins
import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.benchmark import comparison as benchmark, text_to_image as benchmark_text_to_image
from experiments.benchmark.check import check, exact
from experiments.benchmark.floor import SIDE, floor, large_product, operations
from experiments.benchmark.unet import TIMESTEPS, coefficients, make_task, predict, sampled

TINY = benchmark.Config(batch=4, steps=3, minibatches=2, channels=(8,), repeats=2, pause=0.0, compiled=False, gradient=False)
TORCH = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("diffusers") is not None


@pytest.fixture(scope="module")
def task():
    return make_task(TINY.batch, TINY.steps, TINY.minibatches, TINY.channels)


@pytest.fixture(scope="module")
def reference(task):
    return exact(task, TINY.batch)


@pytest.mark.slow
def test_all_sides_are_checked_timed_and_drawn(task, reference, tmp_path, monkeypatch):
    """On a task that was made and solved before."""
    monkeypatch.setattr(benchmark, "make_task", lambda *sizes: task)
    monkeypatch.setattr(benchmark, "exact", lambda made, paths: reference if made is task and paths == TINY.batch else None)
    metrics = benchmark.run(dataclasses.replace(TINY, out=tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert Image.open(tmp_path / "out" / "benchmark.png").width > 1000
    ours, scan, eager, compiled = metrics["sides"]
    for row in (ours, scan, *([eager] if TORCH else [])):
        assert row["reason"] == "" and row["update_samples_per_second"][0] > 0
        assert 0 < row["rollout_share_of_peak"][0] < 1 and 0 < row["update_share_of_peak"][0] < 1
        for what in ("samples", "loss", "gradient"):
            assert 0 < row[f"{what}_error"] <= row[f"{what}_tolerance"] < 0.05
    assert compiled["rollout_seconds"] is None and compiled["reason"]
    assert all(metrics[name] is None or metrics[name] > 0 for name in benchmark.TARGETS)
    assert (metrics["rollout_speedup_over_torch"] is not None) == TORCH
    assert metrics["transitions_per_update"] == 6 and (not TORCH or metrics["torch_threads"] >= 1)
    assert "% of peak)" in benchmark.summary(metrics)


@pytest.mark.slow
def test_rows_and_ratios_are_put_to_use(task):
    """The policies differ, so that ratios, clip and KL penalty all take part in the loss that is compared."""
    learned, metrics = benchmark.our_update(task)(0)
    assert len(learned) == 5
    assert 0.02 < float(metrics["clip_fraction"]) < 0.9
    penalty = task.objective.step_penalty(
        task.objective.kl_scales[0], *(task.recorded.rows.a_old[:1], task.recorded.rows.a_ref[:1])
    )
    assert float(penalty[0]) > 0


@pytest.mark.slow
def test_a_pass_is_its_updates_and_is_timed_as_one_of_them(task, monkeypatch):
    one, whole = benchmark.our_update(task), benchmark.our_pass(task)
    apart = [one(i) for i in range(TINY.minibatches)][-1][0]
    together = whole(0)[0]
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    side = benchmark.Side(benchmark.OURS)
    side.sample, side.update, side.updates_per_call = lambda: None, lambda i: None, 8
    monkeypatch.setattr(benchmark, "interleaved", lambda calls, *args: [[4.0] for _ in calls])
    benchmark.measure([side], TINY, {"rollout": 1.0, "update": 1.0})
    assert side.seconds == {"rollout": [4.0], "update": [0.5]}


@pytest.mark.slow
def test_a_side_that_computes_something_else_is_refused(task, reference):
    """Samples of coefficients that are off by a hundredth; a loss and a gradient that are off by as much."""
    right = coefficients(task.process, task.objective.sampler.ts)
    run = sampled(predict(task.graphdef), right._replace(keep=1.01 * right.keep), TINY.batch)
    samples = run(task.behaviour, task.recorded.key)[0][-1]
    scaled = jax.tree.map(lambda v: 1.01 * v, reference.gradient)
    for what, *results in (
        ("samples", samples, reference.loss, reference.gradient),
        ("loss", reference.samples, 1.01 * reference.loss, reference.gradient),
        ("gradient", reference.samples, reference.loss, scaled),
    ):
        with pytest.raises(ValueError, match=f"lax.scan by hand: the error of the {what} is"):
            check(benchmark.SCAN, reference, reference.tolerance, *results)


@pytest.mark.slow
def test_without_torch_its_rows_say_so(task, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "torch" or name == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(__import__("sys").modules, "experiments.benchmark.pytorch", raising=False)
    monkeypatch.delattr("experiments.benchmark.pytorch", raising=False)
    sides, about = benchmark.torch_sides(TINY, task, None, None, None)
    assert [side.reason for side in sides] == ["torch is not installed: pip install 'ctrl-diffusion[benchmark]'"] * 2
    assert about == {"torch": None, "torch_threads": None}
    sides, _ = benchmark.torch_sides(dataclasses.replace(TINY, torch=False), task, None, None, None)
    assert sides[0].reason == "left out by --no-torch"


def test_ratios_are_those_of_rounds():
    calls: list[str] = []
    times = benchmark.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], repeats=3)
    assert "".join(calls) == "abbaabbaab" and [len(found) for found in times] == [3, 3]
    ours, scan, eager, compiled = (benchmark.Side(name) for name in "abcd")
    for side, seconds in zip(
        (ours, scan, eager, compiled), ([1.0, 10.0, 2.0], [1.0, 5.0, 4.0], [9.0, 90.0, 9.0], [3.0, 20.0, 8.0])
    ):
        side.seconds = {"rollout": seconds, "update": seconds}
    found = benchmark.compared([ours, scan, eager, compiled])
    assert found["rollout_ratio_to_scan"] == 1.0 and found["rollout_ratio_to_scan_quartiles"] == [0.75, 1.5]
    assert found["update_speedup_over_torch"] == 3.0 and found["update_faster_torch"] == "d"  # 3/1, 20/10, 8/2
    assert benchmark.compared([ours, scan])["update_speedup_over_torch"] is None


@pytest.mark.slow
def test_the_floor_is_the_operations_at_the_rate_of_a_product(task):
    assert operations(jnp.matmul, jnp.ones((3, 5)), jnp.ones((5, 7))) == 2 * 3 * 5 * 7
    product, size = large_product()
    assert size == operations(jnp.matmul, product(), product()) == 2 * SIDE["cpu"] ** 3
    assert floor(10.0, [1.0, 2.0], 20.0) == [0.5, 1.0]
    once = benchmark.count(task, coefficients(task.process, task.objective.sampler.ts))
    network = jax.tree.leaves(task.params)
    pixels = max(leaf.size for leaf in network)  # of the largest kernel: it is used at least once a row and step
    assert once["rollout"] > TINY.batch * TINY.steps * 2 * pixels
    assert 2 < once["update"] / (once["rollout"] / TINY.minibatches) < 4  # backward: two products for each forward


@pytest.mark.slow
def test_sampling_of_text_to_image_models_is_checked_timed_and_drawn(tmp_path):
    config = benchmark_text_to_image.Config(tmp_path / "out", batch=2, steps=2, repeats=1, pause=0.0, compiled=False)
    metrics = benchmark_text_to_image.run(config)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert Image.open(tmp_path / "out" / "benchmark.png").width > 500
    ours, scan, eager, compiled = metrics["sides"]
    for row in (ours, *([eager] if TORCH else [])):
        assert 0 < row["samples_error"] <= row["samples_tolerance"] < 0.02
    assert scan["samples_error"] == 0 and compiled["rollout_seconds"] is None and compiled["reason"]
    assert metrics["rollout_ratio_to_scan"] > 0 and (metrics["rollout_speedup_over_torch"] is not None) == TORCH
    assert "the UNet alone takes" in benchmark_text_to_image.in_words(metrics)


def test_latents_that_differ_by_more_than_rounding_are_refused():
    side, exact = benchmark.Side("other"), np.asarray([1.0, -1.0])
    benchmark_text_to_image.check(side, exact + 1e-3, exact, 2e-3)
    assert side.errors["samples_error"] == pytest.approx(1e-3)
    for wrong in (exact + 3e-3, exact + np.nan):
        with pytest.raises(ValueError, match="other: latents are off by .*, more than the 2.0e-03 of rounding"):
            benchmark_text_to_image.check(side, wrong, exact, 2e-3)


def test_bad_sizes_are_refused():
    for change, message in (
        ({"repeats": 0}, "repeats=0"),
        ({"minibatches": 5}, "minibatches=5 must divide batch . steps = 12"),
        ({"channels": (12,)}, "must be multiples of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            benchmark.run(dataclasses.replace(TINY, **change))


@pytest.mark.slow
def test_the_network_sees_timesteps_of_the_usual_range(task):
    ts = np.asarray(task.objective.sampler.ts)
    assert 0 <= TIMESTEPS * (1 - ts[-1]) < TIMESTEPS * (1 - ts[0]) <= TIMESTEPS
    assert jax.tree.structure(task.params) == jax.tree.structure(task.reference)
