r"""Multistep exponential integrators: over a step the control is a polynomial in the clock through its last values.

    x1 = phi x0 + int Phi(s, t1) B(s) p(clock(s)) ds + std xi,        p(clock_i) = u_i,  i = n, n - 1, ..., n - steps + 1

Every step takes one evaluation. Past controls are in the solver state, with fixed shapes, zeros at the start and a counter. A step that
ends at zero noise (an infinite clock) or follows a jump uses only the newest control.
"""

import abc
from typing import TYPE_CHECKING, Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp

from .exponential import AbstractSemilinearSolver, standard_increment
from .quadrature import integrate_interpolant
from .term import Interval, Scalar

if TYPE_CHECKING:  # to a type checker, a field without a default would have to come first
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar


class History(NamedTuple):
    """Controls of earlier steps, newest first; the first `count` are real."""

    count: Any
    clocks: tuple
    values: tuple

    def push(self, clock, value) -> "History":
        if not self.values:
            return History(self.count + 1, (), ())
        return History(self.count + 1, (clock, *self.clocks[:-1]), (value, *self.values[:-1]))


def no_history(length: int, t0, y0) -> History:
    """Zeros for `length` controls."""
    return History(jnp.zeros((), jnp.int32), (jnp.zeros_like(t0),) * length, (jnp.zeros_like(y0),) * length)


def bootstrap(length: int, terms, t0, t1, y0, args) -> History:
    """A history before `t0`, extrapolated from the control over the first step; it takes four evaluations.

    A trial step (Euler, then the trapezoidal rule) gives the control at the start, middle and end of `[t0, t1]` to third
    order. The quadratic through them is evaluated half steps before `t0`. Without such a history a method of order 3 or more makes its
    first steps with order 1 and 2, and the whole solution has order 2 at most. There is no such loss if the control is stationary in
    the clock at the start, as at nearly pure noise.
    """
    whole = terms.contr(t0, t1, moments=2)
    c0, c1 = whole.clock
    h = c1 - c0
    finite = jnp.isfinite(h)
    middle = terms.contr(t0, t1, clock_at=(jnp.where(finite, c0 + 0.5 * h, c0),)).times[0]
    middle, end = jnp.where(finite, middle, t0), jnp.where(finite, t1, t0)
    u0 = terms.vf(t0, y0, args).control
    trial = jnp.where(finite, whole.transition.phi * y0 + whole.transition.psi * u0, y0)
    slope = terms.vf(end, trial, args).control - u0

    def corrected(t, fraction):
        part = terms.contr(t0, t, moments=2)
        m0, m1 = (jnp.where(finite, m, 0) for m in part.moments)
        y = jnp.where(finite, part.transition.phi, 1) * y0 + m0 * u0 + m1 * fraction * slope
        return terms.vf(t, y, args).control

    um, u1 = corrected(middle, 0.5), corrected(end, 1.0)
    linear, quadratic = 4 * um - 3 * u0 - u1, 2 * (u0 - 2 * um + u1)
    nodes = [-0.5 * (i + 1) for i in range(length)]
    return History(
        jnp.where(finite, length, 0).astype(jnp.int32),
        tuple(jnp.where(finite, c0 + node * h, c0) for node in nodes),
        tuple(u0 + node * linear + node**2 * quadratic for node in nodes),
    )


class Kernel(NamedTuple):
    """`x1 = phi x0 + int kernel p + std xi`, the integral given by `moments`."""

    phi: Scalar
    moments: tuple[Scalar, ...]
    std: Scalar


