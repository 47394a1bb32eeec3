"""Fine-tuning as a loop that resumes."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..algorithms import Algorithm, Info, State
from ..parallel import whole
from ..rewards import RewardError
from .directory import RunDirectory
from .progress import ProgressBar


class Progress(NamedTuple):
    """Where fine-tuning stands: iterations done, seconds spent in them, and why it ended."""

    iterations: int
    seconds: float
    stop_reason: str


def finetune(
    run: RunDirectory,
    algorithm: Algorithm,
    state: State,
    key: jax.Array,
    *,
    iterations: int,
    evaluate: Callable[[State], Mapping[str, Any]] | None = None,
    evaluate_every: int = 10,
    observe: Callable[[Info], Mapping[str, Any]] | None = None,
    keep: Callable[[int, State], None] | None = None,
    checkpoint_every: int = 10,
    kl_budget: float | None = None,
) -> tuple[State, Progress]:
    """Iterate `algorithm`, with a log and checkpoints, or go on from the last checkpoint of the run.

    Iteration `i` draws from `fold_in(key, i)`, so that a run that was stopped and started again, by the same program, repeats the
    uninterrupted one bit for bit. What was logged after the checkpoint is logged again.

    Args:
        run: the folder; rows are in the phase "finetune", one per iteration, with its metrics, `iteration` from 0 and `wall_seconds`.
        algorithm: of any preset or of `ctrl_diffusion.compose`.
        state: what to begin with, `algorithm.init(params, value_params)`.
        key: of all iterations.
        iterations: how many in all, those before a resume included.
        evaluate: `evaluate(state)` adds its numbers (and images, see `RunDirectory.log`) to a row, outside the measured time.
        observe: `observe(info)` adds its numbers to every row, outside the measured time.
        keep: `keep(iterations, state)` is called before every checkpoint.
        evaluate_every, checkpoint_every: iterations between evaluations and checkpoints; both are made after the last, too.
        kl_budget: stop once the path KL of an iteration's samples exceeds it, nats.

    Returns:
        The last state, and how it came to it.

    Raises:
        FloatingPointError: for a loss or gradient norm that is not finite; the last checkpoint stays.
        RewardError: if the reward fails; the state before that iteration is checkpointed.
        OSError: if a checkpoint cannot be written.
        ValueError: if one cannot be read.
    """
    for name, number in {"evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    checkpoints, done, seconds, stop = run.checkpoints("finetune"), 0, 0.0, "finished"
    restored = checkpoints.restore(state)
    if restored is not None:
        done, state, notes = restored
        seconds, stop = notes["seconds"], notes["stop_reason"]
    run.keep_history("finetune", "iteration", done)

    def save() -> None:
        checkpoints.save(done, state, {"seconds": seconds, "stop_reason": stop})

    with checkpoints, ProgressBar(iterations, "fine-tuning", "iteration", done=done) as bar:
        while done < iterations and stop == "finished":
            begin = time.perf_counter()
            try:
                state, info = algorithm.step(jax.random.fold_in(key, done), state)
            except RewardError as error:  # nothing has been learned yet
                if checkpoints.latest() != done:
                    save()
                checkpoints.close()
                kept = "The state before this iteration is kept: the same command goes on from there."
                raise RewardError(f"iteration {done}: {error}. {kept}") from error
            row = _row(info, done)
            seconds += time.perf_counter() - begin
            if kl_budget is not None and row["path_kl"] > kl_budget:
                stop = "kl budget"
            row |= {"iteration": done, "wall_seconds": seconds} | dict(observe(info) if observe is not None else {})
            done += 1
            last = done == iterations or stop != "finished"
            if evaluate is not None and (done % evaluate_every == 0 or last):
                row |= evaluate(state)
            run.log("finetune", done, row)
            if done % checkpoint_every == 0 or last:
                if keep is not None:  # first: a run that is resumed after its last checkpoint does not come here again
                    keep(done, state)
                save()
            bar.update(note=f"reward={row['reward']:.3f}, path_kl={row['path_kl']:.2f}")
    return state, Progress(done, seconds, stop)


def _some(numbers: np.ndarray) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more are" if len(numbers) > 5 else " are")


def _row(info: Info, iteration: int) -> dict[str, Any]:
    """Metrics as floats; a non-finite loss or gradient ends the run, with the last checkpoint untouched."""
    row = {name: float(v) for name, v in jax.device_get(info.metrics).items()}
    bad = [name for name in ("policy_loss", "value_loss", "gradient_norm") if not np.isfinite(row.get(name, 0.0))]
    if bad:
        x = whole(info.samples)
        lost = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        samples = f"the final states of samples {_some(lost)}" if len(lost) else "no final state is"
        raise FloatingPointError(
            f"{bad[0]} is {row[bad[0]]} in iteration {iteration} ({samples} not finite): the last checkpoint is kept. "
            "Lower the learning rates or the clip."
        )
    return row
