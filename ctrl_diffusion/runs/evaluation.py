"""Evaluation of policies: reward, path KL, gap to the reweighted optimum, diversity."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..diversity import vendi_score
from ..objective import Objective
from ..optimum import Estimate, Optimum, is_memoryless, mean_and_error, optimality_gap, reweighted_optimum
from ..parallel import ONE_DEVICE, Layout, whole
from ..process import Cond, DiffusionProcess
from ..rewards import Reward, compute_rewards
from ..sampler import Sampler, path_actions, step_kl
from ..solvers import sample_keys
from .devices import exists_for_all, is_first
from .files import write_arrays
from .progress import ProgressBar


class Samples(NamedTuple):
    """Final states `[n, *x]`, their rewards `[n]`, and the path KL of each path `[n]`, nats (`None` if it is not defined)."""

    x: np.ndarray
    rewards: np.ndarray
    path_kl: np.ndarray | None


class Evaluator:
    """Samples policies without exploration, and compares them with one reference. It is compiled once for all policies."""

    def __init__(
        self,
        sampler: Sampler,
        reward: Reward,
        reference: Any,
        scales: jax.Array | None,
        chunk: int,
        layout: Layout = ONE_DEVICE,
    ):
        """
        Args:
            sampler: process, control, solver and grid.
            reward: the reward of final states.
            reference: parameters of the reference policy.
            scales: scales of the path KL (`Sampler.chain_scales`), or `None` if no path KL is defined.
            chunk: samples that are drawn at a time, rounded up to a multiple of the number of devices; it bounds memory.
            layout: the devices that share the work.
        """
        chunk = -(-chunk // layout.devices) * layout.devices
        self.reward, self.reference, self.scales, self.chunk, self.layout = reward, reference, scales, chunk, layout

        fixed, rest = eqx.partition(sampler.control, eqx.is_array)
        fixed = layout.put(fixed, layout.parameters)

        def bound(fixed) -> Sampler:
            return eqx.tree_at(lambda s: s.control, sampler, layout.gathering(eqx.combine(fixed, rest)))

        @jax.jit
        def plain(fixed, params, keys, cond):
            return bound(fixed).sample(params, keys, cond)

        @jax.jit
        def with_kl(fixed, params, reference, scales, keys, cond):
            sampler = bound(fixed)
            path = sampler.trajectory(params, keys, cond)
            a, a_ref = (path_actions(sampler.control, p, path, cond) for p in (params, reference))
            return path.x[-1], jnp.sum(step_kl(scales, a, a_ref), axis=0)

        self._plain, self._with_kl = partial(plain, fixed), partial(with_kl, fixed)

    def reference_samples(self, key: jax.Array, n: int, cond: Cond = None, file: Path | None = None) -> Samples:
        """`n` samples of the reference. Their path KL is zero and not computed.

        With a `file` (`.npz`, in a folder that all processes see) they are written there, and read from it by later calls: a run that is
        resumed asks a slow or paid reward nothing twice. Another number of samples is drawn anew.
        """
        if file is not None and exists_for_all(file):
            with np.load(file) as arrays:
                if len(arrays["x"]) == n:
                    return Samples(arrays["x"], arrays["rewards"], None)
        found = self._collect(lambda *rows: (self._plain(self.reference, *rows), None), key, n, cond, "reference")
        if file is not None and is_first():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(file, {"x": found.x, "rewards": found.rewards})
        return found

    def samples(self, params: Any, key: jax.Array, n: int, cond: Cond = None, label: str = "evaluation") -> Samples:
        """`n` samples of the policy `params` under conditions `[n, ...]`. Sample `i` does not depend on `n`."""
        if self.scales is None:
            return self._collect(lambda *rows: (self._plain(params, *rows), None), key, n, cond, label)
        return self._collect(lambda *rows: self._with_kl(params, self.reference, self.scales, *rows), key, n, cond, label)

    def _collect(self, draw: Callable, key: jax.Array, n: int, cond: Cond, label: str) -> Samples:
        xs, rewards, kls = [], [], []
        keys = sample_keys(key, n)
        chunk = self.chunk
        with ProgressBar(-(-n // chunk), f"sampling ({label})", "batch", brief=True) as bar:
            for i in range(0, n, chunk):
                rows = jnp.minimum(jnp.arange(i, i + chunk), n - 1)  # the last chunk repeats the last sample
                given = self.layout.put(jax.tree.map(lambda v, rows=rows: v[rows], (keys, cond)), self.layout.batch)
                x, kl = self.layout.paced(draw(*given))
                keep = slice(0, min(chunk, n - i))
                xs.append(whole(x)[keep])
                rewards.append(whole(compute_rewards(self.reward, x, given[1]))[keep])
                if kl is not None:
                    kls.append(whole(kl)[keep])
                bar.update()
        return Samples(np.concatenate(xs), np.concatenate(rewards), np.concatenate(kls) if kls else None)


def evaluate(
    objective: Objective,
    reference: Any,
    params: Any,
    key: jax.Array,
    *,
    samples: int = 1024,
    reference_samples: int = 4096,
    chunk: int = 1024,
    layout: Layout = ONE_DEVICE,
) -> dict[str, float | bool | None]:
    """Evaluate a policy, the optimum, and the gap between them, from new samples without exploration.

    Args:
        objective: sampler, reward, KL coefficient and conditions.
        reference: parameters of the pre-trained network.
        params: parameters of the policy.
        key: the random key of all samples.
        samples: number of samples of the policy, at least 2.
        reference_samples: number of samples that the optimum is estimated from, at least 2. Read the optimum with
            `effective_sample_size`.
        chunk: samples that all devices together draw at a time; it bounds memory.
        layout: the devices that share the work.

    Returns:
        Means over samples, with standard errors under names that end in `_se`.
        Of the policy: `reward`, `path_kl` (nats), `objective` (`reward - kl_weight path_kl`), `optimality_gap` (reward units) and
        `relative_gap` (1 at the reference, 0 at the optimum). Of the reference: `reward_reference`. Of the optimal policy: `optimum` (its
        objective), `optimum_reward`, `optimum_path_kl`, `effective_sample_size` and `optimum_is_bound` (whether it is an upper bound,
        because the reference is not memoryless).
        Undefined numbers are `None`. These are the path KL and all that depends on it if the sampler has no noise; the optimum and the
        gap also without a KL penalty, or if paths have conditions.

    Raises:
        TypeError: for a process that is no `DiffusionProcess`: its running cost would be left out.
        ValueError: for fewer samples than two.
    """
    sampler, kl_weight = objective.sampler, objective.kl_weight
    if not isinstance(sampler.process, DiffusionProcess):
        raise TypeError(
            f"evaluate ignores running costs, which {type(sampler.process).__name__} may have: use a DiffusionProcess."
        )
    if samples < 2 or reference_samples < 2:
        raise ValueError(
            f"samples={samples} and reference_samples={reference_samples} must be at least 2: standard errors need several samples."
        )
    scales = objective.kl_scales if sampler.is_stochastic else None
    evaluator = Evaluator(sampler, objective.reward, reference, scales, chunk, layout)
    keys = jax.random.split(key, 4)
    conditions = objective.conditions or (lambda key, n: None)
    before = evaluator.reference_samples(keys[0], reference_samples, conditions(keys[1], reference_samples))
    after = evaluator.samples(params, keys[2], samples, conditions(keys[3], samples))
    optimum, start = None, mean_and_error(before.rewards)
    if kl_weight > 0 and objective.conditions is None and scales is not None:
        optimum = reweighted_optimum(before.rewards, kl_weight, is_bound=not is_memoryless(sampler.process))
    return policy_metrics(after, optimum, start, kl_weight) | optimum_metrics(optimum, start, reference_samples)


def policy_metrics(
    samples: Samples, optimum: Optimum | None, reference_reward: Estimate, kl_weight: float
) -> dict[str, float | None]:
    """Reward, path KL, objective and gap of a policy, with standard errors; undefined ones are `None`."""
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


def optimum_metrics(optimum: Optimum | None, reference: Estimate, samples: int) -> dict[str, Any]:
    """Objective, reward and path KL of the optimum, and the reward of the reference."""
    found: dict[str, Any] = {"reward_reference": reference.mean, "reward_reference_se": reference.se}
    found |= {"objective_reference": reference.mean, "optimum_samples": samples}
    if optimum is not None:
        found |= {
            "optimum": optimum.objective.mean,
            "optimum_se": optimum.objective.se,
            "optimum_is_bound": optimum.is_bound,
            "optimum_reward": optimum.reward,
            "optimum_path_kl": optimum.path_kl,
            "effective_sample_size": optimum.effective_sample_size,
        }
    return found


def diversities(data: np.ndarray, reference: np.ndarray, final: np.ndarray, optimum: np.ndarray) -> dict[str, float]:
    """Vendi scores of 512 images each; the bandwidth is half the median distance between images of the data."""
    rows = np.random.default_rng(0).permutation(len(data))[:512]
    flat = data[rows].reshape(len(rows), -1)
    distances = np.linalg.norm(flat[: len(flat) // 2] - flat[len(flat) // 2 : 2 * (len(flat) // 2)], axis=1)
    bandwidth = float(np.median(distances)) / 2
    sets = {"": final[:512], "_reference": reference[:512], "_optimum": optimum[:512], "_data": data[rows]}
    return {f"diversity{name}": vendi_score(x, bandwidth) for name, x in sets.items()}
