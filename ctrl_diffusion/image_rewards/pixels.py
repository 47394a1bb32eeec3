"""From images in [-1, 1] to the pixels that a vision tower reads: 8 bits, resize, centre crop, normalise.

Reference implementations read 8-bit images, and most resize them with Pillow, which rounds to 8 bits twice more. The forward pass makes
the same roundings, to the bit. The backward pass treats them as the identity (straight through). So the score equals the reference's and
still has a gradient. `Preprocess(rounded=False)` does not round.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Images = Float[Array, "b h w 3"]
Resized = Float[Array, "b _ _ 3"]  # images of another size
# resize(images in [0, 255], height, width) -> images of that size
ResizeFn = Callable[[Images, int, int], Resized]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BITS = 22  # of Pillow's fixed-point weights behind the point


@jax.custom_jvp
def straight_through(value: Float[Array, "..."], smooth: Float[Array, "..."]) -> Float[Array, "..."]:
    """`value` in the forward pass, with the derivatives of `smooth`."""
    return value


@straight_through.defjvp
def _(primals, tangents):
    return straight_through(*primals), tangents[1]


def eight_bits(images: Images) -> Images:
    """Whole numbers in [0, 255]. The gradient is straight through the rounding; it is zero where the image is clipped."""
    clipped = jnp.clip(images, 0, 255)
    return straight_through(jnp.round(clipped), clipped)


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' piecewise cubic of support [-2, 2] with slope `a` at 1 (Keys 1981)."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x**2 + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@functools.cache
def antialiased_weights(before: int, after: int) -> np.ndarray:
    """The weights of `before` pixels on a line for each of `after` pixels, `[after, before]`; every row sums to one.

    This is Pillow's bicubic filter, and torch's with `antialias=True`. The cubic of slope -1/2 is stretched by the factor of reduction, cut
    off at the border, and renormalised there.
    """
    ratio = before / after
    centres = (np.arange(after)[:, None] + 0.5) * ratio
    weights = cubic((np.arange(before) + 0.5 - centres) / max(ratio, 1), -0.5)
    return weights / weights.sum(1, keepdims=True)


@functools.cache
def interpolating_weights(before: int, after: int) -> np.ndarray:
    """The weights of torch's bicubic filter without antialiasing: four pixels, slope -3/4; pixels beyond the border repeat it."""
    centres = (np.arange(after)[:, None] + 0.5) * (before / after) - 0.5
    pixels = np.floor(centres) + np.arange(-1, 3)
    weights = np.zeros((after, before))
    np.add.at(weights, (np.arange(after)[:, None], np.clip(pixels, 0, before - 1).astype(int)), cubic(pixels - centres, -0.75))
    return weights


def _along(axis: int, weights: np.ndarray, images: Images) -> Resized:
    """`weights [n, m]` applied to the lines of `m` pixels along an axis, in full precision on every device."""
    lines = jnp.tensordot(images, jnp.asarray(weights, images.dtype), ((axis,), (1,)), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(lines, -1, axis)


def antialiased(images: Images, height: int, width: int) -> Resized:
    """Bicubic with antialiasing, as torch resizes floating-point images with `antialias=True`; no clipping."""
    lines = _along(2, antialiased_weights(images.shape[2], width), images)
    return _along(1, antialiased_weights(images.shape[1], height), lines)


def interpolated(images: Images, height: int, width: int) -> Resized:
    """Bicubic without antialiasing, as torch resizes floating-point images with `antialias=False`; no clipping."""
    lines = _along(2, interpolating_weights(images.shape[2], width), images)
    return _along(1, interpolating_weights(images.shape[1], height), lines)


def pillow(images: Images, height: int, width: int) -> Resized:
    """Pillow's bicubic filter on images of whole numbers, equal to the bit. Gradients are straight through its roundings.

    It filters along the width, then along the height, and rounds to 8 bits after each.
    """
    return _pillow_along(1, height, _pillow_along(2, width, images))


def _pillow_along(axis: int, size: int, images: Images) -> Resized:
    weights = antialiased_weights(images.shape[axis], size)
    whole = np.trunc(weights * 2**BITS + np.copysign(0.5, weights))  # as Pillow rounds them
    low = (whole + 2**10) % 2**11 - 2**10  # two halves of eleven bits: sums of their products with pixels are exact in float32
    high = (whole - low) / 2**11
    pixels = jax.lax.stop_gradient(jnp.round(images)).astype(jnp.float32)
    total = _along(axis, high, pixels).astype(jnp.int32) * 2**11 + _along(axis, low, pixels).astype(jnp.int32)
    rounded = jnp.clip((total + 2 ** (BITS - 1)) >> BITS, 0, 255)
    return straight_through(rounded.astype(images.dtype), jnp.clip(_along(axis, weights, images), 0, 255))


def shortest_edge(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shorter side equal to `size` and the longer side in proportion, rounded down."""
    longer = int(size * max(height, width) / min(height, width))
    return (size, longer) if height <= width else (longer, size)


def half_down(excess: int) -> int:
    """Pixels cut off before a centre crop, as in transformers."""
    return excess // 2


def half_even(excess: int) -> int:
    """Pixels cut off before a centre crop, as in torchvision."""
    return round(excess / 2)


class Preprocess(NamedTuple):
    """`pixels = preprocess(images)`: images `[b, h, w, 3]` in [-1, 1] to a tower's `[b, size, size, 3]`.

    The steps are: to [0, 255], clipped; resize the shorter side to `size`; centre crop; `(x / 255 - mean) / std`. The gradient is that of
    these steps, and zero where a pixel is clipped.
    """

    size: int = 224
    resize: ResizeFn = pillow
    """`pillow`, `antialiased` or `interpolated`; `pillow` resizes like `antialiased` where nothing is rounded."""
    margin: Callable[[int], int] = half_even
    """Where the crop begins, if a side is so many pixels too long."""
    rounded: bool = True
    """Round to 8 bits wherever the reference does."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: Images) -> Float[Array, "b size size 3"]:
        images = 127.5 * (images + 1)
        images = eight_bits(images) if self.rounded else jnp.clip(images, 0, 255)
        height, width = shortest_edge(images.shape[1], images.shape[2], self.size)
        resize = antialiased if self.resize is pillow and not self.rounded else self.resize
        images = resize(images, height, width)
        top, left = self.margin(height - self.size), self.margin(width - self.size)
        images = images[:, top : top + self.size, left : left + self.size]
        return (images / 255 - jnp.asarray(self.mean, images.dtype)) / jnp.asarray(self.std, images.dtype)


def check_images(images: Images) -> None:
    """Raise `ValueError` unless `images` has the shape of a batch of colour images."""
    if images.ndim != 4 or images.shape[-1] != 3 or not math.prod(images.shape[1:3]):
        raise ValueError(f"images of shape {images.shape} must be [b, h, w, 3], in [-1, 1].")
