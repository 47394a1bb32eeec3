"""Effective diversity: the effective number of distinct samples in a set."""

import numpy as np


def vendi_score(x: np.ndarray, bandwidth: float, weights: np.ndarray | None = None) -> float:
    r"""`exp(entropy of the eigenvalues of K / n)` with `K_ij = exp(-|x_i - x_j|^2 / (2 bandwidth^2))` (Friedman and Dieng 2023).

    It is 1 if all samples are alike and `n` if all are different. With `weights`, which sum to 1, it is the score of the reweighted set.

    ??? cite "Reference"
        ```bibtex
        @article{friedman2023vendi, title={The Vendi Score: A Diversity Evaluation Metric for Machine Learning},
          author={Friedman, Dan and Dieng, Adji Bousso}, journal={TMLR}, year={2023}}
        ```
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth={bandwidth} must be positive: it is a distance between samples that counts as similar.")
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    p = np.full(len(x), 1 / len(x)) if weights is None else np.asarray(weights, np.float64)
    norms = np.sum(x**2, axis=1)
    squared = np.maximum(norms[:, None] + norms[None] - 2 * x @ x.T, 0)
    kernel = np.exp(-squared / (2 * bandwidth**2)) * np.sqrt(p[:, None] * p[None])
    eigenvalues = np.linalg.eigvalsh(kernel)
    eigenvalues = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-np.sum(eigenvalues * np.log(eigenvalues))))
