"""Times and memory of a solver's solve and of the hand-written scan that it is compared with."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import ctrl_diffusion as cd
from ctrl_diffusion.predictions import V
from ctrl_diffusion.process import DiffusionTerm
from ctrl_diffusion.runs import ProgressBar
from ctrl_diffusion.runs.files import write_atomic
from ctrl_diffusion.solvers import (
    KeyedPath,
    brownian_tree,
    integrate,
    integrate_adaptive,
    levy_area_for,
    sample_keys,
    standard_normal,
    terms_for,
)

from ..commandline import require_known
from ..solver_registry import ADAPTIVE, IMPLICIT, KINDS, ODE, SDE, SolverCase, chosen
from ..timing import interleaved
from .config import Config as Config

SCHEDULE = cd.VPCosine(tau_min=0.02)
MEMORY_STEPS = (25, 100, 400)
TARGETS = {"forward": 1.05, "trivial": 1.1, "gradient": 1.1}
"""Where nothing but the network and the noise should cost; for fixed grids and keyed noise."""


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """A v-prediction `predict(params, x, t)` with parameters, a batch and the shape of a state."""

    predict: Callable
    params: Any
    batch: int
    shape: tuple[int, ...]


@functools.cache
def digits_problem(batch: int, width: int, depth: int) -> Workload:
    """The network of `experiments.digits` with weights that do something: a fresh one predicts zero."""
    shape = (8, 8, 1)
    graphdef, params = nnx.split(cd.ResidualMLP(shape, shape, width=width, depth=depth, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([leaf + 0.05 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])
    return Workload(lambda p, x, t: nnx.merge(graphdef, p)(x, jnp.broadcast_to(t, (len(x),)), None), params, batch, shape)


@functools.cache
def trivial_problem(batch: int) -> Workload:
    """A prediction proportional to the state: one multiplication."""
    return Workload(lambda p, x, t: p * x, jnp.asarray(0.3), batch, (2,))


@functools.partial(jax.jit, static_argnums=1)
def starts(key, problem: Workload) -> tuple[jax.Array, jax.Array]:
    """The batch of states that a solve starts from, and the key of each one's noise."""
    keys = jax.vmap(jax.random.split)(sample_keys(key, problem.batch))
    return cd.DiffusionProcess(SCHEDULE).initial(keys[:, 0], problem.shape), keys[:, 1]


def solve(case: SolverCase, problem: Workload, steps: int, gradient: bool = False, called: Callable | None = None) -> Callable:
    """`run(params, x0, keys)`: final states by this library; `called()` is called at every network evaluation."""
    process = cd.DiffusionProcess(SCHEDULE, case.eta, case.frozen)
    grid = process.grid(steps)

    def control(params, t, x, cond):
        if called is not None:
            jax.debug.callback(called)
        return V.to_score(SCHEDULE, process.tau(t), x, problem.predict(params, x, t))

    def run(params, x0, keys):
        if case.kind == ADAPTIVE:
            path = None
            solver = case.make(None, steps)
            if case.eta > 0:
                path = brownian_tree(solver, process.t0, process.t1, keys[0], x0)
            term = process.term(control, path)
            return integrate_adaptive(term, solver, process.t0, process.t1, x0, (params, None), rtol=1e-2, atol=1e-2).x
        path = None
        if case.draws:
            solver = case.make(None, steps)
            ts = jnp.asarray(grid, x0.dtype)
            path = KeyedPath(ts=ts, keys=keys, shape=problem.shape, levy_area=levy_area_for(solver))
        term = DiffusionTerm(process, control, path if case.eta > 0 else None)
        adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=steps) if gradient else None
        return integrate(term, case.make(path, steps), grid, x0, (params, None), adjoint=adjoint)

    return run


