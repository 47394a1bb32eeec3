"""The ablation of value networks: which units there are, and how they are run."""

import dataclasses
from typing import Any, NamedTuple

from ctrl_diffusion.runs import ProgressBar, Results, RunDirectory, describe, is_first

from ..commandline import require_at_least, require_known
from .cases import PROBLEMS, Size
from .config import Config as Config
from .fit import FitBudget, ProblemData, learn
from .report import summary, write_report
from .variants import BY_NAME

QUICK = ("structured", "plain", "x0_prediction", "mean", "td_0")


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
        raise ValueError(f"none of these variants applies ({reasons}): choose others.")
    return chosen


def run(config: Config) -> dict[str, Any]:
    """Run what is missing, and write `metrics.json`, `table.md` and the figures; returns the metrics."""
    layout, todo = config.devices.start(), units(config)
    settings = dataclasses.asdict(config) | {"units": [list(unit) for unit in todo]}
    directory = RunDirectory(config.out, {name: v for name, v in settings.items() if name not in ("out", "devices")})
    if (finished := directory.finished("table.md")) is not None:
        return finished
    print(describe(layout, transitions=FitBudget(1).transitions))
    results = Results(config.out / "units")
    missing = [unit for unit in todo if not results.has(unit.name)]
    cases: dict[str, ProblemData] = {}
    with ProgressBar(len(todo), "units", "unit", done=len(todo) - len(missing)) as bar:
        for unit in missing:
            if unit.problem not in cases:
                cases = {unit.problem: PROBLEMS[unit.problem].make(directory, _size(config), layout)}  # one at a time in memory
            result = learn(cases[unit.problem], BY_NAME[unit.variant], FitBudget(unit.iterations), layout)
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
