"""Distances between a sample and a weighted sample of the law that it should have."""

from typing import NamedTuple

import numpy as np

from ctrl_diffusion.optimum import Estimate


class Target(NamedTuple):
    """A weighted sample of the law to compare with: `[m, d]`, and weights `[m]` that sum to 1."""

    y: np.ndarray
    weights: np.ndarray
    row_means: np.ndarray  # E|y_j - Y|, the sample itself left out
    mean: float  # E|Y - Y'|


def make_target(y: np.ndarray, weights: np.ndarray) -> Target:
    """A target of samples `[m, *y]` and their normalised weights."""
    y = np.asarray(y, np.float64).reshape(len(y), -1)
    sums = distances(y, y) @ weights
    return Target(y, weights, sums / (1 - weights), float(weights @ sums / (1 - np.sum(weights**2))))


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`|x_i - y_j|`, `[n, m]`; the distance of a sample to itself comes out at rounding, 1e-7."""
    squared = np.sum(x**2, axis=1)[:, None] + np.sum(y**2, axis=1) - 2 * x @ y.T
    return np.sqrt(np.maximum(squared, 0, out=squared), out=squared)


def energy_distance(x: np.ndarray, target: Target) -> Estimate:
    r"""`2 E|X - Y| - E|X - X'| - E|Y - Y'|` with Euclidean norms: 0 if and only if the laws are the same.

    Unbiased in `x` (U-statistic; the weights of the target are taken as given), so it may come out negative. The standard error is
    that of the linear part, over both samples: it misses the noise that remains where the laws agree (`noise_floor`).
    """
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    n, w, cross = len(x), target.weights, distances(x, target.y)
    to_y, to_x, within = cross @ w, cross.mean(axis=0), distances(x, x).sum(axis=1) / (n - 1)
    influence_x, influence_y = 2 * (to_y - within), 2 * (to_x - target.row_means)
    centred = influence_y - w @ influence_y
    variance = influence_x.var(ddof=1) / n + float(np.sum((w * centred) ** 2))
    return Estimate(float(2 * to_y.mean() - within.mean() - target.mean), float(np.sqrt(variance)))


def noise_floor(y: np.ndarray, weights: np.ndarray, n: int, repeats: int, seed: int) -> float:
    """Root mean square energy distance between `n` draws from one half of the weighted sample and the other half."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(repeats):
        first, second = np.array_split(rng.permutation(len(y)), 2)
        p, q = weights[first] / weights[first].sum(), weights[second] / weights[second].sum()
        found.append(energy_distance(y[rng.choice(first, n, p=p)], make_target(y[second], q)).mean)
    return float(np.sqrt(np.mean(np.square(found))))