class AbstractMultistep(AbstractSemilinearSolver):
    """A multistep exponential integrator. Subclasses choose the weights of the polynomial and its variable."""

    steps: AbstractVar[int]
    bootstrap: AbstractVar[bool]

    @abc.abstractmethod
    def kernel(self, interval: Interval) -> Kernel:
        """The step's coefficients."""

    def coordinate(self, clock: Scalar) -> Scalar:
        """The variable of the control's polynomial."""
        return clock

    def init(self, terms, t0, t1, y0, args) -> History:
        if self.bootstrap and self.steps > 2:
            return bootstrap(self.steps - 1, terms, t0, t1, y0, args)
        return no_history(self.steps - 1, t0, y0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        interval = terms.contr(t0, t1, moments=self.steps, whole_step=True)
        u = terms.vf(t0, y0, args).control
        past = solver_state._replace(count=jnp.where(made_jump, 0, solver_state.count))
        c0, c1 = (self.coordinate(c) for c in interval.clock)
        h = c1 - c0
        nodes = [jnp.zeros_like(h), *((self.coordinate(c) - c0) / h for c in past.clocks)]
        known = jnp.where(jnp.isfinite(h), jnp.minimum(past.count + 1, self.steps), 1)
        phi, moments, std = self.kernel(interval)
        y1 = phi * y0 + integrate_interpolant(moments, nodes, [u, *past.values], known) + std * standard_increment(interval)
        return y1, None, dict(y0=y0, y1=y1), past.push(interval.clock[0], u), dfx.RESULTS.successful

    def _check_steps(self, most: int):
        if not (isinstance(self.steps, int) and 1 <= self.steps <= most):
            raise ValueError(f"steps={self.steps} must be an integer from 1 to {most}.")


class ExponentialAdamsBashforth(AbstractMultistep):
    r"""`x1 = phi x0 + int Phi(s, t1) B(s) p(clock(s)) ds + std xi`, integrated exactly: DEIS with polynomials in the log-SNR.

    Deterministic order `steps`, weak order 2 (1 for one step), strong order 1. With epsilon frozen at eta = 0 this is DEIS (Zhang and
    Chen 2023, eq. 14-15) with polynomials in the clock, as in the log-rho variant of public code; the paper's polynomials are in time
    or in `sigma / alpha`. With x0 frozen, `steps=3` is the exact form of DPM-Solver++(3M).

    Args:
        steps: number of controls, 1 to 4.
        bootstrap: for `steps > 2`, compute a starting history by four evaluations before the first step. The order needs it, unless
            the start is nearly pure noise (see `bootstrap`).

    ??? cite "Reference"
        ```bibtex
        @inproceedings{zhang2023deis, author={Zhang, Qinsheng and Chen, Yongxin},
          title={Fast sampling of diffusion models with exponential integrator}, booktitle={ICLR}, year={2023}}
        @article{hochbruck2010exponential, author={Hochbruck, Marlis and Ostermann, Alexander},
          title={Exponential integrators}, journal={Acta Numerica}, volume={19}, pages={209--286}, year={2010}}
        ```
    """

    steps: int = eqx.field(static=True, default=3)
    bootstrap: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        self._check_steps(4)

    @property
    def weak_order(self) -> int:
        return min(self.steps, 2)

    def order(self, terms) -> int | None:
        return self.steps

    def kernel(self, interval: Interval) -> Kernel:
        phi, _, std = interval.transition
        return Kernel(phi, interval.moments, std)


class DPMSolverPP2M(AbstractMultistep):
    r"""`x1 = phi x0 + psi (u_n + (h / 2 h_prev)(u_n - u_{n-1})) + std xi`, `h` the step of the clock (log-SNR).

    Deterministic order 2, weak order 2, strong order 1. With x0 frozen: DPM-Solver++(2M) at eta = 0 (Lu et al. 2022b, Algorithm
    2), SDE-DPM-Solver++(2M) at eta = 1 (their eq. 19); other eta interpolate exactly. With epsilon frozen: the two-step
    DPM-Solver. The factor 1/2 approximates the moment `m_1 / m_0` of `ExponentialAdamsBashforth(2)`, to the same order.

    ??? cite "Reference"
        ```bibtex
        @article{lu2022dpmpp, author={Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
          title={{DPM-Solver++}: Fast solver for guided sampling of diffusion probabilistic models},
          journal={arXiv:2211.01095}, year={2022}}
        ```
    """

    steps: int = eqx.field(static=True, default=2, init=False)
    bootstrap: bool = eqx.field(static=True, default=False, init=False)

    @property
    def weak_order(self) -> int:
        return 2

    def order(self, terms) -> int | None:
        return 2

    def kernel(self, interval: Interval) -> Kernel:
        phi, psi, std = interval.transition
        return Kernel(phi, (psi, 0.5 * psi), std)


class DPMSolverPP3M(AbstractMultistep):
    r"""`x1 = phi x0 + m_0 u_n + m_1 D_1 + curvature m_2 D_2 + std xi`, `D_1, D_2` from the quadratic through three controls.

    `D_1` is the slope of the quadratic and `D_2` half its second derivative, per step of the clock. Deterministic order 3, weak order 2,
    strong order 1. With x0 frozen: DPM-Solver++(3M) at eta = 0 and its SDE form at eta = 1.

    **Deviation.** The published code multiplies the second divided difference by `m_2 / 2`, which is the coefficient of a second
    *derivative*. This is half of the quadratic's term, and the order is 2. `curvature=0.5` reproduces it.

    Args:
        curvature: 1 for the quadratic itself, 0.5 for the published code.
        bootstrap: compute a starting history by four evaluations before the first step (see `ExponentialAdamsBashforth`).

    ??? cite "Reference"
        ```bibtex
        @article{lu2022dpmpp, author={Lu, Cheng and Zhou, Yuhao and Bao, Fan and Chen, Jianfei and Li, Chongxuan and Zhu, Jun},
          title={{DPM-Solver++}: Fast solver for guided sampling of diffusion probabilistic models},
          journal={arXiv:2211.01095}, year={2022}}
        ```
    """

    curvature: float = eqx.field(static=True, default=1.0)
    bootstrap: bool = eqx.field(static=True, default=False)
    steps: int = eqx.field(static=True, default=3, init=False)

    @property
    def weak_order(self) -> int:
        return 2

    def order(self, terms) -> int | None:
        return 3 if self.curvature == 1 else 2

    def kernel(self, interval: Interval) -> Kernel:
        phi, _, std = interval.transition
        m0, m1, m2 = interval.moments
        return Kernel(phi, (m0, m1, self.curvature * m2), std)
