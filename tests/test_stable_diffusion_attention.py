"""Attention some queries at a time is attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctrl_diffusion.pretrained import chunked_attention, flash_attention, head_by_head
from experiments.pod_plan.chips import COMPILERS, describe, parse_slice


def arrays(n=10, m=7):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v = (jax.random.normal(key, (2, length, 3, 4)) for key, length in zip(keys, (n, m, m)))
    return q, k, v, jax.random.bernoulli(keys[3], 0.7, (2, 1, 1, m)).at[..., 0].set(True)


@pytest.mark.parametrize("split", [chunked_attention, head_by_head])
@pytest.mark.parametrize("size", [1, 3, 5, 10, 11])
@pytest.mark.parametrize("masked", [False, True])
def test_parts_of_attention_change_nothing(split, size, masked):
    q, k, v, mask = arrays()
    options = {"mask": mask} if masked else {}

    def total(attention):
        return lambda *qkv: jnp.sum(jnp.sin(attention(*qkv, **options)))

    whole, chunked = jax.nn.dot_product_attention, split(size)
    np.testing.assert_allclose(chunked(q, k, v, **options), whole(q, k, v, **options), rtol=1e-5, atol=1e-6)
    for a, b in zip(*(jax.grad(total(f), argnums=(0, 1, 2))(q, k, v) for f in (chunked, whole))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [chunked_attention, head_by_head])
def test_causal_attention_is_left_whole(split):
    q, k, v, _ = arrays(m=10)
    np.testing.assert_array_equal(split(2)(q, k, v, is_causal=True), jax.nn.dot_product_attention(q, k, v, is_causal=True))


@pytest.mark.parametrize(
    "n, m, shape",
    [
        (4096, 4096, "512,4096"),  # 2^21 logits at a time
        (4096, 77, "4096,77"),  # those of a head
        (1024, 77, "1,1,2,1024,77"),  # below 2^17 a head: all at once
        (2, 2**22, "1,4194304"),  # more than 2^21 in a row
    ],
)
def test_size_of_a_part_follows_the_context(n, m, shape):
    q, k = (jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32) for length in (n, m))
    exponentials = re.findall(r"f32\[([\d,]+)\] = exp ", str(jax.make_jaxpr(head_by_head())(q, k, k)))
    assert exponentials == [shape]


@pytest.mark.slow
def test_half_precision_of_one_head_is_as_exact_as_of_all():
    """Logits and softmax are float32: only weights and results are rounded. 5 % are for another order of sums."""
    q, k, v, _ = arrays(64, 64)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    exact = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in half))

    def error(attention):
        found = attention(*half)
        assert found.dtype == jnp.bfloat16
        return float(jnp.sqrt(jnp.mean((found.astype(jnp.float32) - exact) ** 2)))

    assert 0 < error(head_by_head(16)) < 1.05 * error(jax.nn.dot_product_attention)


@pytest.mark.parametrize("split", [chunked_attention, head_by_head])
def test_memory_is_that_of_a_chunk(split):
    """Of the matrix `[heads, n, n]` in temporary memory, whole: all of it at least; in small chunks: less than half."""
    n, heads = 512, 4
    shape = jax.ShapeDtypeStruct((1, n, heads, 8), jnp.float32)

    def temporary(attention):
        gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v) ** 2), argnums=(0, 1, 2)))
        return gradient.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes / (4 * heads * n * n)

    assert temporary(jax.nn.dot_product_attention) >= 1
    assert temporary(split(n // 32)) < 0.5


def test_a_gradient_computes_whole_heads_again():
    """Of the matrix `[heads, n, n]` a gradient holds a few heads' parts at a time, and not the whole."""
    n, heads = 512, 32
    shape = jax.ShapeDtypeStruct((1, n, heads, 8), jnp.float32)
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(head_by_head()(q, k, v) ** 2), argnums=(0, 1, 2)))
    temporary = gradient.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 0.5 * 4 * heads * n * n


FLASH = {
    "self-attention": ((2, 64, 8, 40), {}, jnp.bfloat16, "cudnn"),
    "causal": ((2, 64, 8, 40), {"is_causal": True}, jnp.bfloat16, "cudnn"),
    "float32": ((2, 64, 8, 40), {}, jnp.float32, None),
    "another context": ((2, 77, 8, 40), {}, jnp.bfloat16, None),
    "large heads": ((2, 64, 1, 512), {}, jnp.bfloat16, None),
    "odd heads": ((2, 64, 8, 42), {}, jnp.bfloat16, None),
    "masked": ((2, 64, 8, 40), {"mask": True}, jnp.bfloat16, None),
}


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_for_what_its_kernels_take(name, monkeypatch):
    """Anything else is computed as without it."""
    shape, options, dtype, expected = FLASH[name]
    called = []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **given: called.append(given) or q)
    q, k = jnp.zeros((2, 64, *shape[2:]), dtype), jnp.zeros(shape, dtype)
    flash_attention(q, k, k, **options)
    assert called == [{"is_causal": False, "implementation": expected} | options]


@pytest.mark.slow
def test_flash_attention_compiled_for_a_gpu_holds_no_matrix():
    pytest.importorskip("jax_cuda12_plugin", reason="needs the compiler for GPUs: pip install 'jax[cuda12]'")
    n, heads = 1024, 8
    sharding = jax.sharding.SingleDeviceSharding(describe(parse_slice("topology", "h100:1"))[0])
    shape = jax.ShapeDtypeStruct((1, n, heads, 40), jnp.bfloat16, sharding=sharding)

    def temporary(attention):
        gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v) ** 2), argnums=(0, 1, 2)))
        compiled = gradient.lower(shape, shape, shape).compile(COMPILERS["cuda"].options)
        return compiled.memory_analysis().temp_size_in_bytes / (2 * heads * n * n)

    assert temporary(jax.nn.dot_product_attention) >= 1
    assert temporary(flash_attention) < 0.2


@pytest.mark.parametrize("split", [chunked_attention, head_by_head])
def test_a_chunk_has_queries(split):
    with pytest.raises(ValueError, match="size=0 must be at least 1"):
        split(0)
