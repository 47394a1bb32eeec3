r"""Log-density of samples under the probability-flow ODE, by the change of variables along the flow.

    dX/dt = v(t, X),    log p_{t1}(x(t1)) = log p_{t0}(x(t0)) - int_{t0}^{t1} div v(t, x(t)) dt

(Chen et al. 2018, Theorem 1; Song et al. 2021, section 4.3). The flow is always the process at eta = 0; the eta of the given process does
not matter. Its law is the model's density when it samples without noise. If the action is the true score of the noised data, it is the
law of every eta. The flow is integrated from `x(t1) = x` back to `t0`, in ascending `s = t0 + t1 - t`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from .process import Cond, ControlFn, DiffusionProcess, Params, State


class LogLikelihood(NamedTuple):
    """`log p(x)` in nats, its standard error over probes (zero for the exact trace), and the latent `x(t0)`."""

    value: Float[Array, " b"]
    standard_error: Float[Array, " b"]
    latent: State


def exact_divergence(v: Callable[[State], State], x: State) -> Float[Array, "b 1"]:
    """`div v` per sample, by one Jacobian-vector product per state dimension. `v` must treat samples independently."""
    flat = x.reshape(x.shape[0], -1)
    basis = jnp.eye(flat.shape[1], dtype=x.dtype)

    def entry(e):
        tangent = jnp.broadcast_to(e, flat.shape).reshape(x.shape)
        return jnp.sum(jax.jvp(v, (x,), (tangent,))[1] * tangent, axis=tuple(range(1, x.ndim)))

    return jnp.sum(jax.lax.map(entry, basis), axis=0)[:, None]


def hutchinson_divergence(v: Callable[[State], State], x: State, probes: Float[Array, "n b *x"]) -> Float[Array, "b n"]:
    """`e . (dv/dx) e` per sample and probe: unbiased for `div v` if `E e e^T = I`."""

    def estimate(e):
        return jnp.sum(jax.jvp(v, (x,), (e,))[1] * e, axis=tuple(range(1, x.ndim)))

    return jax.lax.map(estimate, probes).T


def rademacher_probes(keys: Key[Array, " b"], count: int, shape: tuple[int, ...], dtype: Any) -> Float[Array, "n b *x"]:
    """`count` random signs per sample, sample `i` from `keys[i]`."""
    signs = jax.vmap(lambda k: jax.random.rademacher(k, (count, *shape), dtype))(keys)
    return jnp.swapaxes(signs, 0, 1)


def log_likelihood(
    process: DiffusionProcess,
    control: ControlFn,
    params: Params,
    x: State,
    cond: Cond = None,
    *,
    keys: Key[Array, " b"] | None = None,
    probes: int = 16,
    log_prior: Callable[[State], Float[Array, " b"]] | None = None,
    solver: dfx.AbstractSolver | None = None,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
    adjoint: dfx.AbstractAdjoint | None = None,
) -> LogLikelihood:
    """`log p(x)` of the state `X(t1) = x` under the probability flow of `control`.

    Args:
        process: the diffusion process; the density is that of `X(t1)`, data noised to `tau_min`.
        control: the action, `control(params, t, x, cond)`.
        x: `[b, *x]`.
        keys: one per sample for Hutchinson's estimator; None for the exact trace (one Jacobian-vector product per dimension).
        probes: number of random probes per sample, at least 2, each held along the whole path.
        log_prior: log-density of `X(t0)`; None: the law that samples start from, `N(0, sigma(tau_max)^2)`.
        solver: any diffrax solver of ODEs with an error estimate; None: `diffrax.Tsit5`.
        rtol, atol: tolerances of the solver's steps.
        max_steps: largest number of steps. If it does not suffice, the log-density is nan.
        adjoint: for gradients, `diffrax.RecursiveCheckpointAdjoint()`; None is forward only.
    """
    if keys is not None and probes < 2:
        raise ValueError(f"probes={probes} must be at least 2 for a standard error; keys=None gives the exact trace.")
    term = replace(process, eta=0.0).term(control, None)
    t0, t1 = jnp.asarray(process.t0, x.dtype), jnp.asarray(process.t1, x.dtype)
    signs = None if keys is None else rademacher_probes(keys, probes, x.shape[1:], x.dtype)

    def backwards(s: Any, state, args):
        y, _ = state
        t = t0 + t1 - s

        def v(y):
            return term.vf(t, y, args).drift

        divergence = exact_divergence(v, y) if signs is None else hutchinson_divergence(v, y, signs)
        return -v(y), -divergence

    solution = dfx.diffeqsolve(
        dfx.ODETerm(backwards),
        dfx.Tsit5() if solver is None else solver,
        t0,
        t1,
        None,
        (x, jnp.zeros((x.shape[0], 1 if signs is None else probes), x.dtype)),
        (params, cond),
        saveat=dfx.SaveAt(t1=True),
        stepsize_controller=dfx.PIDController(rtol=rtol, atol=atol),
        adjoint=dfx.ForwardMode() if adjoint is None else adjoint,
        max_steps=max_steps,
        throw=False,
    )
    latents, changes = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], solution.ys)
    prior = _normal_log_density(process, latents) if log_prior is None else log_prior(latents)
    value = jnp.where(solution.result == dfx.RESULTS.successful, prior + jnp.mean(changes, axis=1), jnp.nan)
    error = jnp.std(changes, axis=1, ddof=1) / jnp.sqrt(probes) if signs is not None else jnp.zeros_like(value)
    return LogLikelihood(value, error, latents)


def _normal_log_density(process: DiffusionProcess, x: State) -> Float[Array, " b"]:
    sigma = process.schedule.sigma(jnp.asarray(process.schedule.tau_max, x.dtype))
    flat = x.reshape(x.shape[0], -1) / sigma
    return -0.5 * jnp.sum(flat**2, axis=1) - flat.shape[1] * (jnp.log(sigma) + 0.5 * jnp.log(2 * jnp.pi))
