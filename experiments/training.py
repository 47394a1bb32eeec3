"""The two long loops of an experiment, resumable: pre-training and fine-tuning."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from ctrl_diffusion import DiffusionModel
from ctrl_diffusion.algorithms import Algorithm, Info, State
from ctrl_diffusion.parallel import ONE_DEVICE, Layout, whole
from ctrl_diffusion.pretrain import denoising_loss
from ctrl_diffusion.rewards import RewardError

from .rundir import RunDirectory

CHUNK = 500  # optimiser steps per compiled call of pre-training; one log row and one checkpoint each


class PretrainState(NamedTuple):
    params: Any
    average: Any
    optimizer: optax.OptState


def pretrain(
    run: RunDirectory,
    model: DiffusionModel,
    x: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    layout: Layout = ONE_DEVICE,
) -> tuple[DiffusionModel, float]:
    """Denoising score matching on the images `x` with Adam, a cosine decay and a running average of the parameters.

    Batch `i` draws from `fold_in(key, i)`. Returns the model with averaged parameters and the seconds it took in all.
    """
    graphdef = nnx.graphdef(model.network)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 10), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    process, prediction = model.process, model.prediction

    @jax.jit(donate_argnums=0)
    def fit(state: PretrainState, x, key, indices):
        def body(state: PretrainState, i):
            key_rows, key_loss = jax.random.split(jax.random.fold_in(key, i))
            rows = layout.constrain(x[jax.random.randint(key_rows, (batch,), 0, len(x))], layout.batch)
            loss, gradient = jax.value_and_grad(lambda p: denoising_loss(graphdef, p, key_loss, rows, process, prediction))(
                state.params
            )
            change, opt = optimizer.update(gradient, state.optimizer, state.params)
            params = optax.apply_updates(state.params, change)
            average = optax.incremental_update(params, state.average, 0.005)
            return layout.constrain(PretrainState(params, average, opt), layout.parameters), loss

        state, losses = jax.lax.scan(body, state, indices)
        return state, jnp.mean(losses)

    params = jax.tree.map(jnp.copy, model.params)
    state = PretrainState(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    layout.check_batch("pretrain_batch", batch)
    state, x, key = layout.put(state, layout.parameters), *layout.put((x, key), layout.replicated)
    checkpoints, done, seconds = run.checkpoints("pretrain"), 0, 0.0
    restored = checkpoints.restore(state)
    if restored is not None:
        done, state, notes = restored
        seconds = notes["seconds"]
    run.keep_history("pretrain", "step", done + 1)
    with checkpoints, tqdm(total=steps, initial=done, desc="pre-training", unit="step") as bar:
        while done < steps:
            begin, n = time.perf_counter(), min(CHUNK, steps - done)
            state, loss = fit(state, x, key, layout.put(jnp.arange(done, done + n), layout.replicated))
            loss = float(loss)
            if not jnp.isfinite(loss):
                raise FloatingPointError(f"pre-training loss is {loss} at step {done + n}: lower --pretrain-learning-rate.")
            done, seconds = done + n, seconds + time.perf_counter() - begin
            checkpoints.save(done, state, {"seconds": seconds})
            run.log("pretrain", done, {"step": done, "loss": loss, "wall_seconds": seconds})
            bar.update(n)
            bar.set_postfix(loss=f"{loss:.3f}")
    return model._replace(params=state.average), seconds


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
    evaluate: Callable[[State], dict[str, Any]],
    observe: Callable[[Info], dict[str, Any]] | None = None,
    keep: Callable[[int, State], None] | None = None,
    evaluate_every: int,
    checkpoint_every: int,
    kl_budget: float | None,
) -> tuple[State, Progress]:
    """Iterate `algorithm` from `state`; iteration `i` draws from `fold_in(key, i)`, so a resume repeats
    the uninterrupted run.

    Stops early once the path KL of an iteration's samples exceeds `kl_budget` nats. `evaluate(state)` adds its numbers to
    the log every `evaluate_every` iterations, `observe(info)` every iteration, outside the measured time; `keep(iterations, state)` is
    called with every checkpoint.
    """
    checkpoints, done, seconds, stop = run.checkpoints("finetune"), 0, 0.0, "finished"
    restored = checkpoints.restore(state)
    if restored is not None:
        done, state, notes = restored
        seconds, stop = notes["seconds"], notes["stop_reason"]
    run.keep_history("finetune", "iteration", done)
    with checkpoints, tqdm(total=iterations, initial=done, desc="fine-tuning", unit="iteration") as bar:
        while done < iterations and stop == "finished":
            begin = time.perf_counter()
            try:
                state, info = algorithm.step(jax.random.fold_in(key, done), state)
            except RewardError as error:  # nothing has been learned yet
                if checkpoints.latest() != done:
                    checkpoints.save(done, state, {"seconds": seconds, "stop_reason": stop})
                checkpoints.close()
                raise RewardError(
                    f"iteration {done}: {error}. The state before this iteration is kept: the same command goes on from there."
                ) from error
            row = _row(info, done)
            seconds += time.perf_counter() - begin
            if kl_budget is not None and row["path_kl"] > kl_budget:
                stop = "kl budget"
            row |= {"iteration": done, "wall_seconds": seconds}
            if observe is not None:
                row |= observe(info)
            done += 1
            last = done == iterations or stop != "finished"
            if done % evaluate_every == 0 or last:
                row |= evaluate(state)
            run.log("finetune", done, row)
            if done % checkpoint_every == 0 or last:
                if keep is not None:  # first: a run that is resumed after its last checkpoint does not come here again
                    keep(done, state)
                checkpoints.save(done, state, {"seconds": seconds, "stop_reason": stop})
            bar.update()
            bar.set_postfix(reward=f"{row['reward']:.3f}", path_kl=f"{row['path_kl']:.2f}")
    return state, Progress(done, seconds, stop)


def _some(numbers: np.ndarray) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more are" if len(numbers) > 5 else " are")


def _row(info: Info, iteration: int) -> dict[str, Any]:
    """Metrics as floats; a non-finite loss or gradient ends the run, with the last checkpoint untouched."""
    row = {name: float(v) for name, v in jax.device_get(info.metrics).items()}
    bad = [name for name in ("policy_loss", "value_loss", "gradient_norm") if not jnp.isfinite(row.get(name, 0.0))]
    if bad:
        x = whole(info.samples)
        lost = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(axis=1))
        samples = f"the final states of samples {_some(lost)}" if len(lost) else "no final state is"
        raise FloatingPointError(
            f"{bad[0]} is {row[bad[0]]} in iteration {iteration} ({samples} not finite): the last checkpoint is kept. "
            "Lower the learning rates or --clip."
        )
    return row
