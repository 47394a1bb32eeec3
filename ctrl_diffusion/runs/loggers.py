"""Where the numbers of a run go besides its JSON lines. Of several processes only the first logs."""

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
    """What a `RunDirectory` tells its loggers; bring your own by these five methods."""

    def start(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """The run's folder and settings, before anything is logged. It is called once, and not for a finished run."""

    def log(self, phase: str, step: int, numbers: Mapping[str, int | float], pictures: Mapping[str, np.ndarray]) -> None:
        """A row: finite numbers and pictures `[h, w, 3]` of bytes by name. A resumed run logs some steps again."""

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """The metrics, last of all."""

    def close(self) -> None:
        """Nothing is logged for now; what is buffered is written."""


class TensorBoard:
    """Event files in `folder / "tensorboard"`, for `tensorboard --logdir`; tags are `phase/name`. It needs no package."""

    def __init__(self):
        self._folder, self._file = None, None

    def start(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """The folder; a file is made by the first row."""
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
    """One run of Weights & Biases per folder, resumed with it; its files lie in `folder / "wandb"`.

    It needs the package `wandb`. Every phase has its own step, since a resumed run logs some steps again. Without an account set
    `WANDB_MODE=offline` in the environment.

    Args:
        project: where it is logged to.

    Raises:
        ValueError: if `wandb` is not installed.
    """

    def __init__(self, project: str):
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(f"project={project!r}: Weights & Biases is not installed: pip install wandb, or log without it.")
        self._project, self._run, self._wandb = project, None, None
        self._phases: set[str] = set()

    def start(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Begin or resume the run; `ValueError` if Weights & Biases refuses."""
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
        """The numbers and pictures of a row, as `phase/name` against `phase/step`."""
        run, wandb = self._started()
        if phase not in self._phases:
            self._phases.add(phase)
            run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
        row: dict[str, Any] = {f"{phase}/{name}": v for name, v in numbers.items()}
        row |= {f"{phase}/{name}": wandb.Image(picture) for name, picture in pictures.items()}
        run.log({**row, f"{phase}/step": step})

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """The metrics as the run's summary; what is buffered is sent."""
        run, _ = self._started()
        run.summary.update(dict(metrics))
        run.finish()

    def close(self) -> None:
        """Nothing: the package sends what it has in the background, and `finish` ends the run."""

    def _started(self) -> tuple[Any, Any]:
        if self._run is None:
            raise ValueError("this WeightsAndBiases has no run: pass it to RunDirectory(loggers=...), which starts it.")
        return self._run, self._wandb
