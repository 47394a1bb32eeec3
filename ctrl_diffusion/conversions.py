r"""Translates published constants into this library's units: path KL in nats, log-densities summed over the `dim` entries of a state.

With per-step Gaussians of equal standard deviation, `kl = |mu - mu_ref|^2 / (2 sigma^2)`.
"""

import math


def sqdf_kl_weight(alpha: float, dim: int) -> float:
    """`lambda = 2 alpha / dim`: SQDF penalises `alpha mean_d((mu - mu_ref)^2 / sigma^2)`, a mean over dimensions without the 1/2.

    Its alpha = 2 on Stable Diffusion's 64 x 64 x 4 latents is lambda = 2.44e-4.
    """
    return 2 * alpha / _positive(dim)


def summed_clip(clip: float, dim: int) -> tuple[float, float]:
    """`1 - (1 - clip)^dim` below 1 and `(1 + clip)^dim - 1` above it, for ratios of summed log-densities.

    DDPO's code clips ratios of *mean* log-densities to `1 +- clip` (1e-4).
    """
    return -math.expm1(_positive(dim) * math.log1p(-clip)), math.expm1(dim * math.log1p(clip))


def dpok_kl_weight(alpha: float, beta: float) -> float:
    """`lambda = beta / alpha`: DPOK maximises `alpha r - beta KL`."""
    return beta / alpha


def adjoint_matching_kl_weight(multiplier: float) -> float:
    """`lambda = 1 / multiplier`: Adjoint Matching multiplies the reward by its lambda; the KL coefficient is 1."""
    return 1 / multiplier


def vard_kl_weight(eta: float, dim: int, mean_over_dimensions: bool = False) -> float:
    """`lambda = eta` if VARD's KL is a sum over dimensions, `eta / dim` if it is a mean. The paper does not say which."""
    return eta / _positive(dim) if mean_over_dimensions else eta


def _positive(dim: int) -> int:
    if dim < 1:
        raise ValueError(f"dim={dim} must be at least 1: it is the number of entries of a state.")
    return dim
