"""What a finished run left in its folder, read back; and its numbers as text."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..figures import minus
from .glossary import UNITS

SPACE = "\N{NO-BREAK SPACE}"
FILES = ("config.json", "metrics.json", "history.jsonl", "samples.npz")


class Run(NamedTuple):
    """The contents of a run's folder; numbers that are not finite are `None`."""

    directory: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    samples: Mapping[str, np.ndarray]

    @property
    def unit(self) -> str:
        return UNITS.get(str(self.config.get("reward")), "reward units")

    @property
    def has_gap(self) -> bool:
        return self.metrics.get("relative_gap") is not None


def load_run(directory: Path) -> Run:
    """Reads a run's folder; whatever is missing or damaged is named in the error."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a folder: pass the --out folder of a run.")
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} holds no {', '.join(missing)}: pass the --out folder of a finished run "
            "(repeat the run's command to finish an interrupted one)."
        )
    config, metrics = (_parse((directory / name).read_text(encoding="utf-8"), directory / name) for name in FILES[:2])
    lines = (directory / "history.jsonl").read_text(encoding="utf-8").splitlines()
    history = [_parse(line, f"{directory / 'history.jsonl'}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    try:
        with np.load(directory / "samples.npz") as file:
            samples = {name: file[name] for name in file.files}
    except Exception as error:  # numpy raises ValueError, EOFError, BadZipFile, zlib.error, ...
        raise ValueError(f"{directory / 'samples.npz'} cannot be read ({error}): delete it and repeat the run.") from error
    for name in ("before", "after"):
        if name not in samples or samples[name].ndim != 4:
            raise ValueError(f"{directory / 'samples.npz'} holds no images {name!r} of shape [n, h, w, c].")
    if metrics.get("optimum") is None:  # without a KL penalty there is none
        samples = {name: x for name, x in samples.items() if not name.endswith("optimum")}
    return Run(directory, config, _with_gap_error(metrics), history, samples)


def _with_gap_error(metrics: dict[str, Any]) -> dict[str, Any]:
    """The standard error of the relative gap to first order, if it was not recorded."""
    error, best, start = metrics.get("optimality_gap_se"), metrics.get("optimum"), metrics.get("objective_reference")
    if metrics.get("relative_gap") is None or metrics.get("relative_gap_se") is not None:
        return metrics
    if error is None or best is None or start is None or best == start:
        return metrics
    return {**metrics, "relative_gap_se": error / abs(best - start)}


def _parse(text: str, where: object) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where} holds {type(found).__name__}, not an object of names and values.")
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in found.items()}


def number(value: Any, se: float | None = None) -> str:
    """A number with as many digits as its standard error allows: two significant digits of the error, four without one."""
    if value is None:
        return "not defined"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return minus(f"{value:,}")
    if not isinstance(value, float):
        return str(value)
    if not se:
        whole = abs(value) >= 1000
        return minus(f"{value:,.0f}" if whole else f"{value:.4g}")
    decimals = min(max(1 - math.floor(math.log10(se)), 0), 6)
    return minus(f"{value:,.{decimals}f}") + f"{SPACE}±{SPACE}{se:.{decimals}f}"


def quantity(metrics: Mapping[str, Any], name: str, unit: str) -> str:
    """The metric `name` with its standard error and unit, if there is one."""
    value = metrics.get(name)
    if value is None:
        return "not defined"
    if unit == "s" and value >= 100:
        return f"{round(value) // 60} min {round(value) % 60} s"
    if unit == "bytes" and name == "peak_rss_bytes":
        return f"{value / 2**20:,.0f} MiB"
    space = " " if " " in unit else SPACE
    return f"{number(value, metrics.get(f'{name}_se'))}{space}{unit}".strip()
