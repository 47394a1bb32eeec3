"""Heun's method in exponential form, and EDM's stochastic sampler, which adds noise before each step (churn)."""

import math

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp

from .exponential import AbstractSemilinearSolver, standard_increment


def _heun(terms, interval, t0, t1, y0, args, noise):
    """One exponential Heun step over `interval`; an exponential Euler step if the clock is infinite at the end."""
    phi, psi, std = interval.transition
    finite = jnp.isfinite(interval.clock[1])
    u0 = terms.vf(t0, y0, args).control
    y = phi * y0 + psi * u0 + std * noise
    u1 = terms.vf(jnp.where(finite, t1, t0), jnp.where(finite, y, y0), args).control
    correction = jnp.where(finite, 0.5 * psi * (u1 - u0), 0)
    return y + correction, correction


class ExponentialHeun(AbstractSemilinearSolver):
    r"""`x' = phi x0 + psi u(t0, x0) + std xi`, `x1 = phi x0 + psi (u(t0, x0) + u(t1, x')) / 2 + std xi`.

    Deterministic order 2, weak order 2, strong order 1. It takes two evaluations per step and has an error estimate for adaptive
    steps. With epsilon frozen at eta = 0 it is Heun's method in `x / alpha` as a function of `sigma / alpha` (Karras et al. 2022,
    Algorithm 1). A last step to zero noise is an Euler step.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{karras2022edm, author={Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli},
          title={Elucidating the design space of diffusion-based generative models}, booktitle={NeurIPS}, year={2022}}
        ```
    """

    @property
    def weak_order(self) -> int:
        return 2

    def order(self, terms) -> int | None:
        return 2

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        interval = terms.contr(t0, t1, whole_step=True)
        y1, correction = _heun(terms, interval, t0, t1, y0, args, standard_increment(interval))
        return y1, correction, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful


class EDMHeun(AbstractSemilinearSolver):
    r"""EDM's stochastic sampler: raise the noise level from `n0` to `(1 + gamma) n0`, then one Heun step down to `n1`.

        n = sigma / alpha = e^{-clock},  gamma = min(s_churn / steps, sqrt(2) - 1) for s_min <= n0 <= s_max, else 0
        x_hat = (alpha_hat / alpha0) x0 + s_noise alpha_hat sqrt(n_hat^2 - n0^2) xi,    x1 = Heun(x_hat; t_hat -> t1)

    Karras et al. 2022, Algorithm 2. The term must have no noise of its own (eta = 0), and epsilon (as published) or x0 frozen. The
    solver adds the noise: give it a keyed path on its grid, or integrate a term that has a path (its `G` is zero). At `s_churn = 0`
    it is `ExponentialHeun`, of deterministic order 2. With churn and an exact control the marginals are those of the ODE to order 2
    (`weak_order`), because noising and the exact flow preserve them. It approximates no SDE `dx = (A x + B u) dt + G dW`, so it has
    no strong order. Deviation: the noise level is not raised above its value at the start of the process, where schedules end.

    Args:
        s_churn, s_min, s_max, s_noise: as in the paper.
        steps: number of steps of the grid, which `s_churn` is divided by.
        path: the path of the noise; None: the path of the term.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{karras2022edm, author={Karras, Tero and Aittala, Miika and Aila, Timo and Laine, Samuli},
          title={Elucidating the design space of diffusion-based generative models}, booktitle={NeurIPS}, year={2022}}
        ```
    """

    s_churn: float = eqx.field(static=True, default=0.0)
    steps: int = eqx.field(static=True, default=1)
    s_min: float = eqx.field(static=True, default=0.0)
    s_max: float = eqx.field(static=True, default=math.inf)
    s_noise: float = eqx.field(static=True, default=1.0)
    path: dfx.AbstractBrownianPath | None = None

    def __check_init__(self):
        if self.s_churn < 0 or self.steps < 1:
            raise ValueError(f"s_churn={self.s_churn} must be at least 0 (0: no churn) and steps={self.steps} at least 1.")

    @property
    def gamma(self) -> float:
        """Relative rise of the noise level at each step with churn."""
        return min(self.s_churn / self.steps, math.sqrt(2) - 1)

    @property
    def weak_order(self) -> int:
        return 2

    def order(self, terms) -> int | None:
        return 2 if self.s_churn == 0 else None

    def strong_order(self, terms) -> int | float | None:
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        start, y_start = t0, y0
        if self.gamma > 0:
            start, y_start = self._churn(terms, t0, t1, y0)
        # churn moves the start of the step: not one of the grid's
        y1, correction = _heun(terms, terms.contr(start, t1), start, t1, y_start, args, jnp.zeros_like(t0))
        return y1, correction, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful

    def _churn(self, terms, t0, t1, y0):
        whole = terms.contr(t0, t1)
        dw = whole.dw if self.path is None else self.path.evaluate(t0, t1)
        if jnp.ndim(dw) == 0:
            raise ValueError(
                f"EDMHeun(s_churn={self.s_churn}) adds noise, but neither the solver nor the term has a path: pass "
                "path=KeyedPath(ts, keys, shape) to the solver, or set s_churn=0."
            )
        n0 = jnp.exp(-whole.clock[0])
        in_range = (n0 >= self.s_min) & (n0 <= self.s_max)
        raised = terms.contr(t0, t1, clock_at=(whole.clock[0] - math.log1p(self.gamma),)).times[0]
        back = terms.contr(t0, jnp.where(in_range & (raised < t0), raised, t0))
        phi, psi, _ = back.transition
        h = back.clock[1] - back.clock[0]  # negative
        churned = h < 0
        h = jnp.where(churned, h, -1.0)
        frozen_epsilon = (
            back.rate < 0
        )  # phi = alpha_hat / alpha0, psi = alpha_hat (n_hat - n0); else x0: phi = sigma_hat / sigma0
        signal = jnp.where(frozen_epsilon, phi, phi * jnp.exp(h))
        alpha = psi / jnp.where(frozen_epsilon, n0 * jnp.expm1(-h), -jnp.expm1(-h))
        noise = self.s_noise * alpha * n0 * jnp.sqrt(jnp.expm1(-2 * h)) * dw / jnp.sqrt(whole.dt)
        y = jnp.where(churned, signal * y0 + noise, y0)
        return jnp.where(churned, t0 + back.dt, t0), y
