r"""The controlled SDE, its path KL, and the diffusion process, whose action is the score.

Control time `t` runs from noise (`t0`) to data (`t1`). Any controlled SDE here has the action form

    dX = (A(t) X + B(t) a(t, X)) dt + G(t) dW,        KL(P^a || P^ref) = E^a int (B/G)^2 / 2 |a - a_ref|^2 dt   (Girsanov)

For a diffusion process with noising coefficients `f, g` at `tau = horizon - t` and the noise level `eta >= 0`:

    A = -f,   B = c = (1 + eta^2)/2 g^2,   G = eta g,   so the KL rate is  k |a - a_ref|^2,  k = (1 + eta^2)^2 / (8 eta^2) g^2.
"""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import diffrax as dfx
import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .predictions import EPSILON, X0, Prediction, expand
from .schedules import AbstractSchedule
from .solvers import (
    AbstractSemilinearTerm,
    Field,
    Transition,
    check_grid,
    decreasing_inverse,
    gaussian_transition,
    standard_normal,
    uniform,
)

if TYPE_CHECKING:  # to a type checker, a field without a default would have to come first
    from typing import ClassVar as AbstractVar
else:
    from equinox import AbstractVar

Time = Float[Array, ""] | Float[Array, " b"]
State = Float[Array, "b *x"]
Params = Any
Cond = Any
ControlFn = Callable[[Params, Time, State, Cond], State]  # action = control(params, t, x, cond), batched
Args = tuple[Params, Cond]


def check_shape(what: str, found: Any, x: State) -> None:
    """Raise `ValueError` unless a control or network gives one number for each entry of the states. Others would be broadcast."""
    if jnp.shape(found) != x.shape:
        raise ValueError(
            f"{what} returned shape {jnp.shape(found)} for states of shape {x.shape}: return one number for each entry of a state."
        )


class AbstractControlledSDE(eqx.Module):
    """`dX = (A X + B a) dt + G dW` on `[t0, t1]`, with a running cost. The objective needs nothing else of a process."""

    t0: AbstractVar[float]
    t1: AbstractVar[float]

    @abc.abstractmethod
    def coefficients(self, t: Time) -> tuple[Time, Time, Time]:
        """`A, B, G` of the action form, elementwise in `t`."""

    @abc.abstractmethod
    def initial(self, keys, shape: tuple[int, ...], dtype: Any = jnp.float32) -> State:
        """Draw `X(t0)`, one sample per key: `[b, *shape]`."""

    @abc.abstractmethod
    def term(self, control: ControlFn, path: dfx.AbstractBrownianPath | None) -> AbstractSemilinearTerm:
        """The SDE under `control`, as a term to integrate with `args = (params, cond)`."""

    def terminal_mean(self, t: Time, x: State, action: State) -> State:
        """An estimate of the final state from `X(t) = x`, exactly `x` at `t1`. The default is `x` itself."""
        return x

    def running_cost(self, t: Time, x: State) -> Float[Array, " b"]:
        """Running cost rate `f(t, x)`, reward units per unit control time; the default is zero, as in fine-tuning."""
        return jnp.zeros(x.shape[0], x.dtype)

    def transition(self, solver: dfx.AbstractSolver, t0: Time, t1: Time) -> Transition:
        """The Gaussian step `x1 = phi x0 + psi a + std xi` of `solver`; `TypeError` if its steps are not of this form."""
        return gaussian_transition(solver, self.term(_no_control, None), t0, t1)

    def control_scale_rate(self, t: Time) -> Time:
        """`B / G`, which gives the control in units of the noise, `u = (B/G)(a - a_ref)`; per unit action and square-root time."""
        _, b, g = self.coefficients(t)
        return b / g

    def kl_rate(self, t: Time, a: State, a_ref: State) -> Float[Array, " b"]:
        """Path-KL rate `k(t) |a - a_ref|^2`, nats per unit control time, summed over state dimensions; `t` scalar or `[b]`.

        For a deterministic process it is infinite, or nan where the actions agree.
        """
        scale = expand(self.control_scale_rate(t), a)
        return 0.5 * jnp.sum((scale * (a - a_ref)) ** 2, axis=tuple(range(1, a.ndim)))

    def improved_action(self, t: Time, a_ref: State, value_gradient: State, kl_weight: float) -> State:
        """`a_ref + G^2 / (lambda B) grad V`, the maximiser of `B <grad V, a - a_ref> - lambda (B/G)^2 / 2 |a - a_ref|^2`.

        With the gradient of the soft value `V*` it is the optimal action. `t` scalar or `[b]`.
        """
        _, b, g = self.coefficients(t)
        return a_ref + expand(g**2 / (kl_weight * b), a_ref) * value_gradient

    def grid(self, steps: int) -> np.ndarray:
        """`steps` equal steps in control time from `t0` to `t1`."""
        return uniform(self.t0, self.t1, steps)

    def check_grid(self, ts) -> np.ndarray:
        """Return `ts`, checked: it must increase from `t0` to `t1` (up to 1e-6 of the span). Else `ValueError`."""
        ts = check_grid(ts)
        tolerance = 1e-6 * (self.t1 - self.t0)
        if abs(ts[-1] - self.t1) > tolerance:
            raise ValueError(
                f"grid ends at t={ts[-1]:g}, but the data is at t1={self.t1:g}: end it there, for example process.grid(steps)."
            )
        if abs(ts[0] - self.t0) > tolerance:
            raise ValueError(f"grid starts at t={ts[0]:g}, but the process starts at t0={self.t0:g}: use process.grid(steps).")
        return ts


