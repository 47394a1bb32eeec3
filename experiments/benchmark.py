"""What a rollout costs beyond the network: this library against a hand-written `lax.scan`, interleaved in one run.

    python -m experiments.benchmark --out runs/benchmark

Both use the same network, weights, grid and noise, and must give the same samples. The figure to read is the median of the
pairwise ratios: on a shared machine single times mean little.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

import ctrl_diffusion as cd
from ctrl_diffusion.solvers import standard_normal

from .commandline import execute
from .files import write_atomic


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the benchmark; the defaults are those of `experiments.digits`."""

    out: Path | None = None
    """Folder for `metrics.json` (default: print only)."""
    batch: int = 512
    """Paths per rollout."""
    steps: int = 24
    """Control intervals."""
    width: int = 256
    """Features of the network."""
    depth: int = 3
    """Residual blocks of the network."""
    repeats: int = 30
    """Timed pairs, after two warm-up pairs."""


def hand_written(graphdef, process: cd.DiffusionProcess, ts: jax.Array, shape: tuple[int, ...]) -> Callable:
    """Ancestral sampling of a v-prediction network as anybody would write it: precomputed coefficients and one scan."""
    schedule, tau = process.schedule, process.schedule.horizon - ts
    alpha, sigma = schedule.alpha(tau), schedule.sigma(tau)
    a0, s0, a1, s1 = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    keep = (s1 / s0) ** 2 * a0 / a1
    rows = (jnp.arange(len(ts) - 1), ts[:-1], a0, s0, keep, a1 - keep * a0, s1 * jnp.sqrt(1 - (s1 * a0 / (s0 * a1)) ** 2))

    def rollout(params, keys):
        keys = jax.vmap(jax.random.split)(keys)
        x = sigma[0] * standard_normal(keys[:, 0], 0, shape, ts.dtype)

        def step(x, row):
            i, t, a, s, keep, gain, std = row
            v = nnx.merge(graphdef, params)(x, jnp.broadcast_to(t, (len(x),)), None)
            x0 = a * x - s * v
            noise = standard_normal(keys[:, 1], 2 * i, shape, ts.dtype)
            x = keep * x + gain * x0 + std * noise
            return x, (x, noise)

        _, (xs, noise) = jax.lax.scan(step, x, rows)
        return jnp.concatenate([x[None], xs]), noise

    return jax.jit(rollout)


def interleaved(first: Callable, second: Callable, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each call, in turn, after two warm-up pairs; results are waited for."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in tqdm(range(repeats + 2), desc="timing", unit="pair"):
        for fn, found in zip((first, second), times):
            begin = time.perf_counter()
            jax.block_until_ready(fn())
            if i >= 2:
                found.append(time.perf_counter() - begin)
    return times


def run(config: Config) -> dict[str, float]:
    """Time both and compare their samples; returns the metrics."""
    if config.repeats < 1 or config.batch < 1:
        raise ValueError(f"repeats={config.repeats} and batch={config.batch} must be at least 1.")
    shape = (8, 8, 1)
    process = cd.DiffusionProcess(cd.VPCosine(tau_min=0.02), 1.0)
    network = cd.ResidualMLP(shape, shape, width=config.width, depth=config.depth, rngs=nnx.Rngs(0))
    model = cd.make_model(network, process, shape, grid=process.grid(config.steps))
    # weights that do something: a fresh network predicts zero
    leaves, tree = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([leaf + 0.05 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])
    sampler, exploration = model.sampler, cd.Brownian()
    keys = cd.sample_keys(jax.random.key(0), config.batch)
    ours = jax.jit(lambda params, keys: exploration.trajectory(sampler, params, keys))
    scan = hand_written(nnx.graphdef(network), process, sampler.ts, shape)
    path, (x, noise) = ours(params, keys), scan(params, keys)
    difference = float(jnp.max(jnp.abs(path.x[-1] - x[-1])))
    ours_seconds, scan_seconds = interleaved(lambda: ours(params, keys), lambda: scan(params, keys), config.repeats)
    ratios = np.asarray(ours_seconds) / np.asarray(scan_seconds)
    metrics = {
        "rollout_ratio_to_scan": statistics.median(ratios.tolist()),
        "rollout_ratio_low": float(np.quantile(ratios, 0.25)),
        "rollout_ratio_high": float(np.quantile(ratios, 0.75)),
        "rollout_seconds": statistics.median(ours_seconds),
        "scan_seconds": statistics.median(scan_seconds),
        "max_difference_of_samples": difference,
        "max_difference_of_noise": float(jnp.max(jnp.abs(path.noise - noise))),
        "batch": config.batch,
        "steps": config.steps,
    }
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomic(config.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def sentence(metrics: dict[str, float]) -> str:
    """The result in words."""
    return (
        f"rollout / scan: {metrics['rollout_ratio_to_scan']:.3f} (quartiles {metrics['rollout_ratio_low']:.3f} to "
        f"{metrics['rollout_ratio_high']:.3f}); {1e3 * metrics['rollout_seconds']:.1f} ms against "
        f"{1e3 * metrics['scan_seconds']:.1f} ms; samples differ by at most {metrics['max_difference_of_samples']:.1e}"
    )


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(lambda config: print(sentence(run(config))), Config, __doc__, "experiments.benchmark", args)


if __name__ == "__main__":
    sys.exit(main())
