"""Rewards: a batch of final states to one number each, differentiable (JAX) or black box (any Python function, on the host)."""

import multiprocessing
import multiprocessing.pool
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from .parallel import from_local_rows, local_rows


class Reward(NamedTuple):
    """A reward `fn(x [b, *x]) -> [b]`.

    `differentiable` rewards are JAX functions and get JAX arrays; black boxes get numpy arrays and run on the host.
    """

    name: str
    fn: Callable[[Any], Any]
    differentiable: bool
    parts: tuple[tuple[float, "Reward"], ...] = ()
    """Weights and rewards of a `weighted_sum`, which are evaluated and logged one by one."""


class RewardError(ValueError):
    """A reward that returned something other than one finite number per sample, or raised."""


def differentiable(fn: Callable[[Float[Array, "b *x"]], Float[Array, " b"]], name: str | None = None) -> Reward:
    """A JAX reward; compiled once."""
    return Reward(name or _name(fn), jax.jit(fn), True)


def black_box(fn: Callable[[np.ndarray], Any], name: str | None = None) -> Reward:
    """Any Python function from a numpy batch `[b, *x]` to `b` numbers."""
    return Reward(name or _name(fn), fn, False)


def weighted_sum(*parts: tuple[float, Reward | Callable]) -> Reward:
    """`sum_i weight_i reward_i`, differentiable if every part is: `weighted_sum((1.0, aesthetic), (-0.1, black_box(jpeg_bytes)))`.

    The mean of every part is logged under its name, which must be its own.
    """
    found = tuple((float(weight), as_reward(part)) for weight, part in parts)
    names = [part.name for _, part in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"weighted_sum of {names}: give at least one reward, and each a name of its own (name=...).")
    total = Reward(
        " + ".join(f"{weight:g} {part.name}" for weight, part in found),
        lambda x: sum(weight * part.fn(x) for weight, part in found),
        all(part.differentiable for _, part in found),
        found,
    )
    return total._replace(fn=jax.jit(total.fn)) if total.differentiable else total


def pooled(
    fn: Callable[[np.ndarray], Any],
    *,
    workers: int | None = None,
    chunk: int = 1,
    processes: bool = False,
    time_limit: float | None = None,
    name: str | None = None,
) -> Reward:
    """A black box that is called on parts of the batch at the same time, on this host.

    Args:
        fn: any Python function from a numpy batch `[m, *x]` to `m` numbers, `m <= chunk`.
        workers: threads or processes (default: as many as there are cores).
        chunk: samples per call.
        processes: use processes instead of threads, for code that holds Python's global lock; `fn` must then be importable (no lambda).
        time_limit: seconds that a batch may take; a reward that hangs then raises, naming the samples it hangs on.
    """
    if (workers is not None and workers < 1) or chunk < 1 or not (time_limit is None or time_limit > 0):
        raise ValueError(f"workers={workers} and chunk={chunk} must be at least 1, time_limit={time_limit} positive (seconds).")
    pools: list[Any] = []

    def call(x: np.ndarray) -> np.ndarray:
        if not pools:
            make = multiprocessing.get_context("spawn").Pool if processes else multiprocessing.pool.ThreadPool
            pools.append(make(workers or os.cpu_count()))
        begin, starts = time.monotonic(), range(0, len(x), chunk)
        pending = [pools[0].apply_async(fn, (x[i : i + chunk],)) for i in starts]
        values = []
        for i, part in zip(starts, pending):
            samples = f"samples {i} to {min(i + chunk, len(x)) - 1}"
            try:
                left = None if time_limit is None else max(time_limit - (time.monotonic() - begin), 0)
                value = np.asarray(part.get(left))
            except multiprocessing.TimeoutError:
                pools.pop().terminate()  # threads are left behind: they end with the process
                raise TimeoutError(f"no value for {samples} within time_limit={time_limit:g} seconds") from None
            except Exception as error:
                raise RuntimeError(f"{samples}: {type(error).__name__}: {error}") from error
            if value.shape != (len(x[i : i + chunk]),):
                raise ValueError(f"{samples}: shape {value.shape} instead of one number per sample")
            values.append(value)
        return np.concatenate(values)

    return Reward(name or _name(fn), call, False)


def as_reward(reward: Reward | Callable) -> Reward:
    """A `Reward` unchanged; a plain function as a black box (always valid: use `differentiable` to promise more)."""
    if isinstance(reward, Reward):
        return reward
    if not callable(reward):
        raise TypeError(f"reward={reward!r} must be a function from a batch of samples to one number each.")
    return black_box(reward)


def evaluate(reward: Reward, x: Float[Array, "b *x"]) -> Float[Array, " b"]:
    """Evaluate and check: one finite number per sample, else a `RewardError` that says which sample and what to do.

    Of a batch that is divided over processes each evaluates and checks the rows on its own devices; the result is divided alike.
    """
    if reward.differentiable:
        values = _called(reward, x)
        _check(reward, values.shape, local_rows(values) if values.ndim else np.asarray(values), x.shape)
        return values.astype(x.dtype)
    rows = local_rows(x)
    values = np.asarray(_called(reward, rows))
    _check(reward, values.shape, values, rows.shape)
    return from_local_rows(values, x)


def evaluate_parts(reward: Reward, x: Float[Array, "b *x"]) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """`evaluate`, and the values of the parts of a `weighted_sum` by name (none of any other reward)."""
    if not reward.parts:
        return evaluate(reward, x), {}
    values = {part.name: evaluate(part, x) for _, part in reward.parts}
    return sum(weight * values[part.name] for weight, part in reward.parts), values  # pyright: ignore[reportReturnType]


def _called(reward: Reward, x) -> Any:
    try:
        return reward.fn(x)
    except Exception as error:
        raise RewardError(f"reward {reward.name!r} raised {type(error).__name__} on a batch of {x.shape}: {error}") from error


def _check(reward: Reward, found: tuple[int, ...], values: np.ndarray, shape: tuple[int, ...]) -> None:
    """`RewardError` unless a batch of `shape` got finite `values`, one for each."""
    if found != shape[:1]:
        raise RewardError(
            f"reward {reward.name!r} returned shape {found} for a batch of {shape[0]} samples: "
            f"return one number per sample, shape ({shape[0]},)."
        )
    if not np.issubdtype(values.dtype, np.number):
        raise RewardError(f"reward {reward.name!r} returned {values.dtype} values: return real numbers.")
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise RewardError(
            f"reward {reward.name!r} returned {values[bad[0]]} for sample {bad[0]} ({len(bad)} of {len(values)} samples are not "
            "finite): return a finite number for every sample, for example by bounding a logarithm."
        )


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
