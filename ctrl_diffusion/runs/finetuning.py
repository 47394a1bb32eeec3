"""The loop of fine-tuning, with logs, checkpoints and exact resume."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..algorithms import Algorithm, Info, State
from ..parallel import whole
from ..rewards import Reward, RewardError, gradient_fault
from .directory import RunDirectory
from .progress import ProgressBar


class Progress(NamedTuple):
    """The iterations that are done, the seconds that they took, and the reason why the loop ended: "finished" or "kl budget"."""

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
    """Iterate `algorithm`, with a log and checkpoints. If the run has a checkpoint, resume from the last one.

    Iteration `i` draws from `fold_in(key, i)`. A run that is stopped and resumed by the same program therefore repeats the uninterrupted
    run bit for bit. Iterations after the checkpoint are logged again.

    Args:
        run: the folder. Its history gets a row per iteration in the phase "finetune": metrics, `iteration` from 0, `wall_seconds`.
        algorithm: a preset, or a result of `ctrl_diffusion.compose`.
        state: the initial state, `algorithm.init(params, value_params)`.
        key: the random key of all iterations.
        iterations: total number, including those before a resume.
        evaluate: `evaluate(state)` returns numbers (and images, see `RunDirectory.log`) that are added to a row. Its time is not measured.
        evaluate_every, checkpoint_every: iterations between evaluations and between checkpoints. The last iteration has both.
        observe: `observe(info)` returns numbers that are added to every row. Its time is not measured.
        keep: `keep(iterations, state)` is called before every checkpoint.
        kl_budget: stop once the path KL of an iteration's samples exceeds this number, nats.

    Returns:
        The last state, and the progress that led to it.

    Raises:
        FloatingPointError: if a loss or gradient norm is not finite; the last checkpoint stays.
        RewardError: if the reward fails; the state before that iteration is checkpointed.
        OSError: if a checkpoint cannot be written.
        ValueError: if a checkpoint cannot be read, a number is below 1, or `kl_budget` is given where there is no path KL.
    """
    _check(algorithm, evaluate_every, checkpoint_every, kl_budget)
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
                kept = "The state before this iteration is kept: run the same program again to go on from there."
                raise RewardError(f"iteration {done}: {error}. {kept}") from error
            row = _row(info, done, algorithm.recipe.objective.reward)
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


def _check(algorithm: Algorithm, evaluate_every: int, checkpoint_every: int, kl_budget: float | None) -> None:
    """Refuse numbers below 1, and a budget of path KL where there is none."""
    for name, number in {"evaluate_every": evaluate_every, "checkpoint_every": checkpoint_every}.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1.")
    if kl_budget is not None and not algorithm.recipe.objective.exploration.has_likelihood:
        raise ValueError(f"kl_budget={kl_budget}: the sampler is an ODE, which has no path KL: leave it out, or use eta > 0.")


def _some(numbers: np.ndarray) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more are" if len(numbers) > 5 else " are")


def _row(info: Info, iteration: int, reward: Reward) -> dict[str, Any]:
    """Metrics as floats; `FloatingPointError` if a loss or gradient is not finite."""
    row = {name: float(v) for name, v in jax.device_get(info.metrics).items()}
    bad = [name for name in ("policy_loss", "value_loss", "gradient_norm") if not np.isfinite(row.get(name, 0.0))]
    if bad:
        x = whole(info.samples)
        lost = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        samples = f"the final states of samples {_some(lost)}" if len(lost) else "no final state is"
        fault = None if len(lost) else gradient_fault(reward, jnp.asarray(x), jax.tree.map(jnp.asarray, whole(info.cond)))
        raise FloatingPointError(
            f"{bad[0]} is {row[bad[0]]} in iteration {iteration} ({samples} not finite): the last checkpoint is kept. "
            + ("Lower the learning rates." if fault is None else f"The cause: {fault}.")
        )
    return row
