"""The floor of a benchmark: the time of a call if the device did its operations at the rate of a product of two large matrices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

SIDE = {"cpu": 2048}  # rows of the matrices: a tenth of a second on two cores
OTHERWISE = 8192


def large_product(dtype: Any = jnp.float32) -> tuple[Callable[[], Any], float]:
    """`call()`: the product of two square matrices of `dtype`; and its operations, two per multiplication and addition."""
    side = SIDE.get(jax.default_backend(), OTHERWISE)
    a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a), 2.0 * side**3


def operations(function: Callable, *args) -> float:
    """Additions and multiplications of `function(*args)` by XLA's count before it optimises; a loop's body would count once."""
    counted = jax.jit(function).lower(*args).cost_analysis()
    return float((counted or {}).get("flops", "nan"))


def floor(operations: float, product_seconds: Sequence[float], product_operations: float) -> list[float]:
    """Seconds of `operations` in every round at that round's rate of the product."""
    return [operations * seconds / product_operations for seconds in product_seconds]
