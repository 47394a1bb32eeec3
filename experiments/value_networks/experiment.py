"""What a value network should look like, and what it should be regressed on: error to the exact value, one factor at a time.

    python -m experiments.value_networks --out runs/value_networks            a ring of Gaussians and the digits
    python -m experiments.value_networks --quick --out runs/quick             five variants on the ring

A unit is one variant on one problem, all seeds at once. A run that was stopped continues with the same command.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from ctrl_diffusion.runs import ProgressBar, Results, RunDirectory, describe, is_first

from ..commandline import execute, require_at_least, require_known
from ..devices import Devices
from .cases import PROBLEMS, Size
from .fit import Budget, Case, learn
from .report import summary, write_report
from .variants import BY_NAME

QUICK = ("structured", "plain", "x0_prediction", "mean", "td_0")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run. Every variant sees the same paths."""

    out: Path = Path("runs/value_networks")
    """Folder for results, table and figures."""
    quick: bool = False
    """Five variants on the ring, an eighth of the iterations."""
    problems: tuple[str, ...] = ()
    """Only these of ring_linear, ring_quadratic, digits (default: ring_linear and digits)."""
    variants: tuple[str, ...] = ()
    """Only these variants (default: all that say something on a problem)."""
    seeds: int = 2
    """Initial parameters and sets of paths."""
    iterations: int | None = None
    """Iterations of 8 updates on 512 states (default: the problem's own, 240 on the rings and 120 on the digits)."""
    paths: int = 8192
    """Paths per seed that training draws from."""
    states: int = 1024
    """Held-out states per time on the ring."""
    digit_states: int = 64
    """Held-out states per time on the digits, each with --continuations."""
    continuations: int = 1024
    """Paths from every held-out state of the digits, which estimate its exact value."""
    pretrain_steps: int = 1500
    """Optimiser steps of pre-training on the digits."""
    devices: Devices = Devices()
    """Devices that share the rows of every update, and the paths that exact values of the digits are estimated from."""


class Unit(NamedTuple):
    """One variant on one problem."""

    problem: str
    variant: str
    iterations: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.problem}-{self.variant}"


def units(config: Config) -> list[Unit]:
    """The units of a configuration, problem by problem."""
    require_known("problems", config.problems, PROBLEMS)
    require_known("variants", config.variants, BY_NAME)
    require_at_least(
        1, seeds=config.seeds, iterations=config.iterations, paths=config.paths, pretrain_steps=config.pretrain_steps
    )
    require_at_least(2, states=config.states, digit_states=config.digit_states, continuations=config.continuations)
    problems = config.problems or (("ring_linear",) if config.quick else ("ring_linear", "digits"))
    variants = config.variants or (QUICK if config.quick else tuple(BY_NAME))
    chosen = [Unit(p, v, _iterations(config, p)) for p in problems for v in variants if v not in PROBLEMS[p].left_out]
    if not chosen:
        reasons = "; ".join(f"{v} on {p}: {PROBLEMS[p].left_out[v]}" for p in problems for v in variants)
        raise ValueError(f"no variant of this selection says something new ({reasons}): choose others.")
    return chosen


def run(config: Config) -> dict[str, Any]:
    """Run what is missing, and write `metrics.json`, `table.md` and the figures; returns the metrics."""
    layout, todo = config.devices.start(), units(config)
    settings = dataclasses.asdict(config) | {"units": [list(unit) for unit in todo]}
    directory = RunDirectory(config.out, {name: v for name, v in settings.items() if name not in ("out", "devices")})
    if (finished := directory.finished("table.md")) is not None:
        return finished
    print(describe(layout, rows=Budget(1).rows))
    results = Results(config.out / "units")
    missing = [unit for unit in todo if not results.has(unit.name)]
    cases: dict[str, Case] = {}
    with ProgressBar(len(todo), "units", "unit", done=len(todo) - len(missing)) as bar:
        for unit in missing:
            if unit.problem not in cases:
                cases = {unit.problem: PROBLEMS[unit.problem].make(directory, _size(config), layout)}  # one at a time in memory
            result = learn(cases[unit.problem], BY_NAME[unit.variant], Budget(unit.iterations), layout)
            results.keep(unit.name, {"problem": unit.problem, "variant": unit.variant} | result)
            bar.update(note=unit.name)
    directory.close()
    found = results.read(unit.name for unit in todo)
    metrics = {"results": [summary(result) for result in found]}
    if is_first():
        write_report(config.out, found)
        print((config.out / "table.md").read_text())
    directory.finish(metrics)
    return metrics


def _iterations(config: Config, problem: str) -> int:
    if config.iterations is not None:
        return config.iterations
    return PROBLEMS[problem].iterations // (8 if config.quick else 1)


def _size(config: Config) -> Size:
    return Size(
        config.seeds, config.paths, config.states, config.digit_states, config.continuations, config.pretrain_steps
    )  # fmt: skip


def main(args: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return execute(run, Config, __doc__, "experiments.value_networks", args)