def hand_written(
    problem: Workload,
    steps: int,
    stages: int,
    draws: int,
    extra: int = 0,
    memory: int = 0,
    corrects: bool = False,
    noise_first: bool = False,
    remat: bool = False,
) -> Callable:
    """`run(params, x0, keys)`: `steps` steps of one scan, each of `stages` network calls and `draws` noise draws; precomputed weights.

    A stage denoises the state of the last one, and mixes the state at the start of the step, the controls of the stages, those of
    the last `memory` steps and the noise. With `corrects` the state at the start is first mixed anew from the last step's; with
    `noise_first` the first stage sees the noise, which can then not be drawn while the network is at work. The weights are those of
    some such method (they do not change the cost). `extra` calls come before the first step.
    """
    ts = jnp.asarray(np.linspace(1 - SCHEDULE.tau_max, 1 - SCHEDULE.tau_min, steps + 1), jnp.float32)
    alpha, sigma = SCHEDULE.alpha(SCHEDULE.horizon - ts), SCHEDULE.sigma(SCHEDULE.horizon - ts)
    a0, s0, a1, s1 = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    keep = (s1 / s0) ** 2 * a0 / a1
    std = s1 * jnp.sqrt(1 - (s1 * a0 / (s0 * a1)) ** 2)
    weights = jnp.linspace(1.0, 2.0, stages + memory)
    gain = (a1 - keep * a0)[:, None] * weights / jnp.sum(weights)
    times = ts[:-1, None] + jnp.diff(ts)[:, None] * jnp.linspace(0.0, 1.0, stages)  # of the stages
    tau = SCHEDULE.horizon - times
    rows = (jnp.arange(steps), times, SCHEDULE.alpha(tau), SCHEDULE.sigma(tau), keep, gain, std)

    def run(params, x, keys):
        for _ in range(extra):
            x = x + 1e-3 * problem.predict(params, x, ts[0])

        def step(carry, row):
            (x, base, past), (i, t, a, s, keep, gain, std) = carry, row
            noise = [standard_normal(keys, 2 * i + j, problem.shape, x.dtype) for j in range(draws)]
            y, controls = x, []
            if noise_first:
                y = y + sum(0.5 * std * normal for normal in noise)
            for stage in range(stages):
                controls.append(a[stage] * y - s[stage] * problem.predict(params, y, t[stage]))
                if corrects:
                    x = jnp.where(i > 0, mix(base, gain, [*controls, *past]), x)
                base = keep * x
                for j, normal in enumerate(noise):  # of two draws every stage has a combination of its own
                    base = base + (std if draws == 1 else std / (1 + j + stage)) * normal
                y = mix(base, gain, [*controls, *past[: memory - corrects]])
            return (y, base if corrects else (), (*controls[:1], *past)[:memory]), None

        start = (x, jnp.zeros_like(x) if corrects else (), (jnp.zeros_like(x),) * memory)
        return jax.lax.scan(jax.checkpoint(step) if remat else step, start, rows)[0][0]

    def mix(y, weights, values):
        for weight, value in zip(weights, values):
            y = y + weight * value
        return y

    return run


def scanned(case: SolverCase, problem: Workload, steps: int, remat: bool = False) -> Callable:
    """One scan over the solver's own step: the same arithmetic without diffrax's loop."""
    process, grid = cd.DiffusionProcess(SCHEDULE, case.eta, case.frozen), cd.DiffusionProcess(SCHEDULE, 0.0).grid(steps)

    def control(params, t, x, cond):
        return V.to_score(SCHEDULE, process.tau(t), x, problem.predict(params, x, t))

    def run(params, x, keys):
        ts = jnp.asarray(grid, jnp.float32)
        path = KeyedPath(ts=ts, keys=keys, shape=problem.shape, levy_area=levy_area_for(case.make(None, steps)))
        solver = case.make(path, steps)
        term = terms_for(solver, DiffusionTerm(process, control, path if case.eta > 0 else None))

        def step(carry, interval):
            (y, state), (t0, t1) = carry, interval
            y, _, _, state, _ = solver.step(term, t0, t1, y, (params, None), state, False)
            return (y, state), None

        state = solver.init(term, ts[0], ts[1], x, (params, None))
        return jax.lax.scan(jax.checkpoint(step) if remat else step, (x, state), (ts[:-1], ts[1:]))[0][0]

    return run


