"""Denoising score matching, the loss of pre-training."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from .predictions import Prediction, V, expand
from .process import DiffusionProcess


def denoising_loss(
    graphdef: nnx.GraphDef,
    params,
    key: Key[Array, ""],
    x: Float[Array, "b *x"],
    process: DiffusionProcess,
    prediction: Prediction = V,
) -> Float[Array, ""]:
    """Mean over batch and dimensions of `(network(X_tau, t) - u)^2`, where `u` is the true prediction and `tau` is stratified.

    Sample `i` draws from `fold_in(key, i)`, so the loss does not depend on how the batch is divided over devices. This is denoising score
    matching (Vincent 2011); the prediction determines the weighting of noise levels.
    """
    schedule, n = process.schedule, x.shape[0]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
    strata = (jnp.arange(n) + jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 0)))(keys)) / n
    tau = (schedule.tau_min + (schedule.tau_max - schedule.tau_min) * strata).astype(x.dtype)
    eps = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), x.shape[1:], x.dtype))(keys)
    noisy = expand(schedule.alpha(tau), x) * x + expand(schedule.sigma(tau), x) * eps
    target = prediction.from_score(schedule, tau, noisy, -eps / expand(schedule.sigma(tau), x))
    output = nnx.merge(graphdef, params)(noisy, schedule.horizon - tau, None)
    return jnp.mean((output - target) ** 2)
