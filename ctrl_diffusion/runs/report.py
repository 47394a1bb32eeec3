"""The report of a run, a page of Markdown."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_atomic

ROWS = 12  # of the table of progress
MEANINGS = {
    "reward": "mean reward",
    "path_kl": "path KL from the reference (nats)",
    "objective": "objective: reward − KL coefficient × path KL",
}


def write_report(folder: str | os.PathLike) -> Path:
    """Write `report.md` into the folder of a finished run, from its metrics, history and settings; returns its path.

    The metrics are those of `evaluate`, or any numbers by name. `FileNotFoundError` for a run that is not finished.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no metrics.json: finish the run, with RunDirectory.finish(metrics), and report then."
        )
    metrics, settings = (json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "config"))
    file = folder / "history.jsonl"
    history = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    parts = [f"# {folder.name}", *_headline(metrics), _result(metrics), *_progress(history)]
    names = [name for name in metrics if not name.endswith("_se")]
    parts += ["## All metrics", _table(("metric", "value ± standard error"), [(n, _estimate(metrics, n)) for n in names])]
    if settings:
        parts += ["## Settings", _table(("setting", "value"), [(name, f"`{v}`") for name, v in settings.items()])]
    write_atomic(folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    return folder / "report.md"


def _headline(metrics: Mapping[str, Any]) -> list[str]:
    if metrics.get("relative_gap") is None:
        return []
    bound = "an upper bound of the optimum" if metrics.get("optimum_is_bound") else "the optimum"
    text = [f"The relative optimality gap is **{_estimate(metrics, 'relative_gap')}**: 1 before fine-tuning, 0 at {bound}."]
    effective = metrics.get("effective_sample_size")
    if effective is not None and effective < 100:
        text.append(
            f"The optimum rests on {effective:.0f} effective samples of the reference, which is too few to trust it: evaluate with "
            "more reference samples, or fine-tune with a higher KL coefficient."
        )
    return text


def _result(metrics: Mapping[str, Any]) -> str:
    if "reward" not in metrics:
        return ""
    columns = {
        "reward": ("reward_reference", "reward", "optimum_reward"),
        "path_kl": (None, "path_kl", "optimum_path_kl"),
        "objective": ("objective_reference", "objective", "optimum"),
    }
    rows = [
        (MEANINGS[name], *("0" if one is None else _estimate(metrics, one) for one in names)) for name, names in columns.items()
    ]
    return _table(("", "before", "after", "at the optimum"), rows)


def _progress(history: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [row for row in history if row.get("phase") == "finetune"]
    if not rows:
        return []
    step = -(-len(rows) // (ROWS - 1))
    names = ("iteration", "wall_seconds", "reward", "path_kl")
    shown = [*rows[:-1:step], rows[-1]]
    table = _table(("iteration", "seconds", "reward", "path KL"), [[_number(row.get(name)) for name in names] for row in shown])
    return ["## Progress", "Reward and path KL of the samples that were trained on, with exploration.", table]


def _estimate(metrics: Mapping[str, Any], name: str) -> str:
    """A number with two digits of its standard error, if there is one."""
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    if value is None or not error:
        return _number(value)
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _number(value: Any) -> str:
    if value is None:
        return "not defined"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
