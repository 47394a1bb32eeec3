"""Checkpoints of a run. Each is complete or absent."""

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """Asynchronous, atomic checkpoints of one phase; the last two are kept.

    As a context manager it waits for unfinished writes at the end of the block, also after an error. With `use_previous`, a checkpoint
    that cannot be read is deleted, and the one before it is used.
    """

    def __init__(self, path: Path, use_previous: bool = False):
        self.path, self.use_previous = path, use_previous
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager(path.absolute(), options=options)

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Write `state` and `notes` in the background; `state` is copied before this returns.

        `OSError` if this checkpoint or the last one cannot be written, for example on a full disk. The checkpoint before it stays.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
        with self._errors_named():
            self._manager.save(step, args=args)

    def latest(self) -> int | None:
        """The step of the last checkpoint, or `None`."""
        return self._manager.latest_step()

    def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """`(step, state, notes)` of the last checkpoint, or `None`; `like` is a state of the same structure.

        `ValueError` if it cannot be read, unless `use_previous`.
        """
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
                    f"{message}. Delete that folder, or pass use_previous_checkpoint=True, to resume from {others}."
                ) from error
            print(f"warning: {message}; it is deleted, and the run goes on from {others}.")
            self._manager.delete(step)
            return self.restore(like)
        return step, restored["state"], restored["notes"]

    def close(self) -> None:
        """Wait for unfinished writes; `OSError` if one fails."""
        with self._errors_named():
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:  # the user is told of this error, and not of a second one from the checkpoint
            with contextlib.suppress(OSError), self._errors_named():
                self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # background writes raise many types
            free = shutil.disk_usage(self.path).free / 2**20
            raise OSError(
                f"a checkpoint cannot be written to {self.path} ({type(error).__name__}: {str(error).partition(chr(10))[0]}). {free:.0f} "
                "MiB are free there: make room if that is too little, then run the same program again. It resumes from the one before."
            ) from error


def _listed(steps: Iterable[int]) -> str:
    steps = sorted(steps)
    return f"checkpoint {steps[-1]}" if steps else "the start of this phase"
