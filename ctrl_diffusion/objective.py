r"""The control objective, and what every algorithm measures along a path.

    J(a) = E^a[ r(X_T) - int f dt ] - lambda KL(P^a || P^ref)
         = E^a[ r(X_T) - sum_j cost_j - lambda sum_j kl_j ],      kl_j = |scale_j (a - a_ref)(t_j, x_j)|^2 / 2

    V(t_j, x) = E^a[ r(X_T) - sum_{l >= j} (cost_l + lambda kl_l) | x_j = x ]

An *increment* is integrated over a control interval, `V_{j+1} - V_j - cost_j - lambda kl_j`; it is the advantage rate times `dt`
plus a martingale increment, which is what correlates with the noise.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from .exploration import AbstractExploration, Brownian, shift
from .groups import Same, mean_within
from .predictions import expand
from .process import Cond, DiffusionProcess, Params, State
from .rewards import Reward, as_reward
from .sampler import Sampler, log_ratio
from .solvers import ExponentialEuler

Penalty = Callable[[Float[Array, "..."]], Float[Array, "..."]]
Lookahead = Callable[..., State]  # (sampler, params, t, x, action, cond) -> the guess
Conditions = Callable[[Key[Array, ""], int], Cond]


def path_kl(kl: Float[Array, "..."]) -> Float[Array, "..."]:
    """The price of a step is its KL: the objective of the control problem."""
    return kl


def chi_squared(kl: Float[Array, "..."]) -> Float[Array, "..."]:
    """`chi^2 = exp(2 KL) - 1` between Gaussians of equal variance."""
    return jnp.expm1(2 * kl)


def squared_hellinger(kl: Float[Array, "..."]) -> Float[Array, "..."]:
    """`H^2 = 1 - exp(-KL / 4)` between Gaussians of equal variance: bounded by 1 per step."""
    return -jnp.expm1(-0.25 * kl)


def posterior_mean(sampler: Sampler, reference: Params, t, x: State, action: State, cond: Cond = None) -> State:
    """Mean of the final state under the noising law of the score `action` (Tweedie); `x` itself at `t1`."""
    return sampler.process.terminal_mean(t, x, action)


def present_state(sampler: Sampler, reference: Params, t, x: State, action: State, cond: Cond = None) -> State:
    """No look ahead: `x` itself."""
    return x


def few_step_ode(steps: int) -> Lookahead:
    """The end of the reference's probability-flow ODE from `(t, x)`, by `steps` DDIM steps of equal time.

    A flow map, as a consistency model is; not a posterior mean. One step is the posterior mean, up to `tau_min`.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")

    def lookahead(sampler: Sampler, reference: Params, t, x: State, action: State, cond: Cond = None) -> State:
        process = sampler.process
        if not isinstance(process, DiffusionProcess):
            raise TypeError(f"few_step_ode follows a probability flow, which {type(process).__name__} does not have.")
        flow = DiffusionProcess(process.schedule, 0.0)
        h = (process.t1 - t) / steps
        for i in range(steps):
            if i > 0:
                action = sampler.control(reference, t + i * h, x, cond)
            phi, psi, _ = flow.transition(ExponentialEuler(), t + i * h, t + (i + 1) * h)
            x = expand(phi, x) * x + expand(psi, x) * action
        return x

    return lookahead


class Rows(NamedTuple):
    """What a loss is computed on: `[m]` (time, sample) pairs, or `[m, n]` whole paths; `j` is the control interval.

    `signal` is what the estimator computed ahead: advantages `[m]`, target actions `[m, *x]`, or nothing. `x_next` is the state
    at the end of the interval, `weight` what its loss counts (1, unless times are sampled unevenly), `cond` the conditions of the
    rows, arrays `[m, ...]` (`None` where there are none).
    """

    j: Int[Array, "..."]
    x: Float[Array, "..."]
    x_next: Float[Array, "..."]
    noise: Float[Array, "..."]
    a_old: Float[Array, "..."]
    a_ref: Float[Array, "..."]
    x_hat: Float[Array, "..."]
    r_hat: Float[Array, "..."]
    weight: Float[Array, "..."]
    target: Float[Array, "..."]
    signal: Float[Array, "..."]
    cond: Cond = None


