"""The benchmark compares like with like: the same samples from the same noise."""

import json

import pytest

from experiments import benchmark


def test_both_sides_draw_the_same_samples(tmp_path):
    metrics = benchmark.run(benchmark.Config(out=tmp_path / "out", batch=32, steps=8, width=16, depth=1, repeats=2))
    assert metrics["max_difference_of_noise"] < 1e-5  # the same draws; compilers may round them differently
    assert metrics["max_difference_of_samples"] < 1e-4
    assert metrics["rollout_ratio_to_scan"] > 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="repeats=0"):
        benchmark.run(benchmark.Config(repeats=0))
