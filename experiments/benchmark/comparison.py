"""The benchmark of the U-Net: this library, a hand-written scan and PyTorch; checked, timed in turn and compared."""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ctrl_diffusion.runs.files import write_atomic
from ctrl_diffusion.stable_diffusion import save_network

from ..commandline import require_at_least
from ..timing import interleaved
from .check import QUICK, check, exact
from .config import Config as Config
from .figure import write_figure
from .floor import floor, large_product, operations
from .gradient import memory, update_of_whole_chain
from .unet import (
    Coefficients,
    Task,
    coefficients,
    hand_update,
    make_task,
    our_loss,
    our_pass,
    our_update,
    predict,
    sampled,
    surrogate,
)

KINDS = ("rollout", "update")
UNITS = {"rollout": "images/s", "update": "update samples/s"}
OURS, SCAN, EAGER, COMPILED = "this library", "lax.scan by hand", "PyTorch", "PyTorch, compiled"
TARGETS = {
    "rollout_ratio_to_scan": 1.05, "update_ratio_to_scan": 1.05, "rollout_speedup_over_torch": 1.5, "update_speedup_over_torch": 1.5,
}  # fmt: skip


def quartiles(values: Sequence[float]) -> list[float]:
    """Median, lower and upper quartile."""
    return [statistics.median(values), float(np.quantile(values, 0.25)), float(np.quantile(values, 0.75))]


