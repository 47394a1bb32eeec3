"""Error of every solver against network evaluations, on problems with known answers."""

import concurrent.futures
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from ctrl_diffusion.runs import ProgressBar
from ctrl_diffusion.runs.files import write_atomic
from ctrl_diffusion.solvers import brownian_tree, integrate, integrate_adaptive

from ..figures import png
from ..solver_cost import cost as solver_cost
from ..solver_registry import ADAPTIVE, IMPLICIT, KINDS, ODE, SDE, SolverCase, chosen
from .config import Config as Config
from .problems import (
    NO_ARGS,
    both_scores,
    endpoint,
    gaussian_flow,
    gaussian_score,
    grids,
    mixture_score,
    ode_reference,
    process,
    slope,
    weak_errors,
)

PAIR = 2  # solvers that are compiled, and whose errors are computed, at the same time
FLOOR = 1e-11  # errors below are rounding: the reference's and the solver's
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


def rms(error) -> float:
    return float(jnp.sqrt(jnp.mean(error**2)))


@functools.cache
def flow(samples: int):
    """Starts of both ODE problems and where the flow takes them."""
    x0 = jax.random.normal(jax.random.key(0), (2 * samples, 2), jnp.float64)
    return x0, ode_reference(x0, 0.0)


def ode_curve(case: SolverCase, config: Config) -> tuple[list[int], list[float]]:
    """Evaluations and errors of a fixed-grid ODE solver."""
    x0, exact = flow(config.samples)
    counts = [max(n // case.stages, 2) for n in config.evaluations]
    run = endpoint(process(frozen=case.frozen).term(both_scores, None), case.make(None, 1))
    errors = [rms(run(x0, grid, n) - exact) for grid, n in zip(grids(counts), counts)]
    return [n * case.stages for n in counts], errors


def sde_curve(case: SolverCase, config: Config) -> tuple[list[int], list[float]]:
    """Evaluations and weak errors of a fixed-grid SDE solver."""
    counts = [max(n // case.stages, 2) for n in config.evaluations]
    solver = case.make if case.eta == 0 else case.make(None, 1)
    return [n * case.stages for n in counts], weak_errors(case.eta, case.frozen, solver, counts, case.perturbed)


def counted(score, calls: list[None]):
    """The score, with an entry in `calls` for every evaluation."""

    def control(params, t, x, cond):
        jax.debug.callback(lambda: calls.append(None))
        return score(params, t, x, cond)

    return control


def adaptive_curve(case: SolverCase, config: Config) -> tuple[list[int], list[float]]:
    """Evaluations and errors of adaptive steps at a sequence of tolerances."""
    stochastic, solver, calls = case.eta > 0, case.make(None, 1), []
    model, control = process(case.eta, case.frozen), counted(mixture_score if case.eta > 0 else both_scores, calls)
    if stochastic:
        x0, (t0, t1) = jax.random.normal(jax.random.key(0), (config.samples, 2), jnp.float64), (0.3, 0.8)
        path = brownian_tree(solver, t0, t1, jax.random.key(1), x0, 1e-5)
        exact = integrate(model.term(mixture_score, path), solver, np.linspace(t0, t1, 2049), x0, NO_ARGS)
    else:
        (x0, exact), t0, t1, path = flow(config.samples), model.t0, model.t1, None

    @jax.jit
    def run(rtol):
        term = model.term(control, path)
        return integrate_adaptive(term, solver, t0, t1, x0, NO_ARGS, rtol=rtol, atol=rtol, max_steps=8192)

    evaluations, errors = [], []
    for rtol in (1e-1, 3e-2, 1e-2, 3e-3, 1e-3) if stochastic else TOLERANCES:
        calls.clear()
        result = jax.block_until_ready(run(jnp.asarray(rtol)))
        jax.effects_barrier()
        if result.succeeded and len(calls) <= 4 * max(config.evaluations):
            evaluations.append(len(calls))
            errors.append(rms(result.x - exact))
    return evaluations, errors


def implicit_curve(case: SolverCase, config: Config) -> tuple[list[int], list[float]]:
    """Evaluations (a Jacobian counts as one) and errors of an implicit solver on Gaussian data, away from the data end."""
    x0, calls = jax.random.normal(jax.random.key(0), (8, 1), jnp.float64), []
    run = endpoint(process().term(counted(gaussian_score, calls), None), case.make(None, 1))
    evaluations, errors = [], []
    for n in (8, 16, 32, 64):
        ts = jnp.linspace(0.2, 0.8, n + 1)
        calls.clear()
        error = rms(run(x0, jnp.pad(ts, (0, 64 - n), mode="edge"), n) - gaussian_flow(ts[0], ts[-1], x0))
        jax.effects_barrier()
        evaluations.append(len(calls))
        errors.append(error)
    return evaluations, errors


CURVES = {ODE: ode_curve, SDE: sde_curve, ADAPTIVE: adaptive_curve, IMPLICIT: implicit_curve}


def measured_order(evaluations: list[int], errors: list[float]) -> float | None:
    """Least squares of log error on log evaluations over the last three points above rounding; None with fewer than two."""
    good = [(n, e) for n, e in zip(evaluations, errors) if np.isfinite(e) and e > FLOOR][-3:]
    return slope(*zip(*good)) if len(good) > 1 and good[0][0] < good[-1][0] else None


def curve(case: SolverCase, config: Config) -> tuple[list[int], list[float]]:
    """Evaluations and errors."""
    with jax.enable_x64(True):
        return CURVES[case.kind](case, config)


def to_time(case: SolverCase, config: Config) -> tuple[Callable, Callable]:
    """The two solves of `ratio_to_scan`, compiled, and run once."""
    if case.kind == IMPLICIT:
        problem = solver_cost.small(solver_cost.trivial_problem(config.ratio_batch))
    else:
        problem = solver_cost.digits_problem(config.ratio_batch, 256, 3)
    calls = solver_cost.sides(case, problem, config.ratio_evaluations)
    jax.block_until_ready([call() for call in calls])
    return calls


def measure(
    case: SolverCase, config: Config, found: tuple[list[int], list[float]], calls: tuple[Callable, Callable]
) -> dict[str, Any]:
    """One entry of `metrics.json`, with the ratio, which must be timed alone."""
    repeats, warmup = (config.repeats, 1) if case.kind in (ODE, SDE) else (min(config.repeats, 2), 0)  # slow, without a target
    return dict(
        name=case.name,
        kind=case.kind,
        declared_order=case.order,
        measured_order=measured_order(*found),
        ratio_to_scan=solver_cost.median_ratio(calls, repeats, warmup),
        evaluations=found[0],
        errors=found[1],
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with the error at the most evaluations up to 100."""
    lines = ["| solver | kind | declared order | measured order | error (evaluations) | ratio to scan |", "|---" * 6 + "|"]
    for row in rows:
        pairs = [pair for pair in zip(row["evaluations"], row["errors"]) if pair[0] <= 100]
        error = f"{pairs[-1][1]:.1e} ({pairs[-1][0]})" if pairs else ""
        order = "" if row["measured_order"] is None else f"{row['measured_order']:.2f}"
        cells = [f"`{row['name']}`", row["kind"], f"{row['declared_order']:g}", order, error, f"{row['ratio_to_scan']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against evaluations, one panel a kind."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    fig, axes = plt.subplots(1, len(kinds), figsize=(5.2 * len(kinds), 7.4), squeeze=False, layout="constrained")
    labels = {ODE: "RMS error of the endpoint", SDE: "error of mean + variance", ADAPTIVE: "RMS error of the endpoint"}
    for ax, kind in zip(axes[0], kinds):
        shown = [row for row in rows if row["kind"] == kind and row["evaluations"]]
        for i, row in enumerate(shown):
            line, marker = ("-", "--", ":")[i // 10 % 3], "os^Dv"[i % 5]
            ax.loglog(row["evaluations"], row["errors"], marker + line, ms=3.5, lw=1.1, color=f"C{i % 10}", label=row["name"])
        ax.set(title=kind, xlabel="network evaluations", ylabel=labels.get(kind, "RMS error (Gaussian data)"))
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)
    write_atomic(path, png(fig, 120))
    plt.close(fig)


def run(config: Config) -> list[dict[str, Any]]:
    """Measure what is not measured yet, and write table and figure; returns all entries."""
    if config.repeats < 1 or config.samples < 1 or len(config.evaluations) < 2 or min(config.evaluations) < 4:
        raise ValueError(
            f"repeats={config.repeats} and samples={config.samples} must be at least 1, and evaluations={config.evaluations} "
            "two or more numbers of at least 4."
        )
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "only")}
    settings = json.loads(json.dumps(settings))
    if config.out.is_file():
        raise ValueError(f"out={config.out} is a file: give a folder.")
    path = config.out / "metrics.json"
    cases, rows = chosen(config.only), solver_cost.earlier(path, settings)
    todo = [case for case in cases if (case.name, case.kind) not in [(row["name"], row["kind"]) for row in rows]]
    if not todo:
        print(f"finished: {path} holds all of it.")
    config.out.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(PAIR) as pool, ProgressBar(len(todo), "solvers", "solver") as bar:
        for i in range(0, len(todo), PAIR):  # mostly compilation, two at a time
            pair = todo[i : i + PAIR]
            prepared = list(pool.map(lambda case: (curve(case, config), to_time(case, config)), pair))
            for case, (found, calls) in zip(pair, prepared):
                rows.append(measure(case, config, found, calls))
                write_atomic(path, json.dumps(dict(settings=settings, solvers=rows), indent=2) + "\n")
                bar.update()
    write_atomic(config.out / "table.md", table(rows))
    figure(rows, config.out / "solvers.png")
    return rows