class DiffusionProcess(AbstractControlledSDE):
    r"""Sampling from a diffusion model as a controlled SDE. The action is the score.

    `dX = [-f X + (1 + eta^2)/2 g^2 a(t, X)] dt + eta g dW`. If `a` is the true score, all `eta` have the same marginals. `eta = 0` is the
    probability-flow ODE, `eta = 1` the reverse SDE (Song et al. 2021, eq. 6 and 13). The family in `eta` is the continuous limit of
    DDIM(eta).

    Args:
        schedule: the noise schedule.
        eta: noise level, at least 0, a Python float.
        frozen: the prediction that exponential integrators hold constant over a step (`X0`: DDIM and ancestral sampling).
    """

    schedule: AbstractSchedule
    eta: float = eqx.field(static=True, default=1.0)
    frozen: Prediction = eqx.field(static=True, default=X0)

    def __check_init__(self):
        if not isinstance(self.eta, int | float):
            raise TypeError(f"eta={self.eta!r} must be a Python number: it is compiled in.")
        if not self.eta >= 0:
            raise ValueError(f"eta={self.eta} must be at least 0 (0: probability-flow ODE, 1: reverse SDE).")

    @property
    def t0(self) -> float:
        return self.schedule.horizon - self.schedule.tau_max

    @property
    def t1(self) -> float:
        return self.schedule.horizon - self.schedule.tau_min

    def tau(self, t: Time) -> Time:
        """Noising time of control time `t`."""
        return self.schedule.horizon - t

    def g(self, t: Time) -> Time:
        """The diffusion coefficient `g` of the noising SDE at control time `t`."""
        return jnp.sqrt(self.schedule.g_squared(self.tau(t)))

    def coefficients(self, t: Time) -> tuple[Time, Time, Time]:
        tau = self.tau(t)
        g_squared = self.schedule.g_squared(tau)
        return -self.schedule.f(tau), 0.5 * (1 + self.eta**2) * g_squared, self.eta * jnp.sqrt(g_squared)

    def initial(self, keys, shape: tuple[int, ...], dtype: Any = jnp.float32) -> State:
        """Draw from `N(0, sigma(tau_max)^2)`. The noising law of `X(t0)` differs from it by `alpha(tau_max)` times the data."""
        tau = jnp.asarray(self.schedule.tau_max, dtype)
        return self.schedule.sigma(tau) * standard_normal(keys, 0, shape, dtype)

    def term(self, control: ControlFn, path: dfx.AbstractBrownianPath | None) -> AbstractSemilinearTerm:
        if (path is None) != (self.eta == 0):
            raise ValueError(f"eta={self.eta}: pass path=None exactly when eta is 0 (a deterministic process has no noise).")
        return DiffusionTerm(self, control, path)

    def transition(self, solver: dfx.AbstractSolver, t0: Time, t1: Time) -> Transition:
        phi, psi, std = gaussian_transition(solver, DiffusionTerm(self, _no_control, None), t0, t1)
        p, q = self.frozen.coefficients(self.schedule, self.tau(t0))  # u = p x + q a
        return Transition(phi + psi * p, psi * q, std)

    def denoise(self, t: Time, x: State, score: State) -> State:
        """Tweedie's posterior mean of the data, `(x + sigma^2 a) / alpha`; `t` scalar or `[b]`."""
        return X0.from_score(self.schedule, self.tau(t), x, score)

    def terminal_mean(self, t: Time, x: State, action: State) -> State:
        """Posterior mean of the final state `X(t1)` given `X(t) = x` under the noising law of the score.

        It equals `denoise` if `tau_min = 0`. At `t = t1` it is exactly `x`, so values built on `r(terminal_mean)` have
        `V(t1, x) = r(x)`.
        """
        end = self.tau(jnp.asarray(self.t1, t.dtype))  # tau_min, rounded as tau(t) is
        phi, psi, _ = _x0_transition(self.schedule, 1.0, self.tau(t), end)
        return expand(phi, x) * x + expand(psi, x) * self.denoise(t, x, action)

    def require_noise(self, use: str, remedy: str) -> None:
        """Raise `ValueError` if `eta = 0`: the path KL is then infinite, and steps have no likelihood."""
        if self.eta == 0:
            raise ValueError(f"eta=0: {use} is undefined for a deterministic sampler. {remedy}")


