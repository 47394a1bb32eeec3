"""The leaderboard: which units there are, and how they are solved, in several processes where that helps."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import queue
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from ctrl_diffusion.parallel import ONE_DEVICE, Layout
from ctrl_diffusion.runs import ProgressBar, Results, RunDirectory, describe, is_first

from ..commandline import require_at_least, require_known
from .config import Config as Config
from .report import write_report
from .setup import PROBLEMS
from .units import ENTRIES, Budget, budget_for, solve, why_not

QUICK = ("score_as_action", "dpok", "adjoint_matching", "log_variance")
EVERYWHERE = ("adjoint_matching_bootstrapped", "log_variance")


class Unit(NamedTuple):
    algorithm: str
    problem: str
    seed: int
    budget: Budget

    @property
    def name(self) -> str:
        return f"{self.algorithm}-{self.problem}-{self.seed}"


def units(config: Config) -> list[Unit]:
    """The units of a configuration, in the order of the table: the ring first."""
    require_known("algorithms", config.algorithms, ENTRIES)
    require_known("problems", config.problems, PROBLEMS)
    if config.quick and config.full:  # the command line refuses them together; this is for callers from Python
        raise ValueError("quick=True and full=True: choose one.")
    require_at_least(1, seeds=config.seeds, workers=config.workers, iterations=config.iterations)
    seeds = (3 if config.full else 1) if config.seeds is None else config.seeds
    chosen = [
        Unit(algorithm, problem, seed, _budget(config, algorithm, problem))
        for problem in (config.problems or PROBLEMS)
        for algorithm in (config.algorithms or ENTRIES)
        for seed in range(seeds)
        if why_not(algorithm, problem) is None and (config.full or _selected(config, algorithm, problem))
    ]
    if not chosen:
        raise ValueError("none of these algorithms applies to any of these problems: see docs/exact.md, or add --full.")
    return chosen


def _selected(config: Config, algorithm: str, problem: str) -> bool:
    if config.quick:
        return problem == "ring_linear" and algorithm in QUICK
    return problem == "ring_linear" or algorithm in EVERYWHERE or bool(config.algorithms)


def _budget(config: Config, algorithm: str, problem: str) -> Budget:
    budget = budget_for(algorithm, problem)
    if config.iterations is not None:
        return budget._replace(iterations=config.iterations)
    return budget._replace(iterations=max(1, budget.iterations // 12)) if config.quick else budget


def run(config: Config) -> dict[str, Any]:
    """Run what is missing, and write `metrics.json`, `table.md` and the figures; returns the metrics."""
    layout = config.devices.start()
    workers, todo = _workers(config, layout), units(config)
    settings = dataclasses.asdict(config) | {"units": [[*unit[:3], list(unit.budget)] for unit in todo]}
    directory = RunDirectory(config.out, {k: v for k, v in settings.items() if k not in ("out", "workers", "devices")})
    if (finished := directory.finished("table.md")) is not None:
        return finished
    print(describe(layout) + f"; {workers} unit(s) at a time")
    results = Results(config.out / "units")
    missing = [unit for unit in todo if not results.has(unit.name)]
    with ProgressBar(len(todo), "units", "unit", done=len(todo) - len(missing)) as bar:
        for name, gap in _solved(missing, workers, layout, results):
            bar.update(note=name if gap is None else f"{name}: gap {100 * gap:.2f} %")
    found = results.read(unit.name for unit in todo)
    metrics = {"results": [{k: v for k, v in result.items() if k != "history"} for result in found]}
    if is_first():
        write_report(config.out, found)
        print((config.out / "table.md").read_text())
    directory.finish(metrics)
    return metrics


def _workers(config: Config, layout: Layout) -> int:
    """Processes that solve units side by side: several devices, or an accelerator, belong to one."""
    shared = layout.devices > 1 or jax.default_backend() != "cpu"
    if layout.devices > 1 and (config.workers or 1) > 1:
        raise ValueError(f"workers={config.workers} must be 1 on {layout.devices} devices, all of which share every unit.")
    return config.workers or (1 if shared else 2)


def _solved(todo: list[Unit], workers: int, layout: Layout, results: Results) -> Iterator[tuple[str, float | None]]:
    """Names and gaps of units as they are finished; the seeds of an algorithm on a problem share a process, and compile once."""
    groups = [list(found) for _, found in itertools.groupby(todo, key=lambda unit: unit[:2])]
    if workers == 1 or len(groups) < 2:
        for unit in todo:
            yield _solve(unit, results, layout)
        return
    free: queue.SimpleQueue[concurrent.futures.Executor] = queue.SimpleQueue()

    def solve_group(group: list[Unit]) -> list[tuple[str, float | None]]:
        worker = free.get()
        try:
            return worker.submit(_solve_all, group, results).result()
        finally:
            free.put(worker)

    with contextlib.ExitStack() as stack:
        programs = stack.enter_context(tempfile.TemporaryDirectory(prefix="exact-", ignore_cleanup_errors=True))
        for cores in shares(workers):
            worker = concurrent.futures.ProcessPoolExecutor(
                1,
                multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(cores, programs),
                max_tasks_per_child=24,
            )
            free.put(stack.enter_context(worker))
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(workers))
        pending = [threads.submit(solve_group, group) for group in reversed(groups)]  # the longest are last of the list
        try:
            for future in concurrent.futures.as_completed(pending):
                yield from future.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def shares(workers: int) -> list[set[int]]:
    """The cores that each worker may use: workers on the same cores would wait for each other's threads.

    Every worker may use all cores if there are fewer cores than workers, or if the system cannot pin a process to cores.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [set()] * workers
    cores = sorted(os.sched_getaffinity(0))
    return [set(cores[i::workers] if len(cores) >= workers else cores) for i in range(workers)]


def _start_worker(cores: set[int], programs: str | None = None) -> None:
    """Keep to these cores, and share compiled programs in a folder, if they are named; end with the parent, even if that is killed."""
    if cores:
        os.sched_setaffinity(0, cores)
    if programs is not None:
        jax.config.update("jax_compilation_cache_dir", programs)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _solve_all(units: list[Unit], results: Results) -> list[tuple[str, float | None]]:
    return [_solve(unit, results) for unit in units]


def _solve(unit: Unit, results: Results, layout: Layout = ONE_DEVICE) -> tuple[str, float | None]:
    """Solve a unit and keep its result."""
    result = solve(unit.algorithm, unit.problem, unit.seed, unit.budget, layout)
    results.keep(unit.name, result)
    return unit.name, result["relative_gap"]