def count(case: SolverCase, problem: Workload, steps: int) -> int:
    """Network evaluations of one solve; those inside a Jacobian count once."""
    calls: list[None] = []
    run = jax.jit(solve(case, problem, steps, called=lambda: calls.append(None)))
    jax.block_until_ready(run(problem.params, *starts(jax.random.key(0), problem)))
    jax.effects_barrier()
    return len(calls)


def sides(case: SolverCase, problem: Workload, evaluations: int, gradient: bool = False) -> tuple[Callable, Callable]:
    """The library's solve and the hand-written scan at equal network evaluations, compiled on their first call."""
    steps = scan_steps = max(evaluations // (case.stages or 6), 1)
    stages, extra = case.stages, case.extra
    if not stages:  # counts that depend on the data
        stages, extra = divmod(count(case, problem, steps), steps)
        if case.kind == ADAPTIVE:
            stages, extra, scan_steps = 1, 0, stages * steps + extra
    ours = solve(case, problem, steps, gradient)
    # the tree's noise is not keyed: one draw per sample and call stands for it
    draws = min(case.draws, 1) if case.kind == ADAPTIVE else case.draws
    shape = (scan_steps, stages, draws, extra, case.memory, case.corrects, case.noise_first)
    first, second = _compiled(ours, gradient), _compiled_scan(problem, shape, gradient)
    args = problem.params, *starts(jax.random.key(0), problem)
    return lambda: first(*args), lambda: second(*args)


def _compiled(run: Callable, gradient: bool) -> jax.stages.Wrapped:
    return jax.jit(jax.grad(lambda *args: jnp.sum(run(*args) ** 2)) if gradient else run)


@functools.cache
def _compiled_scan(problem: Workload, shape: tuple[Any, ...], gradient: bool) -> Callable:
    """Solvers of the same shape share one program."""
    return _compiled(hand_written(problem, *shape, remat=gradient), gradient)


def ratio(case: SolverCase, problem: Workload, evaluations: int, repeats: int, gradient: bool = False) -> float:
    """The median over pairs of the time of the library's solve divided by that of the scan."""
    return median_ratio(sides(case, problem, evaluations, gradient), repeats)


def median_ratio(calls: tuple[Callable, Callable], repeats: int, warmup: int = 2) -> float:
    """The median over pairs of the first call's time divided by the second's."""
    times = interleaved(calls, repeats, warmup=warmup)
    return statistics.median((np.asarray(times[0]) / np.asarray(times[1])).tolist())


def step_ratio(case: SolverCase, problem: Workload, evaluations: int, repeats: int, gradient: bool = False) -> float:
    """The same against `scanned`: what the loop costs, whatever the step does."""
    args, steps = (problem.params, *starts(jax.random.key(0), problem)), max(evaluations // case.stages, 1)
    runs = solve(case, problem, steps, gradient), scanned(case, problem, steps, gradient)
    first, second = (_compiled(run, gradient) for run in runs)
    return median_ratio((lambda: first(*args), lambda: second(*args)), repeats)


@functools.cache
def small(problem: Workload) -> Workload:
    """A few states of it: an implicit solver factorises a matrix with a row for every entry of the batch."""
    return dataclasses.replace(problem, batch=min(problem.batch, 16))


def gradient_memory(case: SolverCase, problem: Workload, evaluations: int) -> tuple[int, int]:
    """Bytes of temporary memory of the two compiled gradients, by the compiler's own account."""
    args, steps = (problem.params, *starts(jax.random.key(0), problem)), max(evaluations // case.stages, 1)
    scan = hand_written(problem, steps, case.stages, case.draws, 0, case.memory, case.corrects, case.noise_first, remat=True)
    runs = solve(case, problem, steps, True), scan
    found = []
    for run in runs:
        analysis = _compiled(run, True).lower(*args).compile().memory_analysis()
        if analysis is None:
            raise ValueError("memory=True: this backend does not report the memory of a program; pass --no-memory.")
        found.append(int(analysis.temp_size_in_bytes))
    return found[0], found[1]


def measure(case: SolverCase, config: Config) -> dict[str, Any]:
    """One row of the table."""
    digits, trivial = digits_problem(config.batch, config.width, config.depth), trivial_problem(config.trivial_batch)
    row: dict[str, Any] = dict(
        name=case.name, kind=case.kind, forward=None, trivial=None, gradient=None, own_step={}, memory={}
    )
    if case.kind == IMPLICIT:
        row["trivial"] = ratio(case, small(trivial), config.evaluations, config.repeats)
        return row
    problems = {"forward": digits, "trivial": trivial, "gradient": digits}
    measured = {ADAPTIVE: ("forward",), ODE: ("forward", "gradient"), SDE: tuple(problems)}[case.kind]
    for name in measured:
        repeats = {"forward": config.repeats, "trivial": 5 * config.repeats, "gradient": max(config.repeats // 2, 1)}[name]
        settings = (case, problems[name], config.evaluations, repeats, name == "gradient")
        row[name] = ratio(*settings)
        if case.kind == SDE and row[name] > TARGETS[name]:
            row["own_step"][name] = step_ratio(*settings)
    if case.kind == SDE and config.memory:
        row["memory"] = {str(n): gradient_memory(case, digits, n) for n in MEMORY_STEPS}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown; memory in MiB, this library's / the scan's."""

    def number(row, name):
        own = row["own_step"].get(name)
        return ("" if row[name] is None else f"{row[name]:.2f}") + ("" if own is None else f" ({own:.2f})")

    heads = ["solver", "kind", "forward", "trivial drift", "gradient", *(f"MiB at {n}" for n in MEMORY_STEPS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        memory = [row["memory"].get(str(n)) for n in MEMORY_STEPS]
        cells = [f"`{row['name']}`", row["kind"], *(number(row, name) for name in TARGETS)]
        cells += ["" if pair is None else f"{pair[0] / 2**20:.0f} / {pair[1] / 2**20:.0f}" for pair in memory]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def earlier(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run with the same settings."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        raise ValueError(f"out={path.parent} holds a run with other settings {found['settings']}: choose another folder.")
    return found["solvers"]


def run(config: Config) -> list[dict[str, Any]]:
    """Measure what is not measured yet; returns all rows."""
    if min(config.repeats, config.batch, config.trivial_batch) < 1 or config.evaluations < 4:
        raise ValueError(
            f"repeats={config.repeats}, batch={config.batch} and trivial_batch={config.trivial_batch} must be at least 1, "
            f"evaluations={config.evaluations} at least 4."
        )
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "only", "kinds")}
    path = None if config.out is None else config.out / "metrics.json"
    require_known("kinds", config.kinds, KINDS)
    cases, rows = chosen(config.only, config.kinds), earlier(path, settings)
    measured = {(row["name"], row["kind"]) for row in rows}
    todo = [case for case in cases if (case.name, case.kind) not in measured]
    with ProgressBar(len(cases), "solvers", "solver", done=len(cases) - len(todo)) as bar:
        for case in todo:
            rows.append(measure(case, config))
            if config.out is not None and path is not None:
                config.out.mkdir(parents=True, exist_ok=True)
                write_atomic(config.out / "table.md", table(rows))
                write_atomic(path, json.dumps(dict(settings=settings, solvers=rows), indent=2) + "\n")
            bar.update(note=case.name)
    return rows