class DiffusionTerm(AbstractSemilinearTerm):
    """A diffusion process under a control, written in the prediction that `process.frozen` names: `u = p x + q a`."""

    process: DiffusionProcess
    action: ControlFn
    path: dfx.AbstractBrownianPath | None

    def control(self, t, x, args: Args) -> State:
        return self.vf(t, x, args).control

    def vf(self, t, y, args: Args) -> Field:
        params, cond = args
        score = self.action(params, t, y, cond)
        check_shape("the control", score, y)
        a, b, g = self.process.coefficients(t)
        u = self.process.frozen.from_score(self.process.schedule, self.process.tau(t), y, score)
        return Field(u, a * y + b * score, g)  # the drift in the action: regular at zero noise

    def coefficients(self, t):
        a, b, g = self.process.coefficients(t)
        p, q = self.process.frozen.coefficients(self.process.schedule, self.process.tau(t))
        return a - b * p / q, b / q, g

    def propagator(self, t0, t1) -> Transition:
        schedule, eta = self.process.schedule, self.process.eta
        tau0, tau1 = self.process.tau(t0), self.process.tau(t1)
        if self.process.frozen is X0:
            return _x0_transition(schedule, eta, tau0, tau1)
        if self.process.frozen is EPSILON:
            return _epsilon_transition(schedule, eta, tau0, tau1)
        return _quadrature_transition(self, t0, t1)

    def clock(self, t):
        """The log-SNR. Network outputs are smooth functions of it."""
        return self.process.schedule.log_snr(self.process.tau(t))

    def time_at(self, clock):
        """The control time of a log-SNR, not before the start of the process."""
        schedule = self.process.schedule
        ends = jnp.log(jnp.asarray([1e-8 * schedule.horizon, schedule.tau_max], clock.dtype))
        return schedule.horizon - jnp.exp(decreasing_inverse(lambda s: schedule.log_snr(jnp.exp(s)), clock, *ends))

    def rate(self):
        r"""`dx0` enters as `e^{-(1 + eta^2)(lambda1 - lambda)} dlambda`, `epsilon` as `e^{lambda1 - lambda} dlambda`."""
        return {X0: 1 + self.process.eta**2, EPSILON: -1.0}.get(self.process.frozen)