class Rollout(NamedTuple):
    """A batch of paths made by an old policy, with what is needed to judge them; `n = K - 1` intervals.

    `cond` are the conditions of the paths, arrays `[b, ...]` (`None` where there are none).
    """

    t: Float[Array, " K"]
    x: Float[Array, "K b *x"]
    noise: Float[Array, "n b *x"]
    a_old: Float[Array, "n b *x"]
    a_ref: Float[Array, "n b *x"]
    x_hat: Float[Array, "n b *x"]
    r_hat: Float[Array, "n b"]
    reward: Float[Array, " b"]
    cond: Cond = None


class Objective(eqx.Module):
    """`J(a) = E^a[r(X_T) - int f dt] - kl_weight KL(P^a || P^ref)` on the chain that a sampler makes.

    Args:
        sampler: process (with its running cost), control, solver and control grid.
        reward: a `Reward`, or any Python function of a numpy batch.
        kl_weight: the temperature lambda, reward units per nat of path KL; at least 0.
        exploration: how paths are made and judged (default `Brownian()`).
        penalty: price of a step as a function of its KL (default: the KL itself; others are f-divergences *per step*).
        lookahead: the guess of the final state that values build on (default `posterior_mean`).
        conditions: what paths are sampled for, such as prompts: the law `(key, n) -> arrays [n, ...]` of an iteration's conditions, which
            control, value and (conditional) reward are given row by row; `None`: there are none.
    """

    sampler: Sampler
    reward: Reward
    kl_weight: float = eqx.field(static=True)
    exploration: AbstractExploration
    penalty: Penalty = eqx.field(static=True)
    lookahead: Lookahead = eqx.field(static=True)
    conditions: Conditions | None = eqx.field(static=True)
    scales: Float[Array, " n"]
    price_scales: Float[Array, " n"]

    def __init__(
        self,
        sampler: Sampler,
        reward: Reward | Callable,
        kl_weight: float,
        *,
        exploration: AbstractExploration | None = None,
        penalty: Penalty = path_kl,
        lookahead: Lookahead = posterior_mean,
        conditions: Conditions | None = None,
    ):
        if not kl_weight >= 0:
            raise ValueError(
                f"kl_weight={kl_weight} must not be negative: it is the temperature lambda, the price per nat of path KL: use 0 for "
                "no price, more for a weaker tilt."
            )
        self.sampler, self.reward, self.kl_weight = sampler, as_reward(reward), float(kl_weight)
        self.exploration = Brownian() if exploration is None else exploration
        self.penalty, self.lookahead, self.conditions = penalty, lookahead, conditions
        self.scales, self.price_scales = self.exploration.scales(sampler), self.exploration.price_scales(sampler)

    @property
    def intervals(self) -> int:
        """Number of control intervals."""
        return len(self.sampler.times) - 1

    def control(self, params: Params, j: Int[Array, " m"], x: State, cond: Cond = None) -> State:
        """Actions at states `[m, *x]` of intervals `j`, under conditions `[m, ...]`."""
        return self.sampler.control(params, self.sampler.ts[j], x, cond)

    def price(self, scales: Float[Array, "..."], a: State, a_ref: State) -> Float[Array, " m"]:
        """Price of intervals in nats (for the KL): `penalty(|scale (a - a_ref)|^2 / 2)`, summed over state dimensions."""
        z = shift(scales, a, a_ref)
        return self.penalty(0.5 * jnp.sum(z**2, axis=tuple(range(1, z.ndim))))

    def step_log_ratio(self, rows: Rows, a: State) -> Float[Array, " m"]:
        """`log dP^a / dP^ref` of recorded intervals, whoever made them; summed over state dimensions."""
        scale = self.scales[rows.j]
        return log_ratio(shift(scale, a, rows.a_old), rows.noise) + _old_to_reference(scale, rows.a_old, rows.a_ref, rows.noise)

    def step_log_ratios(self, rollout: Rollout) -> Float[Array, "n b"]:
        """`log dP^old / dP^ref` of every interval, `old` being the policy that made it; summed over state dimensions."""
        return jax.vmap(_old_to_reference)(self.scales, rollout.a_old, rollout.a_ref, rollout.noise)

    def costs(self, rollout: Rollout) -> Float[Array, "n b"]:
        """Running cost of every interval, `f(t_j, x_j) dt_j`."""
        rate = jax.vmap(self.sampler.process.running_cost)(rollout.t[:-1], rollout.x[:-1])
        return rate * jnp.diff(rollout.t)[:, None]

    def step_prices(self, rollout: Rollout) -> Float[Array, "n b"]:
        """Price of every interval of the old policy, nats (for the KL)."""
        return jax.vmap(self.price)(self.price_scales, rollout.a_old, rollout.a_ref)