def ratio(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Quartiles of the ratios within rounds."""
    return quartiles((np.asarray(first) / np.asarray(second)).tolist())


class Side:
    """One side of the comparison: its name and its calls, or the reason why it has none."""

    def __init__(self, name: str, reason: str = ""):
        self.name, self.reason = name, reason
        self.errors: dict[str, float] = {}
        self.compile_seconds = 0.0
        self.sample: Callable[[], Any] | None = None
        self.update: Callable[[int], Any] | None = None
        self.updates_per_call = 1
        self.seconds: dict[str, list[float]] = {}


def jax_sides(task: Task, c: Coefficients, reference, scan_minibatches: bool) -> list[Side]:
    """The library and the scan, checked; the library's updates one by one or as a pass."""
    ours, scan = Side(OURS), Side(SCAN)
    rows = task.minibatch(0)
    run = sampled(predict(task.graphdef), c, task.recorded.path.x.shape[1])
    loss = jax.jit(jax.value_and_grad(lambda p: surrogate(predict(task.graphdef), c, p, rows)), compiler_options=QUICK)
    ours.errors = check(ours.name, reference, reference.score_tolerance, task.recorded.path.x[-1], *our_loss(task, rows, QUICK))
    scan.errors = check(
        scan.name, reference, reference.tolerance, run(task.behaviour, task.recorded.key)[0][-1], *loss(task.params)
    )
    ours.sample = lambda: task.algorithm.programs["sample"].run(*task.recorded.sample.arguments)
    scan.sample = lambda: run(task.behaviour, task.recorded.key)
    ours.update, scan.update = our_update(task), hand_update(task, c)
    if scan_minibatches:
        ours.update, ours.updates_per_call = our_pass(task), len(task.recorded.order)
    return [ours, scan]


def torch_module(asked: bool, sides: list[Side]) -> tuple[Any, Any]:
    """The module of PyTorch's sides and the device; or `None` twice, and the reason in `sides`."""
    try:
        if not asked:
            raise ValueError("left out by --no-torch")
        from . import pytorch as other

        return other, other.choose_device(jax.default_backend())
    except (ImportError, ValueError) as error:
        missing = isinstance(error, ImportError)
        for side in sides:
            side.reason = f"{error.name} is not installed: pip install 'ctrl-diffusion[benchmark]'" if missing else str(error)
        return None, None


def torch_sides(config: Config, task: Task, c: Coefficients, reference, folder: Path) -> tuple[list[Side], dict[str, Any]]:
    """PyTorch, eager and compiled, checked; or why not. And its version and threads."""
    sides, about = [Side(EAGER), Side(COMPILED)], {"torch": None, "torch_threads": None}
    other, device = torch_module(config.torch, sides)
    if other is None:
        return sides, about
    other.set_precision(False)
    for name, params in (("behaviour", task.behaviour), ("learner", task.params)):
        save_network(nnx.merge(task.graphdef, params).unet, folder / name)
    data = other.as_tensors(task.recorded, c, device)
    for side in sides:
        compiled = side.name == COMPILED
        if compiled and not config.compiled:
            side.reason = "left out by --no-compiled"
            continue
        begin = time.perf_counter()
        try:
            rival = other.Rival(folder / "behaviour", folder / "learner", data, compiled)
            (folder / side.name).mkdir()
            ends, loss, gradient = rival.ends(), *rival.loss_and_gradient(folder / side.name)
        except Exception as error:  # compilers fail in many ways; the row says how
            if not compiled:
                raise
            side.reason = f"torch.compile failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        side.compile_seconds = time.perf_counter() - begin
        side.errors = check(side.name, reference, reference.tolerance, ends, loss, gradient)
        side.sample, side.update = rival.sample, rival.update
    return sides, about | other.versions()


def measure(sides: list[Side], config: Config, counts: Mapping[str, float]) -> dict[str, list[float]]:
    """Times of all sides that have something to call; returns the floor of each kind, given its operations."""
    present = [side for side in sides if side.sample is not None]
    product, size = large_product()
    floors = {}
    for kind in KINDS:
        rounds = [_call(side, kind, config.minibatches) for side in present]
        *found, products = interleaved([*rounds, product], config.repeats, config.pause, kind)
        for side, seconds in zip(present, found):
            side.seconds[kind] = [s / (side.updates_per_call if kind == "update" else 1) for s in seconds]
        floors[kind] = floor(counts[kind], products, size)
    return floors


def count(task: Task, c: Coefficients) -> dict[str, float]:
    """Operations of the networks of a rollout, and of the loss and its gradient of an update."""
    network, states, rows = predict(task.graphdef), task.recorded.path.x, task.minibatch(0)
    once = operations(network, task.params, states[0], jnp.broadcast_to(c.t[0], states.shape[1:2]))
    update = operations(jax.value_and_grad(lambda params, rows: surrogate(network, c, params, rows)), task.params, rows)
    return {"rollout": len(c.t) * once, "update": update}


def _call(side: Side, kind: str, minibatches: int) -> Callable[[], Any]:
    if kind == "rollout":
        return side.sample  # pyright: ignore[reportReturnType]
    update, count = side.update, [0]

    def call():
        count[0] += 1
        return update(count[0] % minibatches)  # pyright: ignore[reportOptionalCall]

    return call


def rows_of(sides: list[Side], per_call: dict[str, int], floors: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """A row per side: seconds, samples per second and share of the peak rate (median, lower and upper quartile), errors, and a reason
    where there are none."""
    rows = []
    for side in sides:
        row: dict[str, Any] = {"name": side.name, "reason": side.reason, "compile_seconds": side.compile_seconds, **side.errors}
        for kind, samples in per_call.items():
            seconds = side.seconds.get(kind)
            row[f"{kind}_seconds"] = None if seconds is None else quartiles(seconds)
            row[f"{kind}_samples_per_second"] = None if seconds is None else quartiles([samples / s for s in seconds])
            row[f"{kind}_share_of_peak"] = None if seconds is None else ratio(floors[kind], seconds)
        rows.append(row)
    return rows


def compared(sides: list[Side], kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """Ratios within rounds: to the scan, and over the faster of the two ways to run PyTorch."""
    ours, scan, *rivals = sides
    found: dict[str, Any] = {}
    for kind in kinds:
        found[f"{kind}_ratio_to_scan"], *spread = ratio(ours.seconds[kind], scan.seconds[kind])
        found[f"{kind}_ratio_to_scan_quartiles"] = spread
        present = [rival for rival in rivals if kind in rival.seconds]
        best = min(present, key=lambda rival: statistics.median(rival.seconds[kind]), default=None)
        speedup = [None, None, None] if best is None else ratio(best.seconds[kind], ours.seconds[kind])
        found[f"{kind}_speedup_over_torch"], *spread = speedup
        found[f"{kind}_speedup_over_torch_quartiles"] = spread
        found[f"{kind}_faster_torch"] = None if best is None else best.name
    return found


def gradient_metrics(config: Config) -> dict[str, Any]:
    """Time of the gradient through the whole chain in small memory over the fast one, and the memory of both."""
    calls = [update_of_whole_chain(config.gradient_steps, config.gradient_batch, 256, 3, small) for small in (True, False)]
    small, fast = interleaved(calls, config.repeats, config.pause, "gradient")
    found, *spread = ratio(small, fast)
    return {
        "gradient_small_over_fast_seconds": found,
        "gradient_small_over_fast_seconds_quartiles": spread,
        "gradient_memory_bytes": memory(config.gradient_batch, 256, 3),
    }


def run(config: Config) -> dict[str, Any]:
    """Check, time and compare; returns the metrics."""
    require_at_least(1, batch=config.batch, steps=config.steps, minibatches=config.minibatches, repeats=config.repeats)
    if config.batch * config.steps % config.minibatches:
        raise ValueError(f"minibatches={config.minibatches} must divide batch * steps = {config.batch * config.steps}.")
    if not config.channels or any(channels % 8 for channels in config.channels):
        raise ValueError(f"channels={config.channels} must be multiples of 8, one per resolution.")
    with jax.default_matmul_precision("float32"):
        task = make_task(config.batch, config.steps, config.minibatches, config.channels)
        c = coefficients(task.process, task.objective.sampler.ts)
        print("checking that all sides give the same samples, loss and gradient")
        reference = exact(task, min(8, config.batch))
    with tempfile.TemporaryDirectory() as folder:
        with jax.default_matmul_precision("float32"):
            sides = jax_sides(task, c, reference, config.scan_minibatches)
            rivals, about = torch_sides(config, task, c, reference, Path(folder))
        sides += rivals
        precision = "tensorfloat32" if config.tf32 else "float32"
        if config.tf32 and about["torch"] is not None:
            from .pytorch import set_precision

            set_precision(True)
        with jax.default_matmul_precision(precision):
            floors = measure(sides, config, count(task, c))
            gradient = gradient_metrics(config) if config.gradient else {}
    transitions_per_update = config.batch * config.steps // config.minibatches
    metrics = compared(sides) | gradient
    metrics |= {
        "sides": rows_of(sides, {"rollout": config.batch, "update": transitions_per_update}, floors),
        "device": jax.devices()[0].device_kind,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        **about,
        "precision": precision,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(task.params)),
        "batch": config.batch,
        "steps": config.steps,
        "transitions_per_update": transitions_per_update,
        "scan_minibatches": config.scan_minibatches,
        "repeats": config.repeats,
    }
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        write_figure(config.out / "benchmark.png", metrics)
        write_atomic(config.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def summary(metrics: dict[str, Any], targets: Mapping[str, float] = TARGETS) -> str:
    """The result in words: a line per side, a line per target; percentages are shares of the rate of a product of large matrices."""
    lines = []
    for row in metrics["sides"]:
        if row["reason"]:
            lines.append(f"{row['name']:18} {row['reason']}")
            continue
        speeds = [(UNITS[kind], row.get(f"{kind}_samples_per_second"), row.get(f"{kind}_share_of_peak")) for kind in KINDS]
        shown = [f"{v[0]:10.4g} {unit} ({share[0]:.0%} of peak)" for unit, v, share in speeds if v is not None]
        lines.append(f"{row['name']:18} {' '.join(shown)}")
    for name, target in targets.items():
        if metrics[name] is not None:
            low, high = metrics[f"{name}_quartiles"]
            bound = "at most" if "ratio" in name else "at least"
            lines.append(f"{name} {metrics[name]:.3f} (quartiles {low:.3f} to {high:.3f}; target {bound} {target})")
    if "gradient_small_over_fast_seconds" in metrics:
        lines.append(
            f"gradient in small memory / fast: {metrics['gradient_small_over_fast_seconds']:.3f} of the time (target at most 2)"
        )
    return "\n".join(lines)
