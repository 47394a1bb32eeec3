r"""The optimum by reweighting reference samples, and the optimality gap measured against it.

    J* = lambda log E_ref exp(r / lambda),    p*(x) = p_ref(x) exp(r(x) / lambda) / Z,    KL(P* || P_ref) = E* r / lambda - log Z

Sample the reference with the *same solver and grid* as the policy, because every chain has its own optimum (docs/mathematics.md).
`J*` is exact if the first and the last state are independent under the reference (memoryless: eta = 1 and enough noise). Otherwise it is
an upper bound, because the law of `X(t0)` is not controlled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .process import AbstractControlledSDE, DiffusionProcess

Values = Float[Array | np.ndarray, " n"]


class Estimate(NamedTuple):
    """A Monte Carlo mean and its standard error."""

    mean: float
    se: float


class Optimum(NamedTuple):
    """The optimal policy's objective, reward and path KL, estimated from the reweighted reference."""

    objective: Estimate  # J*, reward units
    reward: float  # E* r
    path_kl: float  # KL(P* || P_ref), nats
    effective_sample_size: float  # (sum w)^2 / sum w^2
    weights: np.ndarray  # [n], normalised
    is_bound: bool  # J* is an upper bound: the reference is not memoryless


def mean_and_error(values: Values) -> Estimate:
    """Sample mean and `std / sqrt(n)`."""
    values = np.asarray(values, np.float64)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def reweighted_optimum(rewards: Values, kl_weight: float, *, is_bound: bool = False) -> Optimum:
    """Estimate the optimum from rewards of reference samples.

    The standard error of the log-mean-exp is first order (`kl_weight std(w) / (mean(w) sqrt(n))`). Do not trust the estimate if
    `effective_sample_size` is below about 100. `is_bound` is passed on to the result.
    """
    if not kl_weight > 0:
        raise ValueError(
            f"kl_weight={kl_weight} must be positive: without a KL penalty the objective has no maximiser in general."
        )
    r = np.asarray(rewards, np.float64)
    w = np.exp((r - r.max()) / kl_weight)
    log_z = r.max() / kl_weight + np.log(w.mean())
    p = w / w.sum()
    objective = Estimate(float(kl_weight * log_z), float(kl_weight * w.std(ddof=1) / (w.mean() * np.sqrt(len(w)))))
    reward = float(p @ r)
    return Optimum(objective, reward, reward / kl_weight - float(log_z), float(1 / np.sum(p**2)), p, is_bound)


def is_memoryless(process: AbstractControlledSDE, tolerance: float = 0.05) -> bool:
    """Whether the reference forgets its start: for `eta = 1`, `corr(X(t0), X(t1)) <= tolerance` for data of unit variance.

    Under the reverse SDE the pair (start, end) has the noising law, so the correlation is about `alpha(tau_max)` over the
    standard deviation of `X(tau_max)`. For other `eta` this does not hold, and the answer is always no.
    """
    if not isinstance(process, DiffusionProcess) or process.eta != 1:
        return False
    with jax.ensure_compile_time_eval():
        tau = jnp.asarray(process.schedule.tau_max)
        alpha, variance = float(process.schedule.alpha(tau)), float(process.schedule.sigma_squared(tau))
    return alpha / (alpha**2 + variance) ** 0.5 <= tolerance


class Gap(NamedTuple):
    """The optimality gap `J* - J >= 0`: in reward units, and relative to the gap of the reference."""

    objective: Estimate  # J = E[r - kl_weight path_kl]
    gap: Estimate  # J* - J
    relative: Estimate  # (J* - J) / (J* - J_ref); 1 at the reference, 0 at the optimum


def optimality_gap(optimum: Optimum, reference_reward: Estimate, reward: Values, path_kl: Values, kl_weight: float) -> Gap:
    """The gap of a policy, from rewards and path KLs of its own paths. Standard errors are first order."""
    objective = mean_and_error(np.asarray(reward, np.float64) - kl_weight * np.asarray(path_kl, np.float64))
    gap = Estimate(optimum.objective.mean - objective.mean, float(np.hypot(optimum.objective.se, objective.se)))
    scale = optimum.objective.mean - reference_reward.mean
    return Gap(objective, gap, Estimate(gap.mean / scale, gap.se / abs(scale)))