def _old_to_reference(scale, a_old, a_ref, noise) -> Float[Array, " m"]:
    return -log_ratio(shift(scale, a_ref, a_old), noise)


def to_go(increments: Float[Array, "n b"]) -> Float[Array, "n b"]:
    """`sum_{l >= j} increment_l`."""
    return jnp.cumsum(increments[::-1], axis=0)[::-1]


def value_increments(values: Float[Array, "K b"], paid: Float[Array, "K-1 b"]) -> Float[Array, "K-1 b"]:
    """`V_{j+1} - V_j - paid_j`: what interval `j` gained, in reward units; it pays its running cost and the price of its KL."""
    return values[1:] - values[:-1] - paid


def advantages(increments: Float[Array, "n b"], dt: Float[Array, " n"], horizon: float) -> Float[Array, "n b"]:
    """`A_j = sum_{l >= j} exp(-(t_l - t_j) / horizon) increment_l`: generalised advantages with a decay per unit *time*.

    Schulman et al. (2016), eq. 16, with `gamma lambda` per step replaced by `exp(-dt / horizon)`, so that the meaning does not
    depend on the step count. `horizon = 0` keeps the increment alone (as in "Score as Action", arXiv 2502.01819);
    `horizon = inf` telescopes to the Monte Carlo return minus the value.
    """
    decay = jnp.exp(-dt / horizon) if horizon > 0 else jnp.zeros_like(dt)

    def backward(following, step):
        increment, decay = step
        advantage = increment + decay * following
        return advantage, advantage

    return jax.lax.scan(backward, jnp.zeros_like(increments[0]), (increments, decay), reverse=True)[1]


Clip = float | tuple[float, float]
"""How far a likelihood ratio may move below and above 1: the same, or two numbers."""


def clipped_surrogate(log_ratio: Float[Array, " n"], advantage: Float[Array, " n"], clip: Clip) -> Float[Array, " n"]:
    """`min(ratio A, clip(ratio, 1 - below, 1 + above) A)` (Schulman et al. 2017, eq. 7); `clip = inf` is `ratio A`."""
    ratio, (below, above) = jnp.exp(log_ratio), both_sides(clip)
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - below, 1 + above) * advantage)


def both_sides(clip: Clip) -> tuple[float, float]:
    """`(below, above)`."""
    return clip if isinstance(clip, tuple) else (clip, clip)


def centre(advantage: Float[Array, "n b"], same: Same = None) -> Float[Array, "n b"]:
    """Subtract the mean over the batch at every time: the batch's own baseline (`same`: over paths of the same condition)."""
    return advantage - mean_within(advantage, same)


def standardise_per_time(advantage: Float[Array, "n b"], same: Same = None) -> Float[Array, "n b"]:
    """Centre and scale to unit standard deviation at every time, over the batch (`same`: over paths of the same condition)."""
    centred = centre(advantage, same)
    return _divided(centred, mean_within(centred**2, same))


def standardise_all(advantage: Float[Array, "n b"], same: Same = None) -> Float[Array, "n b"]:
    """The same over times and paths together."""
    centred = advantage - jnp.mean(mean_within(advantage, same), axis=0)
    return _divided(centred, jnp.mean(mean_within(centred**2, same), axis=0))


def _divided(centred: Float[Array, "n b"], variance: Float[Array, "..."]) -> Float[Array, "n b"]:
    return centred / (jnp.sqrt(variance) + jnp.finfo(centred.dtype).tiny)
