"""The benchmark of sampling Stable Diffusion: this library, a hand-written scan and PyTorch, checked, timed in turn and compared."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import ctrl_diffusion as cd
from ctrl_diffusion import stable_diffusion as sd
from ctrl_diffusion.runs import ProgressBar
from ctrl_diffusion.runs.files import write_atomic
from ctrl_diffusion.solvers import standard_normal

from ..commandline import require_at_least
from ..random_model.config import TINY, Config as RandomModel
from ..random_model.writer import write_random_model
from ..text_to_image.parts import make_attention, suited_attention
from ..timing import interleaved
from .comparison import COMPILED, EAGER, OURS, SCAN, Side, compared, rows_of, summary, torch_module
from .config import TextToImageConfig as Config
from .figure import write_figure
from .floor import floor, large_product, operations

KINDS = ("rollout",)
TARGETS = {"rollout_ratio_to_scan": 1.05, "rollout_speedup_over_torch": 1.0}
ROUNDING = {"float32": 1e-5, "bfloat16": 3e-2}
"""Errors of a UNet's output, over its standard deviation; those of float32 are what the tests of the UNet allow."""
MARGIN = 4  # two sides that are rounded, twice each: the network, and the arithmetic around it


class Chain(NamedTuple):
    """`x' = keep x + gain u + std xi` for the guided prediction `u` at `timestep`, coefficients `[n]`; contexts `[2 b, l, e]`.

    The first half of the contexts is of prompts, the second of the empty one.
    """

    timestep: Any
    keep: Any
    gain: Any
    std: Any
    contexts: Any


class SamplingTask(NamedTuple):
    """A sampler of this library, what it is given, and the same chain written out."""

    sampler: cd.Sampler
    params: Any
    keys: Any
    prompts: Any
    chain: Chain
    start: Float[Array, "b h w c"]
    noise: Float[Array, "n b h w c"]


def make_task(config: Config, folder: Path) -> SamplingTask:
    """The UNet of a folder under random contexts: what they say does not change the cost."""
    dtype = jnp.dtype(config.precision)
    attention = make_attention(config.attention, config.precision)
    unet = sd.load_network(sd.UNet, folder / "unet", dtype=dtype, param_dtype=dtype, cast=True, attention=attention)
    noising = dataclasses.replace(sd.read_noising(folder / "scheduler" / "scheduler_config.json"), set_alpha_to_one=False)
    process, size = noising.process(config.steps), unet.config.sample_size or 64
    height, width = size if isinstance(size, tuple) else (size, size)
    denoise, params, base = sd.split_full(unet)
    contexts = jax.random.normal(jax.random.key(1), (config.batch + 1, 77, unet.config.cross_attention_dim))
    control = sd.GuidedScore(denoise, base, contexts[:-1], contexts[-1], config.guidance, noising, process)
    shape = (height, width, unet.config.in_channels)
    sampler = cd.Sampler(process, control, shape, grid=noising.grid(config.steps))
    keys = cd.sample_keys(jax.random.key(0), config.batch)

    tau, steps = process.tau(sampler.ts[:-1]), sampler.transitions()
    p, q = noising.prediction.coefficients(process.schedule, tau)
    both = jnp.concatenate([contexts[:-1], jnp.broadcast_to(contexts[-1], contexts[:-1].shape)])
    chain = Chain(noising.timestep(tau), steps.phi - steps.psi * p / q, steps.psi / q, steps.std, both)
    start, own = sampler.start(keys)
    noise = jnp.stack([standard_normal(own, 2 * i, shape, start.dtype) for i in range(len(tau))])  # KeyedPath's
    return SamplingTask(sampler, params, keys, jnp.arange(config.batch), chain, start, noise)


def ours(task: SamplingTask):
    """`call()`: the library's sampler, whose arrays are arguments of the program."""
    fixed, rest = eqx.partition(task.sampler.control, eqx.is_array)

    @jax.jit
    def run(fixed, params, keys, prompts):
        sampler = eqx.tree_at(lambda s: s.control, task.sampler, eqx.combine(fixed, rest))
        return sampler.sample(params, keys, prompts)

    return lambda: run(fixed, task.params, task.keys, task.prompts)


def by_hand(task: SamplingTask, guidance: float):
    """`call(rounding)`: the chain as a scan; every prediction is moved by `rounding` of its standard deviation."""
    control = task.sampler.control
    assert isinstance(control, sd.GuidedScore)

    @jax.jit
    def run(params, base, chain: Chain, keys, rounding):
        keys = jax.vmap(jax.random.split)(keys)
        x = task.sampler.process.initial(keys[:, 0], task.sampler.shape)

        def step(x, row):
            i, timestep, keep, gain, std = row
            found = control.denoise(params, base, jnp.concatenate([x, x]), jnp.full(2 * len(x), timestep), chain.contexts)
            text, empty = jnp.split(found.astype(x.dtype), 2)
            u = empty + guidance * (text - empty)
            u = u + rounding * jnp.std(u) * jnp.where(jnp.cos(jnp.arange(u[0].size).reshape(u.shape[1:])) > 0, 1.0, -1.0)
            return keep * x + gain * u + std * standard_normal(keys[:, 1], 2 * i, x.shape[1:], x.dtype), None

        return jax.lax.scan(step, x, (jnp.arange(len(chain.keep)), *chain[:-1]))[0]

    return lambda rounding=0.0: run(task.params, control.base, task.chain, task.keys, jnp.float32(rounding))


