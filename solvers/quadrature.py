r"""Integrals of polynomials against the kernel of an exponential integrator.

If the control is a polynomial in `theta in [0, 1]`, a step depends on the moments `m_j = int kernel theta^j`. For an exponential
kernel `e^{z (1 - theta)}` these are the phi-functions, `int_0^1 e^{z (1 - theta)} theta^j = j! phi_{j+1}(z)`.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Scalar = Float[Array, ""]

_SERIES_TERMS = 18  # |z| <= 1: the first term left out is below 1e-17
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


def gauss_legendre(lo: Scalar, hi: Scalar) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """Nodes and weights on `[lo, hi]`."""
    half = 0.5 * (hi - lo)
    return lo + half * (1 + jnp.asarray(_NODES, half.dtype)), half * jnp.asarray(_WEIGHTS, half.dtype)


def moment_fractions(z: Scalar, count: int) -> tuple[Scalar, ...]:
    r"""`I_j(z) / I_0(z)` for `j < count`, with `I_j(z) = int_0^1 e^{z (1 - theta)} theta^j dtheta`. `z` may be infinite.

    For small z it uses `I_j = sum_i z^i j! / (i + j + 1)!`, else `I_j = (j I_{j-1} - 1) / z`, scaled by `e^{-z}` for `z > 0`.
    """
    small, finite = jnp.abs(z) < 1, jnp.isfinite(z)
    inner = jnp.where(small, z, 0)
    outer = jnp.where(small | ~finite, 1, z)
    series = _series(inner, count)
    one = jnp.exp(-jnp.maximum(outer, 0))  # the number 1 of the recursion, scaled
    recursion = [jnp.where(outer > 0, -jnp.expm1(-outer), jnp.expm1(jnp.minimum(outer, 0))) / outer]
    for j in range(1, count):
        recursion.append((j * recursion[-1] - one) / outer)
    limit = jnp.where(z > 0, 0.0, 1.0).astype(z.dtype)
    fractions = (jnp.where(small, s / series[0], r / recursion[0]) for s, r in zip(series, recursion))
    return (jnp.ones_like(z), *(jnp.where(finite, f, limit) for f in list(fractions)[1:]))


def _series(z: Scalar, count: int) -> Float[Array, " j"]:
    terms = np.arange(_SERIES_TERMS)
    coefficients = np.asarray([[math.factorial(j) / math.factorial(i + j + 1) for i in terms] for j in range(count)])
    return jnp.asarray(coefficients, z.dtype) @ z ** jnp.asarray(terms, z.dtype)


def integrate_interpolant(moments, nodes, values, known=None):
    r"""`int kernel p(theta)` for the polynomial `p` through `(nodes[i], values[i])`, in Newton's form.

    Args:
        moments: `m_0, m_1, ...`, at least as many as nodes.
        nodes: distinct scalars.
        values: arrays of one shape.
        known: the number of nodes that exist, which may be traced. Later nodes are ignored.
    """
    n = len(nodes)
    known = n if known is None else known
    nodes = [jnp.where(i < known, node, -100.0 - i).astype(jnp.result_type(node)) for i, node in enumerate(nodes)]
    column = list(jnp.eye(n, dtype=jnp.result_type(*nodes)))  # divided differences of one order, as weights of the values
    basis = [1.0]  # coefficients of (theta - nodes[0]) ... (theta - nodes[k - 1]), constant term first
    weights = moments[0] * column[0]
    for k in range(1, n):
        column = [(column[i] - column[i + 1]) / (nodes[i] - nodes[i + k]) for i in range(n - k)]
        shifted = [0.0, *basis]
        basis = [shifted[i] - nodes[k - 1] * (basis[i] if i < k else 0.0) for i in range(k + 1)]
        weight = sum(b * m for b, m in zip(basis, moments))
        weights = weights + jnp.where(k < known, weight, 0) * column[0]
    return sum(weights[i] * value for i, value in enumerate(values))
