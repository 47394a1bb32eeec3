"""Pre-training as a loop that resumes."""

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
    """Denoising score matching with Adam, a cosine decay and a running average, or go on from the last checkpoint of the run.

    Step `i` draws from `fold_in(key, i)`, so that a run that was stopped and started again repeats the uninterrupted one bit for bit.

    Args:
        run: the folder; rows are in the phase "pretrain", one per 500 steps, with the mean `loss`, the `step` and `wall_seconds`.
        model: what to begin with; its network need not be one of this library's.
        x: the data, `[n, *shape of a sample]`, scaled to about [-1, 1].
        key: of all steps.
        steps: optimiser steps in all.
        batch: samples per step, drawn with replacement; of all devices together.
        learning_rate: peak of Adam's, after a warm-up of up to 100 steps; gradients are cut to norm 1.
        layout: devices that share the run.

    Returns:
        The model with averaged parameters (decay 0.995 per step), and the seconds that the steps took in all.

    Raises:
        FloatingPointError: for a loss that is not finite.
        ValueError: for a batch that the devices cannot share evenly, or a checkpoint that cannot be read.
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
