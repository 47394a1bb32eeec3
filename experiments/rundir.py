"""The folder of a run: its settings, its logs, its checkpoints. Everything is appended or replaced as a whole."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from tensorboardX import SummaryWriter

from .devices import is_first
from .files import write_atomic
from .weights_and_biases import WeightsAndBiases, require_wandb


class RunDirectory:
    """`config.json`, `history.jsonl`, `tensorboard/`, `checkpoints/`, `metrics.json` under one path.

    A directory that holds another run's settings is refused, before anything is written. Of several processes the first writes
    (and all of them checkpoints, each its part); they must see the same folder. With `wandb`, the name of a project, a run that is not
    finished is logged to Weights & Biases, too.
    """

    def __init__(self, path: Path, config: dict[str, Any], use_previous_checkpoint: bool = False, wandb: str | None = None):
        if wandb is not None:
            require_wandb(wandb)
        self.path, self._use_previous = path, use_previous_checkpoint
        self._check_config(config)
        wait_for_all("settings are checked")
        if is_first():
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "config.json", json.dumps(config, indent=2) + "\n")
        wait_for_all("settings are written")
        self._tensorboard: SummaryWriter | None = None
        self._wandb: WeightsAndBiases | None = None
        if wandb is not None and is_first() and self.metrics is None:
            self._wandb = WeightsAndBiases(wandb, path, config)

    def _check_config(self, config: dict[str, Any]) -> None:
        file = self.path / "config.json"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out {self.path} is a file: choose a folder.")
        if not file.exists():
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ValueError(f"--out {self.path} is not empty and holds no run: choose another folder.")
            return
        found = json.loads(file.read_text())
        wanted = json.loads(json.dumps(config))
        differences = [
            f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} now"
            for name in sorted(set(found) | set(wanted))
            if found.get(name) != wanted.get(name)
        ]
        if differences:
            raise ValueError(
                f"--out {self.path} holds a run with other settings ({'; '.join(differences)}): choose another folder, or repeat "
                "its settings to resume it."
            )

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
        print(f"{self.path} holds this run, finished: see {file}. Choose another --out to run again.")
        return metrics

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, last of all: they mark a finished run."""
        if not is_first():
            return
        write_atomic(self.path / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
        if self._wandb is not None:
            self._wandb.finish(metrics)

    # -- logs -----------------------------------------------------------------------------------------------------------

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
        """Drop rows of `phase` from `before` on: they were logged after the checkpoint that is being resumed."""
        if not is_first():
            return
        rows = [row for row in self.history() if row["phase"] != phase or row[index] < before]
        write_atomic(self.path / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def log(self, phase: str, step: int, row: dict[str, Any]) -> None:
        """Append a row to `history.jsonl` and its numbers to TensorBoard (and Weights & Biases). Non-finite numbers are written as null."""
        if not is_first():
            return
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        with (self.path / "history.jsonl").open("a") as file:
            file.write(json.dumps({"phase": phase, **row}) + "\n")
        if self._tensorboard is None:
            self._tensorboard = SummaryWriter(str(self.path / "tensorboard"))
        for name, v in row.items():
            if isinstance(v, int | float):
                self._tensorboard.add_scalar(f"{phase}/{name}", v, step)
        if self._wandb is not None:
            self._wandb.log(phase, step, row)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def checkpoints(self, phase: str) -> "Checkpoints":
        return Checkpoints(self.path / "checkpoints" / phase, self._use_previous)


def wait_for_all(what: str) -> None:
    """Until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def exists_for_all(file: Path) -> bool:
    """Whether the first process sees a file: the same answer for all, before any goes on to make it."""
    found = file.exists()
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(found))) if jax.process_count() > 1 else found


class Results:
    """A JSON file per unit of a run, complete or absent: what is there is not done again.

    Of several processes, which all have the result, the first writes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        wait_for_all("earlier results are seen")

    def has(self, name: str) -> bool:
        return exists_for_all(self.folder / f"{name}.json")

    def keep(self, name: str, result: dict[str, Any]) -> None:
        if is_first():
            write_atomic(self.folder / f"{name}.json", json.dumps(result, allow_nan=False) + "\n")
        wait_for_all("a result is written")

    def read(self, names: Iterable[str]) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"{name}.json").read_text()) for name in names]


class Checkpoints:
    """Asynchronous, atomic checkpoints of one phase; the last two are kept.

    `with` them, what is still being written when an error ends the block is written first.

    With `use_previous` a checkpoint that cannot be read is deleted, and the one before it is used.
    """

    def __init__(self, path: Path, use_previous: bool = False):
        self.path, self.use_previous = path, use_previous
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(path.absolute(), options=options)

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Write in the background what `restore` gives back; `state` is copied before this returns.

        `OSError` if this or the last one cannot be written, as on a full disk: the one before it stays.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
        with self._errors_named():
            self._manager.save(step, args=args)

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """`(step, state, notes)` of the last checkpoint, or `None`; `like` is a state of the same structure."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:
            others = _listed(s for s in self._manager.all_steps() if s != step)
            message = (
                f"checkpoint {self.path / str(step)} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})"
            )
            if not self.use_previous:
                raise ValueError(
                    f"{message}. Delete that folder, or pass --use-previous-checkpoint, to resume from {others}."
                ) from error
            print(f"warning: {message}; it is deleted, and the run goes on from {others}.")
            self._manager.delete(step)
            return self.restore(like)
        return step, restored["state"], restored["notes"]

    def close(self) -> None:
        with self._errors_named():
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:  # which is what the user is told of, whatever becomes of the checkpoint
            with contextlib.suppress(OSError), self._errors_named():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # those of the background come as many types
            free = shutil.disk_usage(self.path).free / 2**20
            raise OSError(
                f"a checkpoint cannot be written to {self.path} ({type(error).__name__}: {str(error).partition(chr(10))[0]}). {free:.0f} "
                "MiB are free there: if that is too little, make room. The same command goes on from the checkpoint before."
            ) from error


def _listed(steps: Iterable[int]) -> str:
    steps = sorted(steps)
    return f"checkpoint {steps[-1]}" if steps else "the start of this phase"
