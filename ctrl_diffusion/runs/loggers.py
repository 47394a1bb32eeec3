"""Loggers, which get the numbers of a run besides its JSON lines. Of several processes only the first logs."""

import importlib
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from .event_files import EventFile
from .files import write_atomic


@runtime_checkable
class Logger(Protocol):
    """The interface of loggers. To write your own, implement these four methods; `RunDirectory` calls them."""

    def start(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Start a run with its folder and settings. It is called once, before anything is logged, and not for a finished run."""

    def log(self, phase: str, step: int, numbers: Mapping[str, int | float], pictures: Mapping[str, np.ndarray]) -> None:
        """Log a row: finite numbers, and pictures `[h, w, 3]` of bytes, by name. A resumed run logs some steps again."""

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics of a finished run. Nothing is logged after them."""

    def close(self) -> None:
        """Write buffers: nothing is logged for now."""


class TensorBoard:
    """Writes event files to `folder / "tensorboard"`, for `tensorboard --logdir`. Tags are `phase/name`. It needs no package."""

    def __init__(self):
        self._folder, self._file = None, None

    def start(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Set the folder. The first row makes a file in it."""
        self._folder = folder / "tensorboard"

    def log(self, phase: str, step: int, numbers: Mapping[str, int | float], pictures: Mapping[str, np.ndarray]) -> None:
        """Append the row."""
        if self._file is None:
            if self._folder is None:
                raise ValueError("this TensorBoard has no folder: pass it to RunDirectory(loggers=...), which starts it.")
            self._file = EventFile(self._folder)
        tagged = {f"{phase}/{name}": number for name, number in numbers.items()}
        self._file.add(step, tagged, {f"{phase}/{name}": picture for name, picture in pictures.items()})

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Close the file; the metrics are in `metrics.json`."""
        self.close()

    def close(self) -> None:
        """Close the file; the next row opens another."""
        if self._file is not None:
            self._file.close()
            self._file = None


class WeightsAndBiases:
    """Logs to one run of Weights & Biases per folder, which is resumed with the folder. Files are in `folder / "wandb"`.

    It needs the package `wandb`. Every phase has its own step, because a resumed run logs some steps again. Without an account, set
    `WANDB_MODE=offline` in the environment.

    Args:
        project: name of the project to log to.

    Raises:
        ValueError: if `wandb` is not installed.
    """

    def __init__(self, project: str):
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(f"project={project!r}: Weights & Biases is not installed: pip install wandb, or log without it.")
        self._project, self._run, self._wandb = project, None, None
        self._phases: set[str] = set()

    def start(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Start or resume the run; `ValueError` if Weights & Biases refuses."""
        identity = folder / "wandb" / "id.txt"
        identity.parent.mkdir(exist_ok=True)
        if not identity.exists():
            write_atomic(identity, secrets.token_hex(8))
        self._wandb = wandb = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                project=self._project, id=identity.read_text(), name=folder.name, dir=str(folder), config=dict(settings),
                resume="allow",
            )  # fmt: skip
        except Exception as error:
            raise ValueError(f"project={self._project!r}: {error}. Run `wandb login`, or set WANDB_MODE=offline.") from error

    def log(self, phase: str, step: int, numbers: Mapping[str, int | float], pictures: Mapping[str, np.ndarray]) -> None:
        """Log the numbers and pictures of a row, as `phase/name` against `phase/step`."""
        run, wandb = self._started()
        if phase not in self._phases:
            self._phases.add(phase)
            run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        row: dict[str, Any] = {f"{phase}/{name}": v for name, v in numbers.items()}
        row |= {f"{phase}/{name}": wandb.Image(picture) for name, picture in pictures.items()}
        run.log({**row, f"{phase}/step": step})

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Log the metrics as the run's summary, and send what is buffered."""
        run, _ = self._started()
        run.summary.update(dict(metrics))
        run.finish()

    def close(self) -> None:
        """Do nothing: the package sends its buffer in the background, and `finish` ends the run."""

    def _started(self) -> tuple[Any, Any]:
        if self._run is None:
            raise ValueError("this WeightsAndBiases has no run: pass it to RunDirectory(loggers=...), which starts it.")
        return self._run, self._wandb
