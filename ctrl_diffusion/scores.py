"""What rewards return, and what they are given: one real finite number for each sample, of samples that are finite."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class RewardError(ValueError):
    """A reward raised an exception, or did not return one finite number per sample."""


def as_numbers(name: str, found: Any, dtype: Any) -> np.ndarray:
    """The numbers that a reward on the host returned, in the precision `dtype`.

    Accepted: arrays, lists, torch tensors (with a gradient, of any device and precision), booleans, and a pair of any of these and a
    dictionary `(scores, info)`, of which the dictionary is left aside.

    Raises:
        RewardError: for anything that does not hold real numbers; the message names the reward, what it returned and the remedy.
    """
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
        found = found[0]
    if isinstance(found, np.ma.MaskedArray) and np.ma.count_masked(found):
        where = int(np.flatnonzero(np.ma.getmaskarray(found))[0])
        raise RewardError(f"reward {name!r} returned a masked value for sample {where}: return a number for every sample.")
    if hasattr(found, "detach"):
        found = _of_torch(found)
    if isinstance(found, list | tuple) and any(hasattr(value, "detach") for value in found):
        found = [value.detach().cpu().tolist() if hasattr(value, "detach") else value for value in found]
    try:
        if found is None:
            raise TypeError("nothing was returned")
        values = np.asarray(found)
        if values.dtype == object:
            values = values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"reward {name!r} returned {_briefly(found)}, which is no array of numbers: return one for each."
        ) from error
    return _real(name, values, dtype)


def _of_torch(tensor: Any) -> Any:
    """A tensor without its gradient, on the host, in a precision that numpy has."""
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.is_floating_point() else tensor


def _real(name: str, values: np.ndarray, dtype: Any) -> np.ndarray:
    if jnp.issubdtype(values.dtype, jnp.complexfloating) or not (
        jnp.issubdtype(values.dtype, jnp.number) or values.dtype == np.bool_
    ):
        raise RewardError(f"reward {name!r} returned {values.dtype} values: return real numbers.")
    with np.errstate(over="ignore"):
        kept = values.astype(dtype)
    lost = np.flatnonzero(np.isfinite(values) & ~np.isfinite(kept))
    if len(lost):
        raise RewardError(
            f"reward {name!r} returned {values.ravel()[lost[0]]:g} for sample {lost[0]}, which is beyond the range of "
            f"{np.dtype(dtype)}: return smaller numbers, for example logarithms."
        )
    return kept


def check_numbers(name: str, found: tuple[int, ...], values: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise `RewardError` unless `values`, of shape `found` over all devices, are finite and one for each sample of a batch of `shape`."""
    if found != shape[:1]:
        raise RewardError(
            f"reward {name!r} returned shape {found} for a batch of {shape[0]} samples: "
            f"return one number per sample, shape ({shape[0]},)."
        )
    values = _real(name, values, values.dtype)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise RewardError(
            f"reward {name!r} returned {values[bad[0]]} for sample {bad[0]} ({len(bad)} of {len(values)} samples are not "
            "finite): return a finite number for every sample, for example by bounding a logarithm."
        )


def check_samples(name: str, finite: np.ndarray) -> None:
    """Raise `RewardError` unless all samples of a reward are `finite`, one boolean each."""
    bad = np.flatnonzero(~finite)
    if len(bad):
        raise RewardError(
            f"sample {bad[0]} is not finite ({len(bad)} of {len(finite)} are not), so it has no reward {name!r}: sampling diverged. "
            "Lower the learning rate or the guidance, or take more steps."
        )


@jax.jit
def are_finite(x: jax.Array) -> jax.Array:
    """Whether all entries of each sample `[b, ...]` are finite, `[b]`."""
    return jnp.all(jnp.isfinite(x.reshape(x.shape[0], -1)), axis=1)


def _briefly(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."
