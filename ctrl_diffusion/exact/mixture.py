r"""Gaussian mixtures with a linear or quadratic reward: optimal control in closed form at `eta = 1`.

The data is `sum_i w_i N(m_i, s^2 I)`. Noised to any level it is again a mixture. With a linear or quadratic reward the reweighted law
`p*(x) = p(x) exp(r(x) / lambda) / Z` is a mixture, too, and so is the noised reweighted law. The reward is of `X(t1)`, at noising time
`tau_min`; so `p` is the data noised to `tau_min`, and nothing is approximated if `tau_min > 0`.

*The role of eta = 1.* The reverse SDE is the time reversal of the noising. Under the reference, `X(t1)` given `X(t) = x` therefore
has the posterior law of the noising, a Gaussian in every component. `V*`, `grad V*` and `a*` are closed forms at every `(t, x)`:

    V*(t, x) = lambda log E[exp(r(X_{t1}) / lambda) | X_t = x],      a*(t, x) = score of the noised reweighted law.

At another eta the conditional law differs, though its marginals do not, and there is no closed form.

*The role of memorylessness.* It matters only for numbers of the terminal law. If `X(t0)` and `X(t1)` are independent under the reference
(`alpha(tau_max) -> 0`), `J* = E V*(t0, X(t0))` equals `lambda log Z`, and the optimal law of `X(t1)` equals `p*`. Otherwise
`J* < lambda log Z`; on the ring with `VPLinear()` (`alpha(1) = 0.0066`) and lambda = 1 the difference is 1.2e-4.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from ..predictions import expand
from ..process import Cond, DiffusionProcess, Params, Time
from .problem import AbstractControlProblem
from .tilt import AbstractTiltReward

Points = Float[Array, "b d"]


def _vector(x) -> tuple[float, ...]:
    return tuple(np.asarray(x, np.float64).tolist())


class Components(NamedTuple):
    """A mixture of Gaussians with one isotropic variance; with a leading axis `b`, one mixture per sample."""

    log_weights: Float[Array, "*b n"]
    means: Float[Array, "*b n d"]
    variance: Float[Array, "*b"]

    def log_joint(self, x: Points) -> Float[Array, "b n"]:
        """`log w_i + log N(x; m_i, variance I)`; `logsumexp` over `i` is the log-density."""
        squared = jnp.sum((x[:, None, :] - self.means) ** 2, axis=-1)
        variance = self.variance[..., None]
        return self.log_weights - 0.5 * squared / variance - 0.5 * x.shape[-1] * jnp.log(2 * jnp.pi * variance)

    def log_density(self, x: Points) -> Float[Array, " b"]:
        return jax.nn.logsumexp(self.log_joint(x), axis=-1)

    def score(self, x: Points) -> Points:
        """Gradient of `log_density`."""
        posterior = jax.nn.softmax(self.log_joint(x), axis=-1)
        pulls = jnp.sum(posterior[..., None] * (self.means - x[:, None, :]), axis=-2)
        return pulls / expand(self.variance, x)

    def noised(self, scale: Time, variance: Time) -> "Components":
        """The law of `scale X + sqrt(variance) eps`; arguments scalar or `[b]`."""
        return Components(self.log_weights, scale[..., None, None] * self.means, scale**2 * self.variance + variance)

    def tilted(self, reward: AbstractTiltReward, kl_weight: float) -> tuple["Components", Float[Array, ""]]:
        """The law `p exp(reward / kl_weight) / Z` and `log Z`."""
        log_weights = self.log_weights + reward.log_mass(self.means, self.variance, kl_weight)
        log_z = jax.nn.logsumexp(log_weights)
        return Components(log_weights - log_z, *reward.tilt(self.means, self.variance, kl_weight)), log_z

    def expectation(self, reward: AbstractTiltReward) -> Float[Array, ""]:
        """`E r(X)`."""
        return jnp.sum(jnp.exp(self.log_weights) * reward.expectation(self.means, self.variance))

    def sample(self, keys: Key[Array, " b"]) -> Points:
        """One draw per key."""

        def draw(key):
            which, noise = jr.split(key)
            mean = self.means[jr.categorical(which, self.log_weights)]
            return mean + jnp.sqrt(self.variance) * jr.normal(noise, mean.shape, mean.dtype)

        return jax.vmap(draw)(keys)


class GaussianMixture(eqx.Module):
    """`sum_i weights_i N(means_i, std^2 I)`. `means` has `n` rows of `d` numbers; `weights` are uniform if not given."""

    means: tuple[tuple[float, ...], ...] = eqx.field(static=True)
    std: float = eqx.field(static=True)
    weights: tuple[float, ...] = eqx.field(static=True)

    def __init__(self, means, std, weights=None):
        self.means, self.std = tuple(_vector(mean) for mean in means), float(std)
        self.weights = _vector(np.full(len(means), 1 / len(means)) if weights is None else weights)

    def __check_init__(self):
        if len({len(mean) for mean in self.means}) != 1:
            raise ValueError(
                f"means have lengths {sorted({len(mean) for mean in self.means})}: give one row of equal length per component."
            )
        if not self.std > 0:
            raise ValueError(f"std={self.std} must be positive.")
        if len(self.weights) != len(self.means) or min(self.weights) <= 0 or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights={self.weights} must be {len(self.means)} positive numbers that sum to 1.")

    @property
    def dim(self) -> int:
        return len(self.means[0])

    def components(self, dtype: Any = float) -> Components:
        return Components(
            jnp.log(jnp.asarray(self.weights, dtype)), jnp.asarray(self.means, dtype), jnp.asarray(self.std**2, dtype)
        )


def ring(count: int = 8, radius: float = 4 / 1.414, std: float = 0.5 / 1.414) -> GaussianMixture:
    """`count` equal Gaussians on a circle in the plane. The first centre is on the positive `x_1` axis."""
    angles = 2 * math.pi * np.arange(count) / count
    return GaussianMixture(radius * np.stack([np.cos(angles), np.sin(angles)], axis=1), std)


class MixtureControl(AbstractControlProblem):
    """Mixture data with a linear or quadratic reward of `X(t1)`; states are `[b, d]`.

    `reference_action` and the numbers of the reweighted law hold at every `eta`. `value`, `value_gradient`, `optimal_action` and
    `optimal_value` need `eta = 1` (see the module's docstring) and raise `ValueError` otherwise.
    """

    process: DiffusionProcess
    data: GaussianMixture
    reward: AbstractTiltReward
    kl_weight: float = eqx.field(static=True)
    steps: int = eqx.field(static=True, default=50)

    def __check_init__(self):
        if not self.kl_weight > 0:
            raise ValueError(f"kl_weight={self.kl_weight} must be positive.")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.data.dim,)

    def terminal(self, dtype: Any = float) -> Components:
        """The reference law of `X(t1)`: the data noised to `tau_min`."""
        schedule, tau = self.process.schedule, self._tau_end(dtype)
        return self.data.components(dtype).noised(schedule.alpha(tau), schedule.sigma_squared(tau))

    def tilted(self, dtype: Any = float) -> Components:
        """The reweighted law `p*` of `X(t1)`; it is the optimal law if memoryless."""
        return self.terminal(dtype).tilted(self.reward, self.kl_weight)[0]

    @property
    def log_normaliser(self) -> Float[Array, ""]:
        """`log Z = log E^ref exp(r / lambda)`; `lambda log Z` is `J*` if memoryless, else an upper bound of it."""
        return self.terminal().tilted(self.reward, self.kl_weight)[1]

    @property
    def tilted_reward(self) -> Float[Array, ""]:
        """`E r` under the reweighted law."""
        return self.tilted().expectation(self.reward)

    @property
    def tilted_kl(self) -> Float[Array, ""]:
        """`KL(p* || p) = E* r / lambda - log Z`."""
        return self.tilted_reward / self.kl_weight - self.log_normaliser

    def reference_action(self, params: Params, t: Time, x: Points, cond: Cond = None) -> Points:
        """The score of the noised data."""
        return self.terminal(x.dtype).noised(*self._noising(t, x.dtype)).score(x)

    def optimal_action(self, params: Params, t: Time, x: Points, cond: Cond = None) -> Points:
        """The score of the noised reweighted law."""
        self._require_reversal()
        return self.tilted(x.dtype).noised(*self._noising(t, x.dtype)).score(x)

    def value_gradient(self, t: Time, x: Points) -> Points:
        """`grad V* = lambda (a* - a_ref)`, which is `lambda (1 + eta^2) / (2 eta^2) (a* - a_ref)` at `eta = 1`."""
        return self.kl_weight * (self.optimal_action(None, t, x) - self.reference_action(None, t, x))

    def value(self, t: Time, x: Points) -> Float[Array, " b"]:
        """Soft value `V*(t, x) = lambda log sum_i p(i | x) E[exp(r / lambda) | x, i]`; equal to the reward at `t1`."""
        log_weights, means, variance = self._posterior(t, x)
        log_mass = jax.vmap(lambda m, v: self.reward.log_mass(m, v, self.kl_weight))(means, variance)
        return self.kl_weight * jax.nn.logsumexp(log_weights + log_mass, axis=-1)

    def mean_reward(self, t: Time, x: Points) -> Float[Array, " b"]:
        """`E^ref[r(X(t1)) | X(t) = x]`: the mean reward of the reference, without KL."""
        return jax.vmap(lambda *law: Components(*law).expectation(self.reward))(*self._posterior(t, x))

    def optimal_mean_reward(self, t: Time, x: Points) -> Float[Array, " b"]:
        """`E*[r(X(t1)) | X(t) = x]`: the mean reward of the optimal policy; `V*` is that less `lambda` times its KL to go."""

        def mean(*law):
            return Components(*law).tilted(self.reward, self.kl_weight)[0].expectation(self.reward)

        return jax.vmap(mean)(*self._posterior(t, x))

    def sample_optimal(self, keys: Key[Array, " b"]) -> Points:
        """Draws of `X(t1)` under the optimal action, from the reweighted mixture of each start; exact also if not memoryless."""
        keys = jax.vmap(jr.split)(keys)
        x0 = self.process.initial(keys[:, 0], self.shape, float)

        def draw(log_weights, means, variance, key):
            law = Components(jax.nn.log_softmax(log_weights), means, variance).tilted(self.reward, self.kl_weight)[0]
            return law.sample(key[None])[0]

        return jax.vmap(draw)(*self._posterior(jnp.asarray(self.process.t0, float), x0), keys[:, 1])

    def optimal_value(self, nodes: int = 24) -> Float[Array, ""]:
        """`J* = E V*(t0, X(t0))` for the process's own start `N(0, sigma(tau_max)^2)`, by Gauss-Hermite quadrature (`d <= 3`).

        In more dimensions it raises `ValueError`: average `value(t0, x)` over `process.initial`.
        """
        dim = self.data.dim
        if dim > 3:
            raise ValueError(
                f"optimal_value takes {nodes}^{dim} nodes in dimension {dim}: average value(t0, x) over initial states."
            )
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        grid = np.stack(np.meshgrid(*[points] * dim), axis=-1).reshape(-1, dim)
        mass = np.prod(np.stack(np.meshgrid(*[weights / weights.sum()] * dim), axis=-1).reshape(-1, dim), axis=1)
        t0 = jnp.asarray(self.process.t0, float)
        x = self.process.schedule.sigma(self.process.tau(t0)) * jnp.asarray(grid, float)
        return jnp.sum(jnp.asarray(mass, float) * self.value(t0, x))

    def _tau_end(self, dtype):
        return self.process.tau(jnp.asarray(self.process.t1, dtype))

    def _noising(self, t: Time, dtype) -> tuple[Time, Time]:
        """Scale and noise variance of `X_t` given `X(t1)`."""
        schedule, tau, tau_end = self.process.schedule, self.process.tau(t), self._tau_end(dtype)
        scale = jnp.exp(schedule.log_alpha(tau) - schedule.log_alpha(tau_end))
        return scale, schedule.sigma_squared(tau) - scale**2 * schedule.sigma_squared(tau_end)

    def _posterior(self, t: Time, x: Points) -> Components:
        r"""The reference law of `X(t1)` given `X(t) = x`, one mixture per sample.

        With `X_t = scale X(t1) + sqrt(n) eps`, component `i` of `X(t1)` given `x` is
        `N(m_i + gain (x - scale m_i), n v / (scale^2 v + n))`, `gain = scale v / (scale^2 v + n)`.
        """
        self._require_reversal()
        terminal, (scale, noise) = self.terminal(x.dtype), self._noising(t, x.dtype)
        noised = terminal.noised(scale, noise)
        gain = (scale * terminal.variance / noised.variance)[..., None, None]
        means = terminal.means + gain * (x[:, None, :] - noised.means)
        variance = jnp.broadcast_to(noise * terminal.variance / noised.variance, x.shape[:1])
        return Components(jax.nn.log_softmax(noised.log_joint(x), axis=-1), means, variance)

    def _require_reversal(self) -> None:
        if self.process.eta != 1:
            raise ValueError(
                f"eta={self.process.eta}: the mixture's V* and optimal action are closed forms at eta = 1 only, where the "
                "reference reverses the noising. Use eta=1.0, or GaussianQuadratic, which is exact at every eta > 0."
            )
