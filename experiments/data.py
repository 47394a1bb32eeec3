"""Scikit-learn's handwritten digits: 1797 real 8x8 images that ship with the package (CC BY 4.0)."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits


class Images(NamedTuple):
    """Images `[n, h, w, c]` in [-1, 1] and, where known, integer labels `[n]`."""

    x: np.ndarray
    y: np.ndarray | None


def digits() -> Images:
    """All 1797 digits, `[1797, 8, 8, 1]`: -1 is background, 1 is full ink."""
    images, labels = load_digits(return_X_y=True)
    return Images((images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32), labels.astype(np.int32))


def from_array(x) -> Images:
    """A user's images `[n, h, w]` or `[n, h, w, c]`, float, in [-1, 1]."""
    x = np.asarray(x)
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim != 4 or len(x) < 2:
        raise ValueError(
            f"data has shape {np.shape(x)}: pass at least two images as [n, height, width] or [n, height, width, channels]."
        )
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"data has dtype {x.dtype}: pass floats in [-1, 1] (for bytes: x / 127.5 - 1).")
    low, high = float(np.min(x)), float(np.max(x))
    if not (np.isfinite(low) and np.isfinite(high)) or low < -1.001 or high > 1.001:
        raise ValueError(f"data ranges over [{low:g}, {high:g}]: scale it to [-1, 1].")
    return Images(x.astype(np.float32), None)
