"""The optimum by reweighting, the gap from it, and the diversity of a set, by hand."""

import numpy as np
import pytest

import ctrl_diffusion as cd
from ctrl_diffusion.optimum import Estimate, Optimum, mean_and_error, optimality_gap


def test_the_optimum_of_two_rewards():
    """Rewards 0 and `lambda log 3`: weights 1 and 3, of mean 2 and standard deviation sqrt(2), normalised 1/4 and 3/4."""
    best = cd.reweighted_optimum(np.asarray([0.0, 0.5 * np.log(3)]), 0.5)
    assert best.objective.mean == pytest.approx(0.5 * np.log(2))
    assert best.objective.se == pytest.approx(0.5 * np.sqrt(2) / (2 * np.sqrt(2)))
    np.testing.assert_allclose(best.weights, [0.25, 0.75])
    assert best.reward == pytest.approx(0.75 * 0.5 * np.log(3))
    assert best.path_kl == pytest.approx(0.75 * np.log(3) - np.log(2))
    assert best.effective_sample_size == pytest.approx(1 / (1 / 16 + 9 / 16))
    far = cd.reweighted_optimum(1e4 + np.asarray([0.0, 0.5 * np.log(3)]), 0.5)  # no overflow
    assert far.objective.mean == pytest.approx(1e4 + 0.5 * np.log(2))
    assert far.path_kl == pytest.approx(best.path_kl, abs=1e-8)
    with pytest.raises(ValueError, match="kl_weight=0.0 must be positive"):
        cd.reweighted_optimum(np.zeros(2), 0.0)


def test_the_gap_of_two_paths():
    """`J = E[r - lambda KL]` is 3/2 and 7/2, hence 5/2 +- 1, against `J* = 5 +- 0.3` and a reference of 1."""
    assert mean_and_error(np.asarray([1.0, 3.0])) == (2.0, pytest.approx(1.0))
    best = Optimum(Estimate(5.0, 0.3), 0.0, 0.0, 2.0, np.full(2, 0.5), False)
    gap = optimality_gap(best, Estimate(1.0, 0.0), np.asarray([2.0, 4.0]), np.asarray([1.0, 1.0]), 0.5)
    assert gap.objective == (2.5, pytest.approx(1.0))
    assert gap.gap == (2.5, pytest.approx(np.hypot(0.3, 1.0)))
    assert gap.relative == (0.625, pytest.approx(np.hypot(0.3, 1.0) / 4))


def test_a_process_is_memoryless_if_it_starts_in_noise():
    """The correlation `1 / sqrt(1 + sigma^2)` of a start and data of unit variance is 0.0995 at a noise of 10, 0.0125 at 80."""

    def exploding(noise, eta=1.0):
        return cd.DiffusionProcess(cd.VarianceExploding(horizon=noise, tau_max=noise), eta)

    assert cd.is_memoryless(exploding(80.0)) and not cd.is_memoryless(exploding(80.0, 0.5))
    assert not cd.is_memoryless(exploding(10.0)) and cd.is_memoryless(exploding(10.0), tolerance=0.0996)
    assert not cd.is_memoryless(exploding(10.0), tolerance=0.0994)


def test_diversity_of_two_points():
    """At a distance of two bandwidths the kernel is `k = e^{-2}`, and the eigenvalues of half of it `(1 +- k) / 2`."""
    values = (1 + np.asarray([1, -1]) * np.exp(-2)) / 2
    expected = np.exp(-np.sum(values * np.log(values)))
    assert cd.diversity.vendi_score(np.asarray([[0.0, 0.0], [0.6, 0.8]]), 0.5) == pytest.approx(expected)
    assert cd.diversity.vendi_score(np.zeros((3, 2)), 0.5) == pytest.approx(1)
    assert cd.diversity.vendi_score(np.eye(3), 1e-3) == pytest.approx(3)
    assert cd.diversity.vendi_score(np.eye(3), 1e-3, np.asarray([0.5, 0.5, 0.0])) == pytest.approx(2)
    with pytest.raises(ValueError, match="bandwidth=0.0 must be positive"):
        cd.diversity.vendi_score(np.eye(2), 0.0)
