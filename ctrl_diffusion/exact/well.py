r"""One dimension of the double well: `dX = (-U'(X) + B (a - a_ref)) dt + G dW`, `U = kappa (x^2 - 1)^2`, `r = -nu (x^2 - 1)^2`.

With the remaining time `s = T - t` the soft value `V = lambda log E^ref[exp(r(X_T) / lambda) | X_t = x]` solves

    V_s = -U' V_x + G^2/2 V_xx + G^2/(2 lambda) V_x^2,        V(s = 0) = r.

*Scheme.* `V` is even, so it is a Chebyshev series in `w = 2 (x/L)^2 - 1` on `[-L, L]`, by collocation at the extreme points.
Over a step of `s` the Cole-Hopf transform is relative to the value at its start: `psi = exp((V - V_n) / lambda)` starts at 1 and solves
the *linear* equation `psi_s = M psi`, with

    M = G^2/2 d_xx + (-U' + G^2/lambda V_n') d_x + (1/lambda) V_s(V_n).

It stays near one everywhere, so no digits are lost even if `exp(V / lambda)` is tiny. `exp(M ds) 1` is computed by the (2, 3)
Pade approximation (order 5, L-stable) in partial fractions. At `|x| = L` the second derivative is dropped: the drift points
inwards, so the error stays there. The nodes in time are `s = T (j/n)^3`, because `V` changes fast near the end.

*Table.* It holds `V, V_x, V_xx` and their rates in `s`, at the nodes in time and at uniform nodes in `x`. Hermite interpolation is quintic
in `x` and cubic in `s`. Beyond `|x| = L` the value is continued linearly. The docstring of `exact.DoubleWell` has the errors.

*Law.* `-sqrt(pi) L sqrt(pi)^-1 = -G^2/2 d_xx + U'^2/(2 G^2) - U''/2` with `pi = exp(-2 U / G^2)` is a Schroedinger operator; in
the sinc basis (uniform nodes, spectrally accurate) its matrix is symmetric, and its eigenvectors give the transition density.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.polynomial import Polynomial, chebyshev


class Well(NamedTuple):
    """The numbers of one dimension: `kappa`, `nu`, the noise `G`, `lambda` and `T`."""

    kappa: float
    nu: float
    noise: float
    kl_weight: float
    horizon: float


class Resolution(NamedTuple):
    """`modes` even Chebyshev polynomials on `[-half_width, half_width]`, `intervals * substeps` steps, and `cells` in the table."""

    half_width: float = 2.5
    modes: int = 96
    intervals: int = 200
    substeps: int = 2
    cells: int = 250


_NUMERATOR, _DENOMINATOR = Polynomial([1, 2 / 5, 1 / 20]), Polynomial([1, -3 / 5, 3 / 20, -1 / 60])  # (2, 3) Pade of exp
_ROOTS = np.asarray(_DENOMINATOR.roots(), complex)
_POLES = _ROOTS[np.imag(_ROOTS) > -1e-9]  # the third is a conjugate
_RESIDUES = np.where(np.imag(_POLES) > 1e-9, 2, 1) * np.asarray(_NUMERATOR(_POLES) / _DENOMINATOR.deriv()(_POLES), complex)


def _differentiation(w: np.ndarray) -> np.ndarray:
    """The differentiation matrix of the Chebyshev extreme points `w`."""
    scale = (-1.0) ** np.arange(len(w))
    scale[[0, -1]] *= 2
    matrix = np.outer(scale, 1 / scale) / (w[:, None] - w + np.eye(len(w)))
    return matrix - np.diag(matrix.sum(axis=1))


@functools.lru_cache(maxsize=16)
def value_table(well: Well, resolution: Resolution) -> np.ndarray:
    """`d^k V / dx^k` (third axis, `k = 0, 1, 2`) and its rate in `s` (last axis) at `[intervals + 1, cells + 1]` nodes."""
    kappa, nu, noise, weight, horizon = well
    half, modes, intervals, substeps, cells = resolution
    w = np.cos(np.pi * np.arange(modes + 1) / modes)
    z = half**2 * (1 + w) / 2  # x^2
    d = _differentiation(w)  # d_w
    diffusion = 0.5 * noise**2 * (4 / half**2 * d + 16 / half**4 * z[:, None] * (d @ d))  # G^2/2 d_xx
    diffusion[0] = 0
    drift = -16 * kappa / half**2 * z * (z - 1)  # -U' d_x = drift d_w
    square = 16 / half**4 * z * noise**2 / weight  # (G^2/lambda) V_x d_x = square V_w d_w

    def rate(v):
        slope = d @ v
        return drift * slope + diffusion @ v + 0.5 * square * slope**2

    def step(v, ds):
        m = diffusion + (drift + square * (d @ v))[:, None] * d + np.diag(rate(v) / weight)
        shifted = ds * m - _POLES[:, None, None] * np.eye(modes + 1)
        solved = np.linalg.solve(shifted, np.ones((len(_POLES), modes + 1, 1)))[..., 0]
        return v + weight * np.log((_RESIDUES @ solved).real)

    nodes = horizon * (np.arange(intervals * substeps + 1) / (intervals * substeps)) ** 3
    values = [-nu * (z - 1) ** 2]
    with np.errstate(invalid="ignore", over="ignore"):
        for ds in np.diff(nodes):
            values.append(step(values[-1], ds))
    if not np.all(np.isfinite(values[-1])):
        raise ValueError(f"{well}: the solution broke down with {resolution}. Take more substeps, or a smaller half_width.")
    values = values[::substeps]
    data = np.stack([values, [rate(v) for v in values]], axis=-1)  # [intervals + 1, modes + 1, 2]
    series = np.linalg.solve(chebyshev.chebvander(w, modes), np.moveaxis(data, 1, 0).reshape(modes + 1, -1))
    even = np.zeros((2 * modes + 1, series.shape[1]))
    even[::2] = series
    x = np.linspace(-1, 1, cells + 1)
    rows = [chebyshev.chebval(x, chebyshev.chebder(even, k, 1 / half)) for k in range(3)]  # each [2 (intervals + 1), cells + 1]
    table = np.stack(rows, axis=-1).reshape(intervals + 1, 2, cells + 1, 3)
    return np.moveaxis(table, 1, -1)


def _hermite(xi, h):
    """Weights of `V, V_x, V_xx` at the left and at the right end of a cell of width `h`, stacked `[..., 2, 3]`."""
    left = (
        1 - 10 * xi**3 + 15 * xi**4 - 6 * xi**5,
        xi - 6 * xi**3 + 8 * xi**4 - 3 * xi**5,
        xi**2 - 3 * xi**3 + 3 * xi**4 - xi**5,
    )
    right = (10 * xi**3 - 15 * xi**4 + 6 * xi**5, -4 * xi**3 + 7 * xi**4 - 3 * xi**5, xi**3 - 2 * xi**4 + xi**5)
    scale = jnp.asarray([1.0, h, 0.5 * h**2], xi.dtype)
    return jnp.stack([jnp.stack(left, -1) * scale, jnp.stack(right, -1) * scale], axis=-2)


def interpolate(
    tables: Float[np.ndarray, "k n m 3 2"],
    which: np.ndarray,
    half_width: float,
    horizon: float,
    s: Float[Array, "*b"],
    x: Float[Array, "*b"],
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """`V` and `V_x`, elementwise from `tables[which]`, at the remaining times `horizon s` with `s` in `[0, 1]` and at the states `x`."""
    intervals, cells = tables.shape[1] - 1, tables.shape[2] - 1
    j = jnp.clip(jnp.floor(intervals * jnp.cbrt(s)), 0, intervals - 1)
    start, ds = (j / intervals) ** 3, (3 * j * (j + 1) + 1) / intervals**3
    theta = (s - start) / ds
    step = 2 * half_width / cells
    inside = jnp.clip(x, -half_width, half_width)
    i = jnp.clip(jnp.floor((inside + half_width) / step), 0, cells - 1)
    xi = (inside + half_width) / step - i
    j, i = j.astype(int)[..., None, None], i.astype(int)[..., None, None]
    corners = jnp.asarray(tables, x.dtype)[which[..., None, None], j + np.array([[0], [1]]), i + np.array([0, 1])]
    value = jnp.stack([(1 + 2 * theta) * (1 - theta) ** 2, theta**2 * (3 - 2 * theta)], axis=-1)
    slope = jnp.stack([theta * (1 - theta) ** 2, theta**2 * (theta - 1)], axis=-1) * (horizon * ds)[..., None]
    row = jnp.einsum("...tpkr,...tr->...pk", corners, jnp.stack([value, slope], axis=-1))
    weights, derivative = jax.jvp(lambda xi: _hermite(xi, step), (xi,), (jnp.full_like(xi, 1 / step),))
    v, gradient = jnp.sum(row * weights, axis=(-2, -1)), jnp.sum(row * derivative, axis=(-2, -1))
    return v + gradient * (x - inside), gradient


class Density(NamedTuple):
    """A density at uniform nodes, as mass per node; the masses sum to one."""

    x: np.ndarray
    mass: np.ndarray

    def mean(self, fn) -> float:
        """`E fn(X)` by the trapezoidal rule, spectrally accurate for a smooth density that vanishes at the ends."""
        return float(self.mass @ fn(self.x))


@functools.lru_cache(maxsize=16)
def terminal_densities(well: Well, start: float, half_width: float = 2.5, count: int = 401) -> tuple[Density, Density, float]:
    """The reference law and the optimal law of `X(T)` given `X(0) = start`, and `V(0, start)`, by the Schroedinger operator."""
    kappa, nu, noise, weight, horizon = well
    x, energies, modes = _spectrum(kappa, noise, half_width, count)
    ground = kappa * ((start**2 - 1) ** 2 - (x**2 - 1) ** 2) / noise**2  # log sqrt(pi(x) / pi(start))
    mass = np.exp(ground) * (modes @ (np.exp(-horizon * energies) * (np.sinc((start - x) / (x[1] - x[0])) @ modes)))
    mass = np.maximum(mass, 0.0) / mass.sum()
    tilted = mass * np.exp(-nu * (x**2 - 1) ** 2 / weight)
    return Density(x, mass), Density(x, tilted / tilted.sum()), weight * float(np.log(tilted.sum()))


@functools.lru_cache(maxsize=16)
def _spectrum(kappa: float, noise: float, half_width: float, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, eigenvalues and eigenvectors of the Schroedinger operator in the sinc basis."""
    x, h = np.linspace(-half_width, half_width, count, retstep=True)
    gaps = np.arange(count)[:, None] - np.arange(count)
    kinetic = np.where(gaps == 0, np.pi**2 / 3, 2 * (-1.0) ** gaps / np.where(gaps == 0, 1, gaps) ** 2)  # -d_xx h^2
    force, curvature = 4 * kappa * x * (x**2 - 1), 4 * kappa * (3 * x**2 - 1)  # U', U''
    potential = force**2 / (2 * noise**2) - curvature / 2
    energies, modes = np.linalg.eigh(noise**2 / (2 * h**2) * kinetic + np.diag(potential))
    return x, energies, modes
