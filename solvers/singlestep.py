r"""Single-step exponential integrators: they have stages at fixed fractions of the clock step, and no memory.

A step of two stages needs the noise of the stage and of the step *jointly*. Both are computed from one Brownian path, by its increment
`W` and space-time Levy area `H` over the step. Independent draws would lower the order by one.
"""

from typing import ClassVar

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp

from .exponential import AbstractSemilinearSolver
from .term import Interval


def standard_pair(interval: Interval):
    """Two independent standard normals of an interval, for its increment and its space-time Levy area; zeros without noise."""
    dw = interval.dw
    if not isinstance(dw, dfx.AbstractSpaceTimeLevyArea):
        return dw, dw
    return dw.W / jnp.sqrt(interval.dt), dw.H * jnp.sqrt(12 / interval.dt)


def inner_time(terms, t0, t1, clock, fraction):
    """The time at `fraction` of the clock step; `t0` if the clock is infinite at the end."""
    c0, c1 = clock
    finite = jnp.isfinite(c1 - c0)
    time = terms.contr(t0, t1, clock_at=(jnp.where(finite, c0 + fraction * (c1 - c0), c0),)).times[0]
    return jnp.where(finite, time, t0)


def _two_stages(terms, t0, t1, y0, args, fraction, stage_noise, step_noise):
    """`x1 = phi x0 + psi ((1 - 1/2r) u(x0) + (1/2r) u(xm)) + noise`; functions of normals and transitions give the noise."""
    whole = terms.contr(t0, t1, use_levy=True, whole_step=True)
    tm = inner_time(terms, t0, t1, whole.clock, fraction)
    part = terms.contr(t0, tm)
    finite = jnp.isfinite(whole.clock[1])
    normals = standard_pair(whole)
    u0 = terms.vf(t0, y0, args).control
    ym = part.transition.phi * y0 + part.transition.psi * u0 + stage_noise(normals, part, whole)
    um = terms.vf(tm, jnp.where(finite, ym, y0), args).control
    slope = jnp.where(finite, (um - u0) / (2 * fraction), 0)
    phi, psi, _ = whole.transition
    y1 = phi * y0 + psi * (u0 + slope) + step_noise(normals, whole)
    return y1, psi * slope, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful


def _exact_stage_noise(normals, part: Interval, whole: Interval):
    """Noise of the stage. Its joint law with `std xi` is exact: their correlation is `Phi(tm, t1) std_m / std`."""
    xi, zeta = normals
    phi_rest = whole.transition.phi / part.transition.phi
    noisy = whole.transition.std > 0
    correlation = jnp.where(noisy, phi_rest * part.transition.std / jnp.where(noisy, whole.transition.std, 1), 0)
    correlation = jnp.minimum(correlation, 1)
    return part.transition.std * (correlation * xi + jnp.sqrt((1 - correlation) * (1 + correlation)) * zeta)


class DPMSolver2S(AbstractSemilinearSolver):
    r"""`xm = phi_m x0 + psi_m u(x0) + N_m`, `x1 = phi x0 + psi ((1 - 1/(2r)) u(x0) + u(xm) / (2r)) + N_1`.

    `xm` is at the fraction r of the clock step. Deterministic order 2, weak order 2, strong order 1. It takes two evaluations. At
    eta = 0 it is DPM-Solver-2 with epsilon frozen (Lu et al. 2022, Algorithm 1) and DPM-Solver++(2S) with x0 frozen. At eta > 0
    with x0 frozen it is DPM-Solver++ SDE as in k-diffusion, on one Brownian path. With epsilon frozen, r = 1/2 and eta = 1 it is SEEDS-2
    (Gonzalez et al. 2023). `N_m` and `N_1` have the joint law of the SDE with frozen control.

    The difference to a one-stage step estimates the error, for adaptive steps.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{lu2022dpm,
          author={Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
          title={{DPM-Solver}: A fast {ODE} solver for diffusion probabilistic model sampling in around 10 steps},
          booktitle={NeurIPS}, year={2022}}
        @inproceedings{gonzalez2023seeds, author={Gonzalez, Martin and Fernandez Pinto, Nelson and Tran, Thuy and Gherbi, Elies and
          Hajri, Hatem and Masmoudi, Nader}, title={{SEEDS}: Exponential {SDE} solvers for fast high-quality sampling from
          diffusion models}, booktitle={NeurIPS}, year={2023}}
        ```
    """

    fraction: float = eqx.field(static=True, default=0.5)
    minimal_levy_area: ClassVar = dfx.AbstractSpaceTimeLevyArea

    def __check_init__(self):
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must lie strictly between 0 and 1.")

    @property
    def weak_order(self) -> int:
        return 2

    def order(self, terms) -> int | None:
        return 2

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump

        def step_noise(normals, whole):
            return whole.transition.std * normals[0]

        return _two_stages(terms, t0, t1, y0, args, self.fraction, _exact_stage_noise, step_noise)


