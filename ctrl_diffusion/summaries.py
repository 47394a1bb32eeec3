"""Short texts for models, states and algorithms: parameters are counted and not listed."""

import math
import types
from typing import Any

import jax
import numpy as np
import wadler_lindig as wl
from flax import nnx

Arrays = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


def summary(tree: Any, *, most: int = 8, width: int = 100) -> str:
    """`tree` as it would be written in code, with long parts shortened.

    Networks and their parameters (`nnx.Module`, `nnx.State`), and dictionaries, lists and tuples of more than `most` arrays, are shown as
    their number of arrays and entries. Other arrays are shown as type and shape, more than `most` numbers as the first and the last,
    compiled functions as their name.

        State(params=State(27 arrays, 36,544 numbers of float32, 0.1 MB), opt_state=..., step=i32[])

    It is meant for the `__repr__` of a NamedTuple or an `equinox.Module`, and does not call that method itself.

    Args:
        tree: anything; arrays may be abstract (`jax.ShapeDtypeStruct`).
        most: longest dictionary, list or tuple that is shown in full.
        width: characters per line.
    """

    def shortened(x: Any) -> wl.AbstractDoc | None:
        if isinstance(x, Arrays):
            return wl.array_summary(x.shape, str(x.dtype), None)
        if isinstance(x, nnx.Module | nnx.State | nnx.Variable):
            return wl.TextDoc(f"{type(x).__name__}({_counts(x)})")
        plain = isinstance(x, dict | list) or type(x) is tuple
        if plain and len(_arrays(x)) > most:
            return wl.TextDoc(f"{type(x).__name__}({_counts(x)})")
        if plain and len(x) > most and not isinstance(x, dict) and all(isinstance(n, int | float) for n in x):
            return wl.TextDoc(f"{type(x).__name__}({len(x)} numbers from {x[0]:.4g} to {x[-1]:.4g})")
        name = getattr(x, "__name__", None)
        if name and hasattr(x, "__wrapped__") and not isinstance(x, type | types.FunctionType):
            return wl.TextDoc(f"<compiled {name}>")
        return None

    return wl.pformat(tree, custom=shortened, width=width)


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, Arrays)]


def _counts(tree: Any) -> str:
    arrays = _arrays(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    if not arrays:
        return "no arrays"
    numbers = [math.prod(array.shape) for array in arrays]
    megabytes = sum(n * array.dtype.itemsize for n, array in zip(numbers, arrays)) / 1e6
    kinds = " and ".join(sorted({str(array.dtype) for array in arrays}))
    many = "1 array" if len(arrays) == 1 else f"{len(arrays)} arrays"
    return f"{many}, {sum(numbers):,} numbers of {kinds}, {megabytes:.3g} MB"
