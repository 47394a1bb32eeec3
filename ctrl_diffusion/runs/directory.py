"""The folder of a run: settings, logs, checkpoints and metrics. Every file is appended to or replaced as a whole."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..folders import local
from .checkpoints import Checkpoints
from .devices import is_first, wait_for_all
from .files import write_atomic
from .images import as_bytes, mosaic
from .loggers import Logger, TensorBoard


class RunDirectory:
    """A folder with `config.json`, `history.jsonl`, `checkpoints/`, `metrics.json` and the files of loggers.

    Several processes must see the same folder. The first of them writes; of checkpoints each process writes its part.

    Args:
        path: the folder; it is made if it is missing.
        settings: what identifies the run, values that JSON can hold. A folder with a run of other settings is refused, unless nothing but
            its settings was written yet.
        about: other settings, which are written beside them and do not identify the run.
        evaluation: settings of the evaluation. They do not identify the run either; a finished run is evaluated again if they are others.
        iterations: how many the run is to have. A finished run of fewer iterations, by its metrics, goes on to that number; `None`: a
            finished run stays as it is.
        use_previous_checkpoint: delete a checkpoint that cannot be read, and resume from the one before.
        loggers: get all rows besides `history.jsonl` (default: `TensorBoard()`).

    Raises:
        ValueError: if the path is an address (`gs://...`) or a file, holds other files, or holds a run with other settings. Nothing is
            written then.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: Mapping[str, Any] | None = None,
        *,
        about: Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
        iterations: int | None = None,
        use_previous_checkpoint: bool = False,
        loggers: Sequence[Logger] | None = None,
    ):
        self.path, self._use_previous = local(path), use_previous_checkpoint
        settings, rest = dict(settings or {}), {**(about or {}), **(evaluation or {})}
        found = self._check(settings, set(rest))
        wait_for_all("settings are checked")
        settings |= rest
        if is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "config.json", json.dumps(settings, indent=2) + "\n")
            self._extend(iterations)
            self._evaluate_again(found, dict(evaluation or {}))
        wait_for_all("settings are written")
        self._loggers: tuple[Logger, ...] = ()
        if is_first() and self.metrics is None:
            self._loggers = (TensorBoard(),) if loggers is None else tuple(loggers)
            for logger in self._loggers:
                logger.start(self.path, settings)

    def _extend(self, iterations: int | None) -> None:
        """Take the mark off a finished run that is to have more iterations."""
        done = (self.metrics or {}).get("iterations")
        if (
            iterations is not None
            and done is not None
            and done < iterations
            and (self.metrics or {}).get("stop_reason", "finished") == "finished"
        ):
            print(f"{self.path} holds {done} iterations of this run: going on to {iterations}.")
            (self.path / "metrics.json").unlink()

    def _evaluate_again(self, found: Mapping[str, Any], evaluation: Mapping[str, Any]) -> None:
        """Take the mark off a finished run that was evaluated with other settings."""
        wanted = json.loads(json.dumps(evaluation))
        others = [name for name in wanted if name in found and found[name] != wanted[name]]
        if others and self.metrics is not None:
            changes = ", ".join(f"{name}: {found[name]!r} there, {wanted[name]!r} now" for name in others)
            print(f"{self.path} holds this run, evaluated otherwise ({changes}): evaluating it again.")
            (self.path / "metrics.json").unlink()

    def _has_begun(self) -> bool:
        """Whether anything but settings and the files of loggers was written."""
        return any(entry.name not in ("config.json", "tensorboard") for entry in self.path.iterdir())

    def _check(self, settings: Mapping[str, Any], others: set[str]) -> dict[str, Any]:
        """All settings that are there, if any. `ValueError` if they, without `others`, are those of another run."""
        file = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: choose a folder.")
        if not file.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and holds no run: choose another folder.")
            return {}
        found = json.loads(file.read_text())
        wanted = json.loads(json.dumps(settings))
        differences = [
            f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now"
            for name in sorted((set(found) | set(wanted)) - others)
            if found.get(name) != wanted.get(name)
        ]
        if differences and self._has_begun():
            raise ValueError(
                f"{self.path} holds a run with other settings ({'; '.join(differences)}): choose another folder, or use "
                "the same settings to resume it."
            )
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return json.loads((self.path / "config.json").read_text())

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The metrics of a finished run, else `None`."""
        file = self.path / "metrics.json"
        return json.loads(file.read_text()) if file.exists() else None

    def finished(self, see: str, redraw: Callable[[Path], Any] | None = None) -> dict[str, Any] | None:
        """If the run is finished, print a line that says so and return its metrics; else return `None`.

        Args:
            see: the file of the folder that the line refers to.
            redraw: `redraw(folder)` writes that file again if it is missing.
        """
        metrics, file = self.metrics, self.path / see
        if metrics is None:
            return None
        if redraw is not None and is_first() and not file.exists():
            redraw(self.path)
        print(f"{self.path} holds this run, finished: see {file}. Choose another folder to run again.")
        return metrics

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics, which mark the run as finished. `ValueError` if a number is not finite."""
        if not is_first():
            return
        write_atomic(self.path / "metrics.json", json.dumps(dict(metrics), indent=2, allow_nan=False) + "\n")
        for logger in self._loggers:
            logger.finish(metrics)

    def history(self) -> list[dict[str, Any]]:
        """The rows of the history. An incomplete last row, from a full disk or a power failure, is dropped."""
        file = self.path / "history.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        try:
            last = [json.loads(line) for line in lines[-1:]]
        except json.JSONDecodeError:
            last = []
        return [json.loads(line) for line in lines[:-1]] + last

    def keep_history(self, phase: str, index: str, before: int) -> None:
        """Keep rows of `phase` whose number `index` is below `before`. The others were logged after the checkpoint that is resumed."""
        if not is_first():
            return
        rows = [row for row in self.history() if row["phase"] != phase or row[index] < before]
        write_atomic(self.path / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, phase: str, step: int, row: Mapping[str, Any]) -> None:
        """Append a row to `history.jsonl`, and pass it to the loggers.

        Numbers that are not finite are null in the history, and loggers do not get them. Arrays `[n, h, w, c]`, floats in [-1, 1] or
        bytes, are images: loggers get them as one picture, and the history does not have them.
        """
        if not is_first():
            return
        images = {name: v for name, v in row.items() if isinstance(v, np.ndarray) and v.ndim == 4}
        row = {name: _finite(v) for name, v in row.items() if name not in images}
        with (self.path / "history.jsonl").open("a") as file:
            file.write(json.dumps({"phase": phase, **row}) + "\n")
        numbers = {name: v for name, v in row.items() if isinstance(v, int | float)}
        pictures = {name: as_bytes(mosaic(v)) for name, v in images.items()} if self._loggers else {}
        for logger in self._loggers:
            logger.log(phase, step, numbers, pictures)

    def close(self) -> None:
        """Let loggers write their buffers."""
        for logger in self._loggers:
            logger.close()

    def checkpoints(self, phase: str) -> Checkpoints:
        """The checkpoints of a phase of the run."""
        return Checkpoints(self.path / "checkpoints" / phase, self._use_previous)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