def _no_control(params, t, x, cond):
    raise RuntimeError("this term was made for its coefficients only and has no control.")


def _x0_transition(schedule: AbstractSchedule, eta: float, tau0, tau1) -> Transition:
    r"""x0 frozen: `phi = (sigma1/sigma0) e^{-eta^2 h}`, `psi = alpha1 - phi alpha0`, `std^2 = sigma1^2 (1 - e^{-2 eta^2 h})`.

    `h = lambda1 - lambda0` is the step in log-SNR.

    `psi` follows because `x - alpha x0` solves the homogeneous equation. At `sigma1 = 0`, `h` is infinite and phi and std vanish;
    the code uses `e^{-h} = sigma1 alpha0 / (sigma0 alpha1)`, which stays finite. `expm1` keeps the digits of std at small steps.
    """
    alpha0, alpha1 = schedule.alpha(tau0), schedule.alpha(tau1)
    ratio, sigma1 = schedule.sigma(tau1) / schedule.sigma(tau0), schedule.sigma(tau1)
    if eta == 0:
        return Transition(ratio, alpha1 - ratio * alpha0, jnp.zeros_like(ratio))
    exponent = eta**2 * jnp.log(ratio * alpha0 / alpha1)  # -eta^2 h
    phi = ratio * jnp.exp(exponent)
    return Transition(phi, alpha1 - phi * alpha0, sigma1 * jnp.sqrt(-jnp.expm1(2 * exponent)))


def _epsilon_transition(schedule: AbstractSchedule, eta: float, tau0, tau1) -> Transition:
    r"""epsilon frozen: `phi = alpha1/alpha0`, `psi = -(1 + eta^2) alpha1 (n0 - n1)`, `std^2 = eta^2 alpha1^2 (n0^2 - n1^2)`.

    `n = sigma / alpha`.
    """
    alpha0, alpha1 = schedule.alpha(tau0), schedule.alpha(tau1)
    n0, n1 = schedule.sigma(tau0) / alpha0, schedule.sigma(tau1) / alpha1
    return Transition(alpha1 / alpha0, -(1 + eta**2) * alpha1 * (n0 - n1), eta * alpha1 * jnp.sqrt((n0 - n1) * (n0 + n1)))


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def _quadrature_transition(term: AbstractSemilinearTerm, t0, t1) -> Transition:
    r"""Any frozen prediction: `phi = exp int A`, `psi = int phi(s, t1) B(s) ds`, `std^2 = int phi(s, t1)^2 G(s)^2 ds`.

    Integrals by 16-point Gauss-Legendre quadrature.
    """
    nodes, weights = jnp.asarray(_NODES, t0.dtype), jnp.asarray(_WEIGHTS, t0.dtype)

    def integral(fn, lo, hi):
        half = 0.5 * (hi - lo)
        return half * jnp.sum(weights * fn(lo + half * (nodes + 1)))

    def log_phi(s):
        return integral(lambda r: term.coefficients(r)[0], s, t1)

    def phi(s):
        return jnp.exp(eqx.filter_vmap(log_phi)(s))

    psi = integral(lambda s: phi(s) * term.coefficients(s)[1], t0, t1)
    variance = integral(lambda s: phi(s) ** 2 * term.coefficients(s)[2] ** 2, t0, t1)
    return Transition(jnp.exp(log_phi(t0)), psi, jnp.sqrt(variance))
