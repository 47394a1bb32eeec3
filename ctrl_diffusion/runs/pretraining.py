"""The loop of pre-training, with logs, checkpoints and exact resume."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from ..model import DiffusionModel
from ..parallel import ONE_DEVICE, Layout
from ..pretrain import denoising_loss
from .directory import RunDirectory
from .progress import ProgressBar

CHUNK = 500  # optimiser steps per compiled call of pre-training; one log row and one checkpoint each


class PretrainState(NamedTuple):
    """Everything that a resume of pre-training needs."""

    params: Any
    average: Any
    optimizer: optax.OptState


def pretrain(
    run: RunDirectory,
    model: DiffusionModel,
    x: Float[Array | np.ndarray, "n *x"],
    key: jax.Array,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    layout: Layout = ONE_DEVICE,
) -> tuple[DiffusionModel, float]:
    """Train a model by denoising score matching. If the run has a checkpoint, resume from the last one.

    The optimiser is Adam with a warm-up, a cosine decay and gradients clipped to norm 1. Step `i` draws from `fold_in(key, i)`; a resumed
    run therefore repeats the uninterrupted run bit for bit.

    Args:
        run: the folder. Its history gets one row per 500 steps in the phase "pretrain", with the mean `loss`, the `step` and
            `wall_seconds`.
        model: the initial model; its network may be your own.
        x: the data, `[n, *shape of a sample]`, scaled to about [-1, 1].
        key: the random key of all steps.
        steps: total number of optimiser steps.
        batch: samples per step of all devices together, drawn with replacement.
        learning_rate: the peak learning rate, after a warm-up of up to 100 steps.
        layout: the devices that share the work.

    Returns:
        The model with averaged parameters (decay 0.995 per step), and the seconds that all steps took.

    Raises:
        FloatingPointError: if the loss is not finite.
        OSError: if a checkpoint cannot be written.
        ValueError: if the devices cannot share the batch evenly, or a checkpoint cannot be read.
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
    layout.check_batch("batch", batch)
    state, x, key = layout.put(state, layout.parameters), *layout.put((jnp.asarray(x), key), layout.replicated)
    checkpoints, done, seconds = run.checkpoints("pretrain"), 0, 0.0
    restored = checkpoints.restore(state)
    if restored is not None:
        done, state, notes = restored
        seconds = notes["seconds"]
    run.keep_history("pretrain", "step", done + 1)
    with checkpoints, ProgressBar(steps, "pre-training", "step", done=done) as bar:
        while done < steps:
            begin, n = time.perf_counter(), min(CHUNK, steps - done)
            state, loss = fit(state, x, key, layout.put(jnp.arange(done, done + n), layout.replicated))
            loss = float(loss)
            if not jnp.isfinite(loss):
                raise FloatingPointError(
                    f"pre-training loss is {loss} at step {done + n}: lower learning_rate={learning_rate:g}."
                )
            done, seconds = done + n, seconds + time.perf_counter() - begin
            checkpoints.save(done, state, {"seconds": seconds})
            run.log("pretrain", done, {"step": done, "loss": loss, "wall_seconds": seconds})
            bar.update(n, f"loss={loss:.3f}")
    return model._replace(params=state.average), seconds
