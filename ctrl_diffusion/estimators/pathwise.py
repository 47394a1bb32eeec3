r"""Gradients through the sampler: simulate `K` steps of the chain from recorded states, and differentiate the value at their end.

    grad E[ w_j (V(t_{j+K}, x_{j+K}) - costs) - lambda sum_{l < K} penalty_{j+l} ],
    x_{l+1} = phi_l x_l + psi_l a_theta(t_l, x_l) + std_l xi_l

With `K = 1` and recorded states held fixed this is the gradient of the advantage rate. States may come from any policy.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..critics import Critic
from ..objective import Objective
from ..predictions import expand
from ..process import Params
from ..rollout import Fields, Rollout, Transitions
from ..x0_prediction import present_state
from .base import AbstractEstimator, Calls, Metrics, Models, require_differentiable

Credit = Callable[[Objective], Float[Array, " n"]]
Starts = Callable[[int], np.ndarray]


def undiscounted(objective: Objective) -> Float[Array, " n"]:
    """Weight 1 at every time."""
    return jnp.ones(objective.intervals, objective.sampler.dtype)


def discount_per_step(gamma: float) -> Credit:
    """`gamma^(steps to go)`, counted after the step, as published for SQDF. It depends on the number of steps."""

    def credit(objective: Objective) -> Float[Array, " n"]:
        return jnp.asarray(gamma ** np.arange(objective.intervals)[::-1], objective.sampler.dtype)

    return credit


def discount_per_time(horizon: float) -> Credit:
    """`exp(-(t1 - t)/horizon)` at the end of the interval. It does not depend on the number of steps."""

    def credit(objective: Objective) -> Float[Array, " n"]:
        ts = objective.sampler.grid
        return jnp.asarray(np.exp(-(ts[-1] - ts[1:]) / horizon), objective.sampler.dtype)

    return credit


def every_start(intervals: int) -> np.ndarray:
    """Windows from every recorded state."""
    return np.arange(intervals)


def last(steps: int) -> Starts:
    """One window per path, over its last `steps` steps."""
    return lambda intervals: np.asarray([max(intervals - steps, 0)])


def late(fraction: float) -> Starts:
    """Windows that start in the last `fraction` of the intervals."""
    return lambda intervals: np.arange(intervals - max(1, round(fraction * intervals)), intervals)


class Pathwise(AbstractEstimator):
    """Differentiates `w V(t_{j+K}, x_{j+K}) - lambda penalty` through `K = steps` steps of the chain. Windows end at `t1` at the latest.

    Args:
        steps: number of steps; 0 differentiates the value at the recorded state through the *policy's* x0 prediction (ReFL).
        starts_in: the intervals that windows start in, a function of the number of intervals (`every_start`, `last(K)`, `late(fraction)`).
        credit: weights `w` `[n]` of the value, by the interval that a window starts in (`undiscounted`, `discount_per_step`, ...).
        small_memory: recompute steps in the backward pass: memory grows with the root of the number of steps, for two more forward passes.
    """

    steps: int = eqx.field(static=True, default=1)
    starts_in: Starts = eqx.field(static=True, default=every_start)
    credit: Credit = eqx.field(static=True, default=undiscounted)
    small_memory: bool = eqx.field(static=True, default=False)
    whole_paths: bool = eqx.field(static=True, default=False, init=False)

    def __check_init__(self):
        if self.steps < 0:
            raise ValueError(
                f"steps={self.steps} must be at least 0: it is the number of sampler steps to differentiate through."
            )

    @property
    def needs_likelihood(self) -> bool:
        return False

    def starts(self, objective: Objective) -> np.ndarray:
        """Without a differentiable reward, only windows that end before `t1`."""
        starts = self.starts_in(objective.intervals)
        return starts if objective.reward.differentiable else starts[starts + self.steps < objective.intervals]

    def check(self, objective: Objective, critic: Critic) -> None:
        if critic.value.uses_reward or not len(self.starts(objective)):
            require_differentiable(objective, f"a gradient through {self.steps} steps of the sampler and a value of the reward")
        objective.sampler.transitions()

    def fields(self, objective: Objective) -> Fields:
        paths = {"noise"} if self.steps > 1 else set()
        transitions = ({"noise"} if self.steps else set()) | ({"a_ref"} if objective.penalised else set())
        return Fields(frozenset(paths), frozenset(transitions))

    def policy_target(self, objective: Objective, critic: Critic, models: Models, rollout: Rollout, values):
        """Noise of the steps after the first, `[s, b, K - 1, *x]` for `s` starts, zeros beyond the end; `None` for one step."""
        n, later = objective.intervals, max(self.steps - 1, 0)
        if not later:
            return None
        j = self.starts(objective)[:, None] + 1 + np.arange(later)
        noise = jnp.where((j < n).reshape(j.shape + (1,) * (rollout.noise.ndim - 1)), rollout.noise[np.minimum(j, n - 1)], 0)
        return jnp.moveaxis(noise, 1, 2)

    def loss_calls(self, objective: Objective, critic: Critic) -> Calls:
        """The policy at every step, the reference at all but the first if penalised, and x0 prediction and reward at the end."""
        reference = max(self.steps - 1, 0) if objective.penalised else 0
        predicted = 1 if critic.value.uses_reward and objective.x0_prediction is not present_state else 0
        return Calls(gradient=max(self.steps, 1) + reference + predicted, reward=int(objective.reward.differentiable))

    def loss(self, objective: Objective, critic: Critic, params: Params, models: Models, transitions: Transitions):
        ts, n = objective.sampler.ts, objective.intervals
        starts = self.starts(objective)
        credit = self.credit(objective)[transitions.j]
        if self.steps == 0:  # the policy's own x0 prediction
            value = critic(models.value, objective, params, ts[transitions.j], transitions.x, transitions.cond)
            total = credit * value
            if objective.penalised:
                a = objective.control(params, transitions.j, transitions.x, transitions.cond)
                total = total - objective.kl_weight * objective.step_penalty(
                    objective.kl_scales[transitions.j], a, transitions.a_ref
                )
            return -len(starts) * jnp.mean(transitions.weight * total), {"mean_value": jnp.mean(value)}

        x, gained = self._step(
            objective, params, transitions.j, transitions.x, transitions.cond, transitions.noise, transitions.a_ref
        )

        def body(carry, i):
            x, gained = carry
            # read in place: no copy of all
            noise = jax.lax.dynamic_index_in_dim(transitions.policy_target, i - 1, axis=1, keepdims=False)
            j = transitions.j + i
            inside = j < n
            j = jnp.minimum(j, n - 1)
            cost = objective.sampler.process.running_cost(ts[j], x) * (ts[j + 1] - ts[j])
            a_ref = objective.control(models.reference, j, x, transitions.cond) if objective.penalised else None
            x_next, gain = self._step(objective, params, j, x, transitions.cond, noise, a_ref)
            return (
                jnp.where(expand(inside.astype(x.dtype), x) > 0, x_next, x),
                gained + jnp.where(inside, gain - credit * cost, 0),
            ), None

        x, gained = _scan(body, (x, gained), 1 + jnp.arange(self.steps - 1), self.small_memory)
        value = critic(
            models.value, objective, models.reference, ts[jnp.minimum(transitions.j + self.steps, n)], x, transitions.cond
        )
        metrics: Metrics = {"mean_value": jnp.mean(value)}
        # every window that a step lies in penalises it: divided by their number, which is the same away from the ends
        return -len(starts) / self._overlap(n, starts) * jnp.mean(transitions.weight * (credit * value + gained)), metrics

    def _step(self, objective: Objective, params: Params, j, x, cond, noise, a_ref):
        """One step of the chain and minus its penalty."""
        phi, psi, std = (expand(v[j], x) for v in objective.sampler.transitions())
        a = objective.control(params, j, x, cond)
        gain = jnp.zeros(x.shape[0], x.dtype)
        if objective.penalised:
            gain = -objective.kl_weight * objective.step_penalty(objective.kl_scales[j], a, a_ref)
        return phi * x + psi * a + std * noise, gain

    def _overlap(self, n: int, starts: np.ndarray) -> int:
        """The number of windows that a step lies in, at most."""
        return int(np.max(np.sum((np.arange(n) >= starts[:, None]) & (np.arange(n) < starts[:, None] + self.steps), axis=0)))


def _scan(body, carry, indices: Int[Array, " k"], small_memory: bool):
    """The final carry of `lax.scan` over indices; `small_memory`: checkpointed steps in checkpointed blocks, a root of the number each."""
    if not len(indices):
        return carry
    if not small_memory or len(indices) < 4:
        return jax.lax.scan(body, carry, indices)[0]
    size = math.isqrt(len(indices))
    blocks = len(indices) // size
    body = jax.checkpoint(body)
    block = jax.checkpoint(lambda carry, indices: (jax.lax.scan(body, carry, indices)[0], None))
    carry = jax.lax.scan(block, carry, indices[: blocks * size].reshape(blocks, size))[0]
    return jax.lax.scan(body, carry, indices[blocks * size :])[0]
