"""Convolutions whose gradients are fast inside loops on CPUs, too."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


def convolution(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    dimension_numbers: Any,
    precision: Any = None,
    **options: Any,
) -> Float[Array, "..."]:
    """`jax.lax.conv_general_dilated` with fast gradients on CPUs, for `nnx.Conv(..., conv_general_dilated=convolution)`.

    The gradients of a convolution are convolutions with another order of axes. XLA has fast CPU code for one order only. Outside of loops
    it reorders the axes; in the body of a loop (`lax.scan`, `lax.map`) it does not, and its code is ten times slower or worse. This
    affects training steps in one program, gradients through paths, gradients in microbatches, and images decoded a few at a time.
    Here the gradients have the fast order from the start; results differ by rounding. On other devices, and for groups, dilations,
    other orders of axes, other result types and arrays divided over explicit mesh axes, JAX's own convolution is used.

    Args:
        x: `[b, *space, c]`.
        kernel: `[*space, c, d]`.
        strides, padding, dimension_numbers, precision, options: of `jax.lax.conv_general_dilated`.

    Returns:
        `[b, *space, d]`.
    """
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    as_usual = all(isinstance(v, int) and v == 1 for v in jax.tree.leaves(options))
    divided = any(axis is not None for v in (x, kernel) for axis in jax.typeof(v).sharding.spec)  # over a mesh's explicit axes
    if not as_usual or divided or numbers != _channels_last(x.ndim - 2):
        return lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=dimension_numbers, precision=precision, **options
        )
    padding = padding if isinstance(padding, str) else tuple((before, after) for before, after in padding)
    if precision is None:  # the default of now, not of when a gradient is asked for
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return _convolution(_Window(tuple(strides), padding, precision), x, kernel)


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
    space = range(rank)
    images = (0, rank + 1, *(1 + i for i in space))
    return lax.ConvDimensionNumbers(images, (rank + 1, rank, *space), images)


class _Window(NamedTuple):
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    precision: Any

    def __call__(self, x, kernel, numbers: lax.ConvDimensionNumbers):
        return lax.conv_general_dilated(
            x, kernel, self.strides, self.padding, dimension_numbers=numbers, precision=self.precision
        )


def _as_usual(window: _Window, x, kernel):
    return window(x, kernel, _channels_last(x.ndim - 2))


def _by_inputs(window: _Window, x, kernel):
    """The same convolution, with the kernel as `[*space, d, c]`. Its transpose in `x` has the usual axes."""
    numbers = _channels_last(x.ndim - 2)
    outputs, inputs, *space = numbers.rhs_spec
    return window(x, jnp.swapaxes(kernel, -1, -2), numbers._replace(rhs_spec=(inputs, outputs, *space)))


def _by_kernels(window: _Window, x, kernel):
    """The same convolution, of images `[c, *space, b]` and kernels `[c, *space, d]`. Its transpose in `kernel` has the usual axes."""
    last = x.ndim - 1
    space = range(1, last)
    numbers = lax.ConvDimensionNumbers((last, 0, *space), (last, 0, *space), (last - 1, last, *range(last - 1)))
    return jnp.moveaxis(window(jnp.swapaxes(x, 0, -1), jnp.moveaxis(kernel, -2, 0), numbers), -2, 0)


_convolution = jax.custom_jvp(_as_usual, nondiff_argnums=(0,))


@partial(_convolution.defjvp, symbolic_zeros=True)
def _(window: _Window, primals, tangents):
    def change(swapped, *v):  # a gradient keeps `x` and `kernel`, not copies with other axes
        def on_device(*v):
            return lax.platform_dependent(*v, cpu=partial(swapped, window), default=partial(_as_usual, window))

        return jax.checkpoint(on_device, prevent_cse=False)(*v)

    (x, kernel), (dx, d_kernel) = primals, tangents
    y = _convolution(window, x, kernel)
    dy = jnp.zeros_like(y)
    if not isinstance(dx, SymbolicZero):
        dy = change(_by_inputs, dx, kernel)
    if not isinstance(d_kernel, SymbolicZero):
        dy = dy + change(_by_kernels, x, d_kernel)
    return y, dy
