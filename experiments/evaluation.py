"""What a policy is worth: reward, path KL, distance to the reweighted optimum, diversity."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ctrl_diffusion import Optimum, Reward, Sampler, optimality_gap, path_actions, sample_keys, step_kl
from ctrl_diffusion.optimum import Estimate, mean_and_error
from ctrl_diffusion.rewards import evaluate as evaluate_reward


class Samples(NamedTuple):
    """Final states `[n, *x]`, their rewards `[n]`, and the path KL of each path (`None` where it is not defined)."""

    x: np.ndarray
    rewards: np.ndarray
    path_kl: np.ndarray | None


class Evaluator:
    """Samples policies without exploration, always from the same keys, against one reference. Compiled once."""

    def __init__(self, sampler: Sampler, reward: Reward, reference: Any, scales: jax.Array | None, chunk: int):
        """`scales` are those of the path KL (`Sampler.chain_scales`), or `None` where no path KL is defined.

        `chunk` samples are drawn at a time, always: one compilation, bounded memory.
        """
        self.reward, self.reference, self.scales, self.chunk = reward, reference, scales, chunk

        @jax.jit
        def plain(params, keys):
            return sampler.sample(params, keys)

        @jax.jit
        def with_kl(params, reference, scales, keys):
            path = sampler.trajectory(params, keys)
            a, a_ref = path_actions(sampler.control, params, path), path_actions(sampler.control, reference, path)
            return path.x[-1], jnp.sum(step_kl(scales, a, a_ref), axis=0)

        self._plain, self._with_kl = plain, with_kl

    def reference_samples(self, key: jax.Array, n: int) -> Samples:
        """`n` samples of the reference: path KL zero, not computed."""
        return self._collect(lambda keys: (self._plain(self.reference, keys), None), key, n, "reference")

    def samples(self, params: Any, key: jax.Array, n: int, label: str = "evaluation") -> Samples:
        """`n` samples of the policy `params`; the first `m` of them do not depend on `n`."""
        if self.scales is None:
            return self._collect(lambda keys: (self._plain(params, keys), None), key, n, label)
        return self._collect(lambda keys: self._with_kl(params, self.reference, self.scales, keys), key, n, label)

    def _collect(self, draw: Callable, key: jax.Array, n: int, label: str) -> Samples:
        xs, rewards, kls = [], [], []
        keys = sample_keys(key, n)
        chunk = self.chunk
        for i in tqdm(range(0, n, chunk), desc=f"sampling ({label})", unit="batch", leave=False):
            rows = jnp.minimum(jnp.arange(i, i + chunk), n - 1)  # the last chunk repeats the last sample
            x, kl = draw(keys[rows])
            keep = slice(0, min(chunk, n - i))
            xs.append(np.asarray(x)[keep])
            rewards.append(np.asarray(evaluate_reward(self.reward, x))[keep])
            if kl is not None:
                kls.append(np.asarray(kl)[keep])
        return Samples(np.concatenate(xs), np.concatenate(rewards), np.concatenate(kls) if kls else None)


def summary(samples: Samples, optimum: Optimum | None, reference_reward: Estimate, kl_weight: float) -> dict[str, float | None]:
    """Reward, path KL, objective and gap with standard errors; null where they are not defined."""
    reward = mean_and_error(samples.rewards)
    result: dict[str, float | None] = {"reward": reward.mean, "reward_se": reward.se}
    names = ("path_kl", "objective", "optimality_gap", "relative_gap")
    estimates: tuple[Estimate | None, ...] = (None, None, None, None)
    if samples.path_kl is not None:
        path_kl = mean_and_error(samples.path_kl)
        objective = mean_and_error(samples.rewards - kl_weight * samples.path_kl)
        estimates = (path_kl, objective, None, None)
        if optimum is not None:
            gap = optimality_gap(optimum, reference_reward, samples.rewards, samples.path_kl, kl_weight)
            estimates = (path_kl, gap.objective, gap.gap, gap.relative)
    for name, estimate in zip(names, estimates):
        result |= {name: estimate and estimate.mean, f"{name}_se": estimate and estimate.se}
    return result
