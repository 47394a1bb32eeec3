r"""Exploration by Brownian or by action noise, with `log ratio = z . xi - |z|^2 / 2`, `z_j = scale_j (a_theta - a_old)(t_j, x_j)`.

*Brownian*: the SDE's own noise. The likelihood of a step is the solver's Gaussian transition.
*Action noise*: `a = a_theta + delta_j` with Gaussian `delta_j`, held over control interval `j`. The likelihood depends only on the
recorded `(t_j, x_j, delta_j)`. Any solver may therefore integrate the interval, as ODE or SDE, with any number of steps: the control grid
is not the solver grid.
"""

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .predictions import expand
from .process import DiffusionProcess
from .sampler import Sampler, Trajectory
from .solvers import KeyedPath, refine, solve


class AbstractExploration(eqx.Module):
    """The noise of the policy while it samples paths to train on."""

    @property
    def substeps_per_interval(self) -> int:
        """Solver steps per control interval."""
        return 1

    @property
    def has_likelihood(self) -> bool:
        """Whether the paths have a likelihood ratio and a path KL."""
        return True

    @abc.abstractmethod
    def trajectory(self, sampler: Sampler, params, keys, cond=None) -> Trajectory:
        """Sample paths on `sampler.grid`, the control grid, and record the standard normals that their likelihood depends on."""

    @abc.abstractmethod
    def scales(self, sampler: Sampler) -> Float[Array, " n"]:
        """`scale_j`: the shift of the recorded noise per unit change of the action in interval `j`."""

    @abc.abstractmethod
    def kl_scales(self, sampler: Sampler) -> Float[Array, " n"]:
        """Scales of the KL penalty: `kl_weight` multiplies `|scale_j (a - a_ref)|^2 / 2` nats per interval."""


class Brownian(AbstractExploration):
    """The SDE's own noise. The KL penalty is the chain's own path KL. It needs `eta > 0` and a solver with a Gaussian transition."""

    def trajectory(self, sampler: Sampler, params, keys, cond=None) -> Trajectory:
        self._check(sampler)
        return sampler.trajectory(params, keys, cond)

    def scales(self, sampler: Sampler) -> Float[Array, " n"]:
        self._check(sampler)
        return sampler.chain_scales()

    def kl_scales(self, sampler: Sampler) -> Float[Array, " n"]:
        return self.scales(sampler)

    def _check(self, sampler: Sampler) -> None:
        if isinstance(sampler.process, DiffusionProcess):
            sampler.process.require_noise(
                "Brownian exploration", "Use eta > 0, or ActionNoise(strength=..., substeps=...), which explores any sampler."
            )


class NoExploration(AbstractExploration):
    """Paths of an ODE without noise, for gradients through the sampler (`estimators.Pathwise`). They have no likelihood and no path KL."""

    @property
    def has_likelihood(self) -> bool:
        return False

    def trajectory(self, sampler: Sampler, params, keys, cond=None) -> Trajectory:
        return sampler.trajectory(params, keys, cond)

    def scales(self, sampler: Sampler) -> Float[Array, " n"]:
        return jnp.zeros(len(sampler.times) - 1, sampler.dtype)

    def kl_scales(self, sampler: Sampler) -> Float[Array, " n"]:
        return self.scales(sampler)


class ActionNoise(AbstractExploration):
    r"""`a(t, x) = a_theta(t, x) + delta_j` on `[t_j, t_{j+1})`, `delta_j ~ N(0, s(t_j)^2 / (t_{j+1} - t_j))`, `s = strength / g`.

    The covariance is per unit time. The KL of a given change of policy therefore does not depend on the number of intervals. Only the
    noise is held constant; the score follows the state inside the interval. The drift jumps at control times, so the solver restarts
    there. The exploring process has the additional diffusion `c s = (1 + eta^2)/2 strength g`; evaluate without it (`Sampler.sample`).

    For `eta > 0` the KL penalty is the path KL by Girsanov's formula at the left ends. At `eta = 0` that path KL is infinite, and the
    penalty is the KL of the exploring policies, `g^2 |a - a_ref|^2 / (2 strength^2)` per unit time. This is another objective.

    Args:
        strength: `s` in units of `1 / g`.
        substeps: solver steps per control interval.
    """

    strength: float = eqx.field(static=True, default=1.0)
    substeps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        if not self.strength > 0:
            raise ValueError(f"strength={self.strength} must be positive: it is the exploration noise in units of 1/g.")
        if self.substeps < 1:
            raise ValueError(
                f"substeps={self.substeps} must be at least 1: it is the number of solver steps per control interval."
            )

    @property
    def substeps_per_interval(self) -> int:
        return self.substeps

    def trajectory(self, sampler: Sampler, params, keys, cond=None) -> Trajectory:
        ts, n = sampler.ts, self.substeps
        fine = jnp.asarray(refine(sampler.grid, n), sampler.dtype)
        x0, keys = sampler.start(keys)
        keys = jax.vmap(jax.random.split)(keys)
        noise = KeyedPath(ts=ts, keys=keys[:, 0], shape=sampler.shape).tabulate()
        path = sampler.brownian(fine, keys[:, 1]) if sampler.is_stochastic else None
        std = 1 / self.scales(sampler)

        def interval(x, j):
            delta = std[j] * noise[j]
            term = sampler.process.term(lambda p, t, x, c: sampler.control(p, t, x, c) + delta, path)
            steps = jax.lax.dynamic_slice(fine, (j * n,), (n + 1,))
            x = solve(term, sampler.solver, steps, x, (params, cond))
            return x, x

        _, xs = jax.lax.scan(interval, x0, jnp.arange(len(ts) - 1))
        return Trajectory(ts, jnp.concatenate([x0[None], xs]), noise)

    def scales(self, sampler: Sampler) -> Float[Array, " n"]:
        if not isinstance(sampler.process, DiffusionProcess):
            raise TypeError(
                f"ActionNoise scales with the noising g(t), which {type(sampler.process).__name__} does not have: use Brownian()."
            )
        with jax.ensure_compile_time_eval():
            g = jax.jit(sampler.process.g)(sampler.ts[:-1])
            return jnp.sqrt(jnp.diff(sampler.ts)) * g / self.strength

    def kl_scales(self, sampler: Sampler) -> Float[Array, " n"]:
        return sampler.girsanov_scales() if sampler.is_stochastic else self.scales(sampler)


def shift(scales: Float[Array, "..."], a, a_old):
    """`z = scale (a - a_old)` for actions `[n, *x]` and one scale per transition (or one for all)."""
    return expand(scales, a) * (a - a_old)
