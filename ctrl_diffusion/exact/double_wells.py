r"""The double well of the stochastic-control literature. Its dimensions are independent, and each is solved numerically.

In the literature's terms (see `ctrl_diffusion.drift`) `dX = (b + sigma u) dt + sqrt(lambda) sigma dB`, `b_i = -4 kappa_i x_i
(x_i^2 - 1)`, terminal cost `g = sum_i nu_i (x_i^2 - 1)^2`, no running cost. The value is a sum over dimensions; the value of each
dimension is computed once, in float64, and tabulated (see `ctrl_diffusion.exact.well`).
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from ..drift import DriftProcess
from ..predictions import expand
from ..process import Cond, Params, State, Time
from .problem import AbstractControlProblem, Number, total
from .well import Density, Resolution, Well, interpolate, terminal_densities, value_table


def _vector(x) -> tuple[float, ...]:
    return tuple(np.asarray(x, np.float64).tolist())


class DoubleWell(AbstractControlProblem):
    r"""Drift `-4 kappa x (x^2 - 1)`, reward `-sum nu (x^2 - 1)^2`, `kl_weight lambda`, noise `G`, start at a point.

    Errors at the default resolution, for `(kappa, nu) = (5, 3)` and `(1, 1)`, over all times, found by refinement: a dimension's value and
    its gradient are off by at most 1e-6 and 5e-5 for `|x| <= 1.5`, by 1e-5 and 2e-4 for `|x| <= 2`; `J*` is off by 1e-10. Further out the
    errors grow near the end, to 0.1 at `|x| = 2.5`; beyond that the value is continued linearly. Paths of the reference and of the optimum
    do not get there.

    Args:
        kappa: stiffness of the wells, one number per dimension.
        nu: terminal cost, one number per dimension.
        start: the fixed `X(0)`, the same in every dimension.
        noise, kl_weight, horizon: `G`, `lambda` and `T`.
        steps: the usual number of steps.
        resolution: resolution of the numerical solution; see `ctrl_diffusion.exact.well`.
    """

    kappa: tuple[float, ...] = eqx.field(static=True, converter=_vector, default=(5.0,) * 3 + (1.0,) * 7)
    nu: tuple[float, ...] = eqx.field(static=True, converter=_vector, default=(3.0,) * 3 + (1.0,) * 7)
    start: float = eqx.field(static=True, default=0.0)
    noise: float = eqx.field(static=True, default=1.0)
    kl_weight: float = eqx.field(static=True, default=1.0)
    horizon: float = eqx.field(static=True, default=1.0)
    steps: int = eqx.field(static=True, default=200)
    resolution: Resolution = eqx.field(static=True, default=Resolution())

    def __check_init__(self):
        if not self.kappa or len(self.kappa) != len(self.nu):
            raise ValueError(f"kappa has {len(self.kappa)} numbers and nu {len(self.nu)}: give one of each per dimension.")
        for name in ("kappa", "nu"):
            if not min(getattr(self, name)) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("noise", "kl_weight", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if not abs(self.start) <= self.resolution.half_width:
            raise ValueError(f"start={self.start} must lie within half_width={self.resolution.half_width} of the resolution.")

    @property
    def process(self) -> DriftProcess:
        return DriftProcess(self.noise, self.horizon, self.start)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.kappa),)

    def reward(self, x: State) -> Float[Array, " b"]:
        """`-sum_i nu_i (x_i^2 - 1)^2`."""
        return -total(jnp.asarray(self.nu, x.dtype) * (x**2 - 1) ** 2)

    def reference_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """`-4 kappa x (x^2 - 1)`."""
        return -4 * jnp.asarray(self.kappa, x.dtype) * x * (x**2 - 1)

    def optimal_action(self, params: Params, t: Time, x: State, cond: Cond = None) -> State:
        """`a* = a_ref + (G^2 / lambda) grad V*`."""
        return self.process.improved_action(
            t, self.reference_action(params, t, x, cond), self.value_gradient(t, x), self.kl_weight
        )

    def value(self, t: Time, x: State) -> Float[Array, " b"]:
        return total(self._values(t, x)[0])

    def value_gradient(self, t: Time, x: State) -> State:
        return self._values(t, x)[1]

    def optimal_values(self) -> np.ndarray:
        """`V*(0, X(0))` of every dimension, float64 `[d]`, by the Schroedinger operator and not from the table."""
        return np.asarray([law[2] for law in self._solved()])

    def optimal_value(self) -> Number:
        return jnp.asarray(self.optimal_values().sum(), float)

    def reference_value(self) -> float:
        """`J(a_ref) = E^ref r`."""
        return -sum(law.mean(lambda x, nu=nu: nu * (x**2 - 1) ** 2) for law, nu in zip(self.reference_laws(), self.nu))

    def optimal_reward(self) -> float:
        """`E* r` at the optimum; the path KL is `(E* r - J*) / lambda`."""
        return -sum(law.mean(lambda x, nu=nu: nu * (x**2 - 1) ** 2) for law, nu in zip(self.optimal_laws(), self.nu))

    def reference_laws(self) -> list[Density]:
        """The law of every dimension of `X(T)` under the reference action."""
        return [law[0] for law in self._solved()]

    def optimal_laws(self) -> list[Density]:
        """The law of every dimension of `X(T)` under the optimal action."""
        return [law[1] for law in self._solved()]

    def sample_optimal(self, keys: Key[Array, " b"]) -> Float[Array, "b d"]:
        """Draws by inversion of the distribution function, which is linear between the nodes of the density."""
        laws = self.optimal_laws()
        edges = np.append(laws[0].x, 2 * laws[0].x[-1] - laws[0].x[-2]) - 0.5 * (laws[0].x[1] - laws[0].x[0])
        cumulative = jnp.asarray([np.append(0.0, np.cumsum(law.mass)) for law in laws], float)

        def draw(key):
            u = jr.uniform(key, self.shape, cumulative.dtype)
            return jax.vmap(jnp.interp, (0, 0, None))(u, cumulative, jnp.asarray(edges, cumulative.dtype))

        return jax.vmap(draw)(keys)

    def _wells(self) -> list[Well]:
        return [Well(k, n, self.noise, self.kl_weight, self.horizon) for k, n in zip(self.kappa, self.nu)]

    def _solved(self) -> list[tuple[Density, Density, float]]:
        return [terminal_densities(well, self.start, self.resolution.half_width) for well in self._wells()]

    def _values(self, t: Time, x: State) -> tuple[Any, Any]:
        """`V*` and its derivative of every dimension, `[b, d]`."""
        tables, which = _tables(tuple(self._wells()), self.resolution)
        s = jnp.broadcast_to(expand((self.horizon - t) / self.horizon, x), x.shape).astype(x.dtype)
        return interpolate(tables, which, self.resolution.half_width, self.horizon, s, x)


@functools.lru_cache(maxsize=4)
def _tables(wells: tuple[Well, ...], resolution: Resolution) -> tuple[np.ndarray, np.ndarray]:
    """The tables of the distinct wells, and the index of each dimension's table."""
    distinct = sorted(set(wells))
    return np.stack([value_table(well, resolution) for well in distinct]), np.asarray([distinct.index(w) for w in wells])
