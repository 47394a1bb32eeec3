"""ER-SDE: multistep solvers for extended reverse-time SDEs, whose noise is a free function of the noise level."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .multistep import AbstractMultistep, Kernel
from .quadrature import gauss_legendre
from .term import Interval, Scalar


def er_sde_noise_scale(n: Float[Array, "..."]) -> Float[Array, "..."]:
    """`n (e^{n^0.3} + 10)`, the noise scale function that the paper recommends (`n` is the noise level, EDM's sigma)."""
    return n * (jnp.exp(n**0.3) + 10)


class ERSDE(AbstractMultistep):
    r"""`x1/alpha1 = w(n0) x0/alpha0 + (1 - w(n0)) D + W_1 D' + W_2 D'' + sqrt(n1^2 - n0^2 w(n0)^2) xi`.

    `n = sigma / alpha = e^{-clock}`, `w(n) = phi(n1) / phi(n)` for a noise scale function `phi`, and

        W_1 = n1 - n0 + int_{n1}^{n0} w dn,      W_2 = (n1 - n0)^2 / 2 + int_{n1}^{n0} (n - n0) w dn

    (Cui et al. 2023, eq. 20-24 and Algorithms 1-3 for steps = 1, 2, 3). The term must have x0 frozen, with rate `1 + eta^2`.

    With `noise_scale=None` the solver uses the noise of the term, `phi(n) = n^{1 + eta^2}`. It then differs from
    `ExponentialAdamsBashforth` by the variable of the polynomial, has deterministic order `steps`, weak order 2 (1 for one step) and
    strong order 1, and at eta = 0 stays smooth at zero noise. Any other `phi` replaces the term's noise; `phi` must increase, and
    `phi(n)/n` must not decrease. If the control is exact, the marginals are still those of the term. The paths are those of another
    SDE: the solver has no strong order, and likelihoods of the term's paths do not hold.

    A step of an SDE to zero noise (`n1 = 0`) ends in the newest `D`: an extrapolation would carry the noise of earlier states.

    **Deviation.** The derivatives are those of the interpolating polynomial at its newest node. The released code uses the last
    backward difference for D', so its third-order solver has classical order 2.

    Args:
        steps: 1 to 3.
        noise_scale: `phi(n)` on an array of noise levels, or None for the term's own noise.
        bootstrap: for `steps = 3`, spend four evaluations before the first step on a starting history (see
            `ExponentialAdamsBashforth`).

    ??? cite "Reference"
        ```bibtex
        @article{cui2023ersde, author={Cui, Qinpeng and Zhang, Xinyi and Lu, Zongqing and Liao, Qingmin},
          title={Elucidating the solution space of extended reverse-time {SDE} for diffusion models},
          journal={arXiv:2309.06169}, year={2023}}
        ```
    """

    steps: int = eqx.field(static=True, default=3)
    noise_scale: Callable | None = eqx.field(static=True, default=None)
    bootstrap: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        self._check_steps(3)

    @property
    def weak_order(self) -> int:
        return min(self.steps, 2)

    def order(self, terms) -> int | None:
        return self.steps

    def strong_order(self, terms) -> int | float | None:
        return 1 if self.noise_scale is None else None

    def coordinate(self, clock: Scalar) -> Scalar:
        return jnp.exp(-clock)

    def kernel(self, interval: Interval) -> Kernel:
        c0, c1 = interval.clock
        n0, n1, rate = jnp.exp(-c0), jnp.exp(-c1), jnp.where(interval.rate >= 1, interval.rate, jnp.nan)
        finite = jnp.isfinite(c1)
        h = jnp.where(finite, c1 - c0, 1.0)
        alpha = interval.transition.psi / jnp.where(finite, -jnp.expm1(-rate * h), 1)
        if self.noise_scale is None:
            phi, _, std = interval.transition
        else:
            if jnp.ndim(interval.dw) == 0:
                raise ValueError("ERSDE(noise_scale=...) adds noise, but the term has no path (path=None): use eta > 0.")
            ratio = self.noise_scale(n1) / self.noise_scale(n0)
            phi = jnp.where(finite, interval.transition.phi * jnp.exp(rate * h) * ratio, 0)
            std = alpha * jnp.sqrt(jnp.maximum(n1**2 - (n0 * ratio) ** 2, 0))
        return Kernel(phi, self._moments(alpha, n0, c0, h, rate, finite), std)

    def _moments(self, alpha, n0, c0, h, rate, finite):
        """`alpha1 int theta^j dw` by parts, `theta = (n - n0)/(n1 - n0)`: `1 - w(n0)`, then `1 - j int w theta^{j-1} dtheta`."""
        clocks, weights = gauss_legendre(c0, c0 + h)
        n, n1 = jnp.exp(-clocks), jnp.exp(-c0 - h)
        scale = (lambda n: n**rate) if self.noise_scale is None else self.noise_scale
        w, theta = scale(n1) / scale(n), (n0 - n) / (n0 - n1)
        weights = weights * n / (n0 - n1)  # of dtheta
        start = scale(n1) / scale(n0)
        fractions = [1 - start, *(1 - j * jnp.sum(weights * w * theta ** (j - 1)) for j in range(1, self.steps))]
        noisy = (rate > 1) if self.noise_scale is None else True
        last = [1, *(jnp.where(noisy, 0, 1) for _ in fractions[1:])]  # an SDE at zero noise: the newest control alone
        return tuple(alpha * jnp.where(finite, fraction, end) for fraction, end in zip(fractions, last))
