"""DDIM(eta) as published. Between eta = 0 and eta = 1 it differs from the exact propagator of the SDE with x0 frozen."""

import diffrax as dfx
import jax.numpy as jnp

from .exponential import AbstractSemilinearSolver, standard_increment
from .term import Transition


class DDIM(AbstractSemilinearSolver):
    r"""`x1 = alpha1 u + sqrt(sigma1^2 - s^2) (x0 - alpha0 u) / sigma0 + s xi`, `s^2 = eta^2 sigma1^2 (1 - e^{-2h})`.

    `h` is the log-SNR step. Deterministic order 1, weak order 1, strong order 1. Song et al. 2021, eq. 12 and 16. Its noise level
    agrees with that of the SDE to first order only; `ExponentialEuler` adds `sigma1^2 (1 - e^{-2 eta^2 h})`. The two solvers are the same
    at eta = 0 (DDIM) and eta = 1 (ancestral sampling).

    The term must have the rate `1 + eta^2` (a diffusion process with x0 frozen), which eta is computed from. For any other term the
    result is nan. With `d(k) = 1 - e^{-kh}` and `rho^2 = 1 - eta^2 d(2)`, everything follows from the exact transition:

        phi' = phi rho e^{eta^2 h},   psi' = psi (1 - rho e^{-h}) / d(1 + eta^2),   s^2 = std^2 eta^2 d(2) / d(2 eta^2)

    ??? cite "Reference"
        ```bibtex
        @inproceedings{song2021ddim, author={Song, Jiaming and Meng, Chenlin and Ermon, Stefano},
          title={Denoising diffusion implicit models}, booktitle={ICLR}, year={2021}}
        ```
    """

    @property
    def weak_order(self) -> int:
        return 1

    def order(self, terms) -> int | None:
        return 1

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        u = terms.vf(t0, y0, args).control
        interval = terms.contr(t0, t1, whole_step=True)
        phi, psi, std = ddim_transition(interval.transition, interval.rate - 1, interval.clock[1] - interval.clock[0])
        y1 = phi * y0 + psi * u + std * standard_increment(interval)
        return y1, None, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful

    def transition(self, term, t0, t1) -> Transition:
        """The chain's own step."""
        rate = term.rate()
        if rate is None or rate < 1:
            raise TypeError("DDIM needs a term with x0 frozen (for a diffusion process: frozen=X0), whose rate is 1 + eta^2.")
        return ddim_transition(term.propagator(t0, t1), jnp.asarray(rate - 1, t0.dtype), term.clock(t1) - term.clock(t0))


def ddim_transition(exact: Transition, eta_squared, h) -> Transition:
    """DDIM's step, from the exact one. `h` may be infinite, for a step to zero noise."""
    finite = jnp.isfinite(h)
    h = jnp.where(finite, h, 1.0)
    eta_squared = jnp.where(eta_squared < 0, jnp.nan, eta_squared)
    decrease = -jnp.expm1(-2 * h)
    rho = jnp.sqrt(1 - eta_squared * decrease)
    noisy = eta_squared > 0
    share = jnp.where(noisy, eta_squared * decrease / -jnp.expm1(-2 * jnp.where(noisy, eta_squared, 1) * h), 1)
    phi = exact.phi * rho * jnp.exp(eta_squared * h)
    psi = exact.psi * (1 - rho * jnp.exp(-h)) / -jnp.expm1(-(1 + eta_squared) * h)
    return Transition(
        jnp.where(finite, phi, 0 * eta_squared),
        jnp.where(finite, psi, exact.psi + 0 * eta_squared),
        jnp.where(finite, exact.std * jnp.sqrt(share), 0 * eta_squared),
    )