class ExponentialSRA(AbstractSemilinearSolver):
    r"""`DPMSolver2S` at r = 3/4 with the noises of the stochastic Runge-Kutta method SRA1: strong order 3/2.

        N_m = std_m (sqrt(3) xi + zeta) / 2,      N_1 = std (a xi + b zeta) / sqrt(a^2 + b^2)
        a = (Phi(t0, t1) G(t0) + G(t1)) / 2,      b = (Phi(t0, t1) G(t0) - G(t1)) / sqrt(12)

    with `W = sqrt(dt) xi` and `H = sqrt(dt / 12) zeta`. `N_1` is `int Phi(s, t1) G(s) dW` for an integrand linear in time, rescaled to
    the exact variance. `N_m` is such that `(2/3) N_m` is the time integral of the noise, `W/2 + H`. Deterministic order 2, weak order
    2, strong order 3/2. It takes two evaluations and has an error estimate for adaptive steps.

    ??? cite "Reference"
        ```bibtex
        @article{rossler2010sra, author={R{\"o}{\ss}ler, Andreas}, title={{Runge--Kutta} methods for the strong approximation of
          solutions of stochastic differential equations}, journal={SIAM Journal on Numerical Analysis}, volume={48},
          number={3}, pages={922--952}, year={2010}}
        ```
    """

    minimal_levy_area: ClassVar = dfx.AbstractSpaceTimeLevyArea

    @property
    def weak_order(self) -> int:
        return 2

    def order(self, terms) -> int | None:
        return 2

    def strong_order(self, terms) -> int | float | None:
        return 1.5

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump

        def stage_noise(normals, part, whole):
            xi, zeta = normals
            return part.transition.std * (3**0.5 * xi + zeta) / 2

        def step_noise(normals, whole):
            xi, zeta = normals
            start, end = whole.transition.phi * whole.diffusion[0], whole.diffusion[1]
            a, b = (start + end) / 2, (start - end) / 12**0.5
            norm = jnp.sqrt(a**2 + b**2)
            scale = jnp.where(norm > 0, whole.transition.std / jnp.where(norm > 0, norm, 1), 0)
            return scale * (a * xi + b * zeta)

        return _two_stages(terms, t0, t1, y0, args, 0.75, stage_noise, step_noise)


class DPMSolver3S(AbstractSemilinearSolver):
    r"""Three stages, at the fractions 0, r1 and 2/3 of the clock step; for ODEs only.

        x2 = phi_2 x0 + m_0 u(x0) + m_1 (2/3) / r1 (u(x1) - u(x0))          moments over the first 2/3 of the step
        x' = phi x0 + m_0 u(x0) + (3/2) m_1 (u(x2) - u(x0))                  moments over the step

    Deterministic order 3; no noise. It takes three evaluations. It is DPM-Solver-3 with epsilon frozen (Lu et al. 2022, Algorithm 2),
    and DPM-Solver++(3S) with x0 frozen.

    ??? cite "Reference"
        ```bibtex
        @inproceedings{lu2022dpm,
          author={Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
          title={{DPM-Solver}: A fast {ODE} solver for diffusion probabilistic model sampling in around 10 steps},
          booktitle={NeurIPS}, year={2022}}
        ```
    """

    fraction: float = eqx.field(static=True, default=1 / 3)

    def __check_init__(self):
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must lie strictly between 0 and 1.")

    @property
    def weak_order(self) -> None:
        return None

    def order(self, terms) -> int | None:
        return 3

    def strong_order(self, terms) -> int | float | None:
        return None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del solver_state, made_jump
        whole = terms.contr(t0, t1, moments=2, whole_step=True)
        if jnp.ndim(whole.dw):
            raise TypeError(
                "DPMSolver3S integrates ODEs, but the term has noise. Use DPMSolver2S or ExponentialSRA, or eta = 0."
            )
        ta, tb = (inner_time(terms, t0, t1, whole.clock, r) for r in (self.fraction, 2 / 3))
        finite = jnp.isfinite(whole.clock[1])
        first, second = terms.contr(t0, ta), terms.contr(t0, tb, moments=2)
        u0 = terms.vf(t0, y0, args).control
        ya = first.transition.phi * y0 + first.transition.psi * u0
        slope = (terms.vf(ta, jnp.where(finite, ya, y0), args).control - u0) / (1.5 * self.fraction)
        yb = second.transition.phi * y0 + second.moments[0] * u0 + second.moments[1] * slope
        slope = 1.5 * (terms.vf(tb, jnp.where(finite, yb, y0), args).control - u0)
        correction = jnp.where(finite, whole.moments[1] * slope, 0)
        y1 = whole.transition.phi * y0 + whole.moments[0] * u0 + correction
        return y1, correction, dict(y0=y0, y1=y1), None, dfx.RESULTS.successful