def network_alone(task: SamplingTask):
    """`call()`: one evaluation of the UNet on both branches, the floor of a step; and its operations."""
    control = task.sampler.control
    assert isinstance(control, sd.GuidedScore)
    x = jnp.concatenate([task.start, task.start])
    run = jax.jit(lambda params, base, x, contexts: control.denoise(params, base, x, jnp.full(len(x), 500.0), contexts))
    arguments = (task.params, control.base, x, task.chain.contexts)
    return lambda: run(*arguments), operations(run, *arguments)


def check(side: Side, latents, exact: np.ndarray, tolerance: float) -> None:
    """`ValueError` if a side gives other latents than the scan, by more than rounding accounts for."""
    error = float(np.max(np.abs(np.asarray(latents, np.float64) - exact)) / np.std(exact))
    side.errors = {"samples_error": error, "samples_tolerance": tolerance}
    if not error <= tolerance:
        raise ValueError(
            f"{side.name}: latents are off by {error:.1e}, more than the {tolerance:.1e} of rounding: nothing is timed."
        )


def torch_sides(config: Config, task: SamplingTask, folder: Path) -> tuple[list[Side], dict[str, Any]]:
    """PyTorch, eager and compiled, or why not; its version and threads."""
    sides = [Side(EAGER), Side(COMPILED)]
    other, device = torch_module(config.torch, sides)
    if other is None:
        return sides, {"torch": None, "torch_threads": None}
    unet = other.load_as(folder / "unet", config.precision, device)
    arguments = (unet, task.chain, task.start, task.noise, config.guidance)
    sides[0].sample = other.guided_sampling(*arguments)
    if not config.compiled:
        sides[1].reason = "left out by --no-compiled"
        return sides, other.versions()
    try:
        compiled = other.guided_sampling(*arguments, compiled=True)
        compiled()
        sides[1].sample = compiled
    except Exception as error:  # compilers fail in many ways; the row says how
        sides[1].reason = f"torch.compile failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return sides, other.versions()


def run(config: Config) -> dict[str, Any]:
    """Check, time and compare; returns the metrics."""
    require_at_least(1, batch=config.batch, steps=config.steps, repeats=config.repeats)
    with tempfile.TemporaryDirectory() as temporary, jax.default_matmul_precision("float32"):
        folder = Path(config.model)
        if config.model == TINY:
            folder = Path(temporary) / TINY
            write_random_model(RandomModel(folder))
        task = make_task(config, folder)
        scan = by_hand(task, config.guidance)
        exact = np.asarray(scan(), np.float64)
        moved = np.asarray(scan(ROUNDING[config.precision]), np.float64)
        tolerance = MARGIN * float(np.max(np.abs(moved - exact)) / np.std(exact))
        sides = [Side(OURS), Side(SCAN)]
        sides[0].sample, sides[1].sample = ours(task), scan
        rivals, about = torch_sides(config, task, folder)
        sides += rivals
        present = [side for side in sides if side.sample is not None]
        print("checking that all sides give the same latents")
        with ProgressBar(len(present), "checking", "side") as bar:
            for side in present:
                assert side.sample is not None
                check(side, side.sample(), exact, tolerance)
                bar.update(note=side.name)
        calls: list[Any] = [side.sample for side in present]
        network, count = network_alone(task)
        product, size = large_product(jnp.dtype(config.precision))
        *seconds, alone, products = interleaved([*calls, network, product], config.repeats, config.pause, "rollout")
    for side, found in zip(present, seconds):
        side.seconds["rollout"] = found
    steps = len(task.chain.keep)
    metrics = compared(sides, KINDS) | {
        "network_share": float(np.median(steps * np.asarray(alone) / np.asarray(seconds[0]))),
        "sides": rows_of(sides, {"rollout": config.batch}, {"rollout": floor(steps * count, products, size)}),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **about,
        "model": config.model,
        "precision": config.precision,
        "attention": config.attention or suited_attention(config.precision),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(task.params)),
        "batch": config.batch,
        "steps": steps,
        "guidance": config.guidance,
        "repeats": config.repeats,
    }
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_figure(config.out / "benchmark.png", metrics, KINDS)
        write_atomic(config.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def in_words(metrics: dict[str, Any]) -> str:
    """A line per side, a line per target, and what the network takes."""
    share = f"the UNet alone takes {metrics['network_share']:.3f} of this library's time"
    return f"{summary(metrics, TARGETS)}\n{share}"
