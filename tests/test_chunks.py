"""A function of a batch, evaluated on a few rows at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_diffusion.chunks import in_chunks


def layers(x, weights, depth=6):
    """A function of images row by row, which keeps much for its gradient."""
    y = x.reshape(x.shape[0], -1)
    for _ in range(depth):
        y = jnp.sin(y @ weights)
    return jnp.sum(y, axis=1)


WEIGHTS = jnp.asarray(np.random.default_rng(0).standard_normal((192, 192)) / 14, jnp.float32)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 7])
def test_chunks_change_nothing(size):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((6, 8, 8, 3)), jnp.float32)
    score = in_chunks(functools.partial(layers, weights=WEIGHTS), size)
    values, gradients = score(x), jax.grad(lambda x: jnp.sum(score(x)))(x)
    np.testing.assert_allclose(values, layers(x, WEIGHTS), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients, jax.grad(lambda x: jnp.sum(layers(x, WEIGHTS)))(x), rtol=1e-4, atol=1e-5)


def test_memory_of_chunks_does_not_grow_with_the_batch():
    """Temporary memory of the compiled gradient."""

    def temporary(batch, size):
        score = functools.partial(layers, weights=WEIGHTS)
        score = score if size is None else in_chunks(score, size)
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(score(x))))
        compiled = gradient.lower(jax.ShapeDtypeStruct((batch, 8, 8, 3), jnp.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (192 * 4)  # in rows of the batch

    assert temporary(256, None) >= temporary(64, None) + 6 * 192  # each layer keeps its input
    assert temporary(256, 4) <= temporary(64, 4) + 2 * 192  # the batch in the order of chunks, and its gradient


def test_chunks_of_nothing_and_of_trees():
    double = in_chunks(lambda tree, none: tree["x"] * 2 + tree["y"][:, None], 2)
    x = jnp.arange(15.0).reshape(5, 3)
    np.testing.assert_array_equal(double({"x": x, "y": jnp.ones(5)}, None), 2 * x + 1)
    assert double({"x": x[:0], "y": jnp.ones(0)}, None).shape == (0, 3)
    with pytest.raises(ValueError, match=r"the arguments have \[4, 5\] rows: give each the same number"):
        double({"x": x, "y": jnp.ones(4)}, None)
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        in_chunks(jnp.sum, 0)
