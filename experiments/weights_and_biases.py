"""Logging to Weights & Biases, for runs that ask for it and where the package `wandb` is installed."""

import importlib
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import write_atomic


def require_wandb(project: str) -> None:
    """`ValueError` if `wandb` is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"wandb={project!r}: Weights & Biases is not installed: pip install wandb, or leave the option out.")


class WeightsAndBiases:
    """One run of Weights & Biases per folder, resumed with it; its files lie in `folder / "wandb"`.

    Every phase has its own step, since a resumed run logs some steps again. Without an account set `WANDB_MODE=offline`.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]):
        require_wandb(project)
        identity = folder / "wandb" / "id.txt"
        identity.parent.mkdir(exist_ok=True)
        if not identity.exists():
            write_atomic(identity, secrets.token_hex(8))
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=project, id=identity.read_text(), name=folder.name, dir=str(folder), config=dict(config), resume="allow"
            )
        except Exception as error:
            raise ValueError(f"wandb={project!r}: {error}. Run `wandb login`, or set WANDB_MODE=offline.") from error
        self._phases: set[str] = set()

    def log(self, phase: str, step: int, row: Mapping[str, Any]) -> None:
        """The numbers of a row, as `phase/name` against `phase/step`."""
        if phase not in self._phases:
            self._phases.add(phase)
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        numbers = {f"{phase}/{name}": v for name, v in row.items() if isinstance(v, int | float)}
        self._run.log({**numbers, f"{phase}/step": step})

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """The metrics as the run's summary; what is buffered is sent."""
        self._run.summary.update(dict(metrics))
        self._run.finish()
