"""A small digit classifier, trained on noisy images: the reward model, and (on the other half of the data) the held-out reward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int


class Classifier(nnx.Module):
    """`[b, h, w, c] -> [b, 10]` log-probabilities; `features` is the layer before the last."""

    def __init__(self, pixels: int, width: int, rngs: nnx.Rngs):
        self.first = nnx.Linear(pixels, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 10, rngs=rngs)

    def features(self, x: Float[Array, "b *x"]) -> Float[Array, "b w"]:
        return nnx.silu(self.second(nnx.silu(self.first(x.reshape(x.shape[0], -1)))))

    def __call__(self, x: Float[Array, "b *x"]) -> Float[Array, "b 10"]:
        return jax.nn.log_softmax(self.last(self.features(x)))


LogProbabilities = Callable[[Float[Array, "b *x"]], Float[Array, "b 10"]]


def train_classifier(
    key, x: Float[Array, "n *x"], y: Int[Array, " n"], *, noise: float = 0.3, steps: int = 600, width: int = 128
) -> tuple[LogProbabilities, Any]:
    """Train on `x + noise N(0, 1)` with a smoothed cross-entropy; returns `log_probabilities(x)` and the parameters.

    Noise and smoothing (0.05) keep the log-probabilities of odd images moderate, as one wants of a reward.
    """
    key_init, key_train = jax.random.split(key)
    model = Classifier(x[0].size, width, nnx.Rngs(key_init))
    graphdef, params = nnx.split(model)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-3)

    def loss(params, key):
        k_rows, k_noise = jax.random.split(key)
        rows = jax.random.randint(k_rows, (256,), 0, len(x))
        logp = nnx.merge(graphdef, params)(x[rows] + noise * jax.random.normal(k_noise, x[rows].shape))
        return -jnp.mean(jnp.sum(optax.smooth_labels(jax.nn.one_hot(y[rows], 10), 0.05) * logp, axis=-1))

    @jax.jit
    def fit(params, opt, key):
        def body(carry, k):
            params, opt = carry
            change, opt = optimizer.update(jax.grad(loss)(params, k), opt, params)
            return (optax.apply_updates(params, change), opt), None

        return jax.lax.scan(body, (params, opt), jax.random.split(key, steps))[0]

    params, _ = fit(params, optimizer.init(params), key_train)
    return (lambda z: nnx.merge(graphdef, params)(z)), params
