"""The inverse of a monotone scalar function. It is differentiable and takes a fixed number of iterations."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Times = Float[Array, "..."]


def decreasing_inverse(fn: Callable[[Times], Times], target: Times, lo: Times, hi: Times, iterations: int = 24) -> Times:
    """`x` in `[lo, hi]` with `fn(x) = target`, for a decreasing `fn`. If there is none, the nearest end.

    It uses Newton's method inside a shrinking bracket, and bisection if a Newton step would leave the bracket. The derivative with
    respect to `target` and to arrays inside `fn` is that of the implicit function.
    """

    def slope_at(x):
        return jax.jvp(fn, (x,), (jnp.ones_like(x),))

    def body(_, carry):
        x, lo, hi = carry
        value, slope = slope_at(x)
        lo, hi = jnp.where(value >= target, x, lo), jnp.where(value < target, x, hi)
        newton = x - (value - target) / slope
        inside = (newton >= lo) & (newton <= hi)  # false for nan
        return jnp.where(inside, newton, 0.5 * (lo + hi)), lo, hi

    lo, hi = jnp.broadcast_to(lo, target.shape), jnp.broadcast_to(hi, target.shape)
    x, lo, hi = jax.lax.stop_gradient(jax.lax.fori_loop(0, iterations, body, (0.5 * (lo + hi), lo, hi)))
    value, slope = slope_at(x)
    step = (value - target) / jax.lax.stop_gradient(slope)
    settled = jnp.abs(jax.lax.stop_gradient(step)) < 1e-3 * (1 + jnp.abs(x))  # false at an end, where there is no solution
    return jnp.where(settled, x - jnp.where(settled, step, 0), x)
