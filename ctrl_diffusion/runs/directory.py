"""The folder of a run: its settings, its logs, its checkpoints. Everything is appended or replaced as a whole."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints import Checkpoints
from .devices import is_first, wait_for_all
from .files import write_atomic
from .images import as_bytes, mosaic
from .loggers import Logger, TensorBoard


class RunDirectory:
    """`config.json`, `history.jsonl`, `checkpoints/`, `metrics.json` and what loggers write, under one path.

    Of several processes the first writes (and all of them checkpoints, each its part); they must see the same folder.

    Args:
        path: the folder, which is made.
        settings: what identifies the run, as JSON has it: a folder that holds a run with others is refused.
        use_previous_checkpoint: delete a checkpoint that cannot be read, and resume from the one before.
        loggers: where rows go besides `history.jsonl` (default: `TensorBoard()`).

    Raises:
        ValueError: for a path that is a file, holds something else or holds a run with other settings. Nothing is written then.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        settings: Mapping[str, Any] | None = None,
        *,
        use_previous_checkpoint: bool = False,
        loggers: Sequence[Logger] | None = None,
    ):
        self.path, self._use_previous = Path(path), use_previous_checkpoint
        settings = dict(settings or {})
        self._check(settings)
        wait_for_all("settings are checked")
        if is_first():
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "config.json", json.dumps(settings, indent=2) + "\n")
        wait_for_all("settings are written")
        self._loggers: tuple[Logger, ...] = ()
        if is_first() and self.metrics is None:
            self._loggers = (TensorBoard(),) if loggers is None else tuple(loggers)
            for logger in self._loggers:
                logger.start(self.path, settings)

    def _check(self, settings: Mapping[str, Any]) -> None:
        file = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: choose a folder.")
        if not file.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(f"{self.path} is not empty and holds no run: choose another folder.")
            return
        found = json.loads(file.read_text())
        wanted = json.loads(json.dumps(settings))
        differences = [
            f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now"
            for name in sorted(set(found) | set(wanted))
            if found.get(name) != wanted.get(name)
        ]
        if differences:
            raise ValueError(
                f"{self.path} holds a run with other settings ({'; '.join(differences)}): choose another folder, or repeat "
                "its settings to resume it."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What identifies the run."""
        return json.loads((self.path / "config.json").read_text())

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The metrics of a finished run, else `None`."""
        file = self.path / "metrics.json"
        return json.loads(file.read_text()) if file.exists() else None

    def finished(self, see: str, redraw: Callable[[Path], Any] | None = None) -> dict[str, Any] | None:
        """The metrics of a finished run, after a line which says so and which file of its folder to look at; else `None`.

        `redraw(folder)` writes that file again where it is missing.
        """
        metrics, file = self.metrics, self.path / see
        if metrics is None:
            return None
        if redraw is not None and is_first() and not file.exists():
            redraw(self.path)
        print(f"{self.path} holds this run, finished: see {file}. Choose another folder to run again.")
        return metrics

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics, last of all: they mark a finished run. `ValueError` for a number that is not finite."""
        if not is_first():
            return
        write_atomic(self.path / "metrics.json", json.dumps(dict(metrics), indent=2, allow_nan=False) + "\n")
        for logger in self._loggers:
            logger.finish(metrics)

    def history(self) -> list[dict[str, Any]]:
        """The rows; a last one that is not whole, as a full disk or a power failure leaves it, is dropped."""
        file = self.path / "history.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        try:
            last = [json.loads(line) for line in lines[-1:]]
        except json.JSONDecodeError:
            last = []
        return [json.loads(line) for line in lines[:-1]] + last

    def keep_history(self, phase: str, index: str, before: int) -> None:
        """Drop rows of `phase` whose number `index` is `before` or more: they were logged after the checkpoint that is resumed."""
        if not is_first():
            return
        rows = [row for row in self.history() if row["phase"] != phase or row[index] < before]
        write_atomic(self.path / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, phase: str, step: int, row: Mapping[str, Any]) -> None:
        """Append a row to `history.jsonl`, with null for numbers that are not finite, and tell the loggers of what is finite.

        Arrays `[n, h, w, c]`, floats in [-1, 1] or bytes, are images: loggers get them as one picture, the history does not.
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
        """What loggers have buffered is written."""
        for logger in self._loggers:
            logger.close()

    def checkpoints(self, phase: str) -> Checkpoints:
        """Those of a phase of the run."""
        return Checkpoints(self.path / "checkpoints" / phase, self._use_previous)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
