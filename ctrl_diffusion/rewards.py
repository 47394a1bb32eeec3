"""Rewards: functions from a batch of final states to one number each, in JAX (differentiable) or in Python on the host (black box)."""

import multiprocessing
import multiprocessing.pool
import os
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from .chunks import in_chunks
from .parallel import from_local_rows, local_rows
from .scores import RewardError as RewardError, are_finite, as_numbers, check_numbers, check_samples


class Reward(eqx.Module):
    """A reward `fn(x [b, *x]) -> [b]`, or `fn(x, cond)` if it is `conditional`.

    `differentiable` rewards are JAX functions of JAX arrays. Black boxes get numpy arrays and run on the host.

    Attributes:
        name: the name in logs.
        fn: a function, or a callable pytree (an `equinox.Module`, a `jax.tree_util.Partial`). Arrays of a pytree become arguments of
            compiled programs; use one for a large reward network.
        differentiable: whether `fn` is a JAX function.
        parts: weights and rewards of a `weighted_sum`, which are evaluated and logged one by one.
        conditional: whether `fn` takes the conditions of the samples, arrays `[b, ...]`.
        view: a JAX function or callable pytree, such as a decoder, that the devices apply to `x` before a black box gets it.
    """

    name: str = eqx.field(static=True)
    fn: Callable[..., Any]
    differentiable: bool = eqx.field(static=True)
    parts: tuple[tuple[float, "Reward"], ...] = ()
    conditional: bool = eqx.field(static=True, default=False)
    view: Callable[..., Any] | None = None

    def __call__(self, x: Any, cond: Any = None) -> Any:
        """The rewards of samples, unchecked and without `view`; `compute_rewards` checks them and applies `view`."""
        return self.fn(x, cond) if self.conditional else self.fn(x)


class _Compiled(eqx.Module):
    """A callable pytree; pytrees that differ only in the numbers of their arrays share one compilation."""

    fn: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return _apply(self.fn, *args)


@eqx.filter_jit
def _apply(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)


def differentiable(fn: Callable[..., Float[Array, " b"]], name: str | None = None, *, conditional: bool = False) -> Reward:
    """A differentiable reward from a JAX function `fn(x [b, *x]) -> [b]`, or `fn(x, cond)` if `conditional`. It is compiled once."""
    has_arrays = any(eqx.is_array(leaf) for leaf in jax.tree.leaves(fn))
    return Reward(name or _name(fn), _Compiled(fn) if has_arrays else jax.jit(fn), True, conditional=conditional)


def black_box(fn: Callable[..., Any], name: str | None = None, *, conditional: bool = False) -> Reward:
    """A reward from any Python function of a numpy batch `[b, *x]` (and its conditions, if `conditional`) that returns `b` numbers."""
    return Reward(name or _name(fn), fn, False, conditional=conditional)


def seen_through(
    view: Callable[[Float[Array, "b *x"]], Float[Array, "b *y"]], reward: Reward | Callable, *, chunk: int | None = None
) -> Reward:
    """The reward of `view(x)`, for example of images that a decoder makes from latents.

    Args:
        view: a JAX function or callable pytree. It runs on the devices, also for a black box.
        reward: a `Reward`, or any Python function of a numpy batch.
        chunk: number of samples that a differentiable reward views at a time (`in_chunks`), which bounds memory; `None`: all.
    """
    reward = as_reward(reward)
    parts = tuple((weight, seen_through(view, part, chunk=chunk)) for weight, part in reward.parts)
    if not reward.differentiable:
        first = view if reward.view is None else _Chain(view, reward.view)
        return Reward(reward.name, reward.fn, False, parts, reward.conditional, first)
    seen = _Chain(view, reward.fn)
    return Reward(reward.name, _Compiled(seen if chunk is None else _Chunks(seen, chunk)), True, parts, reward.conditional)


class _Chain(eqx.Module):
    """`then(first(x), ...)`."""

    first: Callable[..., Any]
    then: Callable[..., Any]

    def __call__(self, x: Any, *args: Any) -> Any:
        return self.then(self.first(x), *args)


class _Chunks(eqx.Module):
    """`fn` on `size` rows at a time."""

    fn: Callable[..., Any]
    size: int = eqx.field(static=True)

    def __call__(self, *rows: Any) -> Any:
        return in_chunks(self.fn, self.size)(*rows)


def weighted_sum(*parts: tuple[float, Reward | Callable]) -> Reward:
    """`sum_i weight_i reward_i`; it is differentiable if every part is. `weighted_sum((1.0, aesthetic), (-0.1, black_box(jpeg_bytes)))`.

    The mean of every part is logged under its name. `ValueError` if there is no part, or two parts have the same name.
    """
    found = tuple((float(weight), as_reward(part)) for weight, part in parts)
    names = [part.name for _, part in found]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"weighted_sum of {names}: give at least one reward, and each a name of its own (name=...).")
    name = " + ".join(f"{weight:g} {part.name}" for weight, part in found)
    total, has_gradient = _Sum(found), all(part.differentiable for _, part in found)
    return Reward(name, _Compiled(total) if has_gradient else total, has_gradient, found, conditional=True)


class _Sum(eqx.Module):
    """`sum_i weight_i reward_i(x, cond)`."""

    parts: tuple[tuple[float, Reward], ...]

    def __call__(self, x: Any, cond: Any = None) -> Any:
        return sum(weight * part(x, cond) for weight, part in self.parts)


def pooled(
    fn: Callable[[np.ndarray], Any],
    *,
    workers: int | None = None,
    chunk: int = 1,
    processes: bool = False,
    time_limit: float | None = None,
    name: str | None = None,
    conditional: bool = False,
) -> Reward:
    """A black box that computes parts of the batch in parallel, on this host.

    Args:
        fn: any Python function from a numpy batch `[m, *x]` (and its conditions, if `conditional`) to `m` numbers, `m <= chunk`.
        workers: number of threads or processes (default: the number of cores).
        chunk: samples per call.
        processes: use processes instead of threads, for code that holds Python's global lock. `fn` must then be importable (no lambda).
        time_limit: seconds that a batch may take. Beyond it the reward fails, with an error that names the missing samples.
        name: the name in logs (default: that of `fn`).
        conditional: whether `fn` takes the conditions of the samples as its second argument.

    Raises:
        ValueError: for numbers that are not positive.
    """
    if (workers is not None and workers < 1) or chunk < 1 or not (time_limit is None or time_limit > 0):
        raise ValueError(f"workers={workers} and chunk={chunk} must be at least 1, time_limit={time_limit} positive (seconds).")
    pools: list[Any] = []

    def call(x: np.ndarray, *cond: Any) -> np.ndarray:
        if not pools:
            make = multiprocessing.get_context("spawn").Pool if processes else multiprocessing.pool.ThreadPool
            pools.append(make(workers or os.cpu_count()))
        begin, starts = time.monotonic(), range(0, len(x), chunk)
        pending = [pools[0].apply_async(fn, _rows((x, *cond), i, chunk)) for i in starts]
        values = []
        for i, part in zip(starts, pending):
            samples = f"samples {i} to {min(i + chunk, len(x)) - 1}"
            try:
                left = None if time_limit is None else max(time_limit - (time.monotonic() - begin), 0)
                value = as_numbers(name or _name(fn), part.get(left), np.float64)
            except multiprocessing.TimeoutError:
                pools.pop().terminate()  # threads are left behind: they end with the process
                raise TimeoutError(f"no value for {samples} within time_limit={time_limit:g} seconds") from None
            except RewardError:
                raise
            except Exception as error:
                raise RuntimeError(f"{samples}: {type(error).__name__}: {error}") from error
            if value.shape != (len(x[i : i + chunk]),):
                raise ValueError(f"{samples}: shape {value.shape} instead of one number per sample")
            values.append(value)
        return np.concatenate(values)

    return Reward(name or _name(fn), call, False, conditional=conditional)


def _rows(tree: Any, start: int, count: int) -> Any:
    return jax.tree.map(lambda v: v[start : start + count], tree)


def as_reward(reward: Reward | Callable) -> Reward:
    """A `Reward` unchanged, or a plain function as a black box. Wrap a JAX function in `differentiable` to get its gradient."""
    if isinstance(reward, Reward):
        return reward
    if not callable(reward):
        raise TypeError(
            f"reward={reward!r} must be a function from a batch of samples to one number each: pass a function or a Reward."
        )
    return black_box(reward)


def compute_rewards(reward: Reward, x: Float[Array, "b *x"], cond: Any = None) -> Float[Array, " b"]:
    """The rewards of samples, checked: one finite number per sample.

    If the batch is divided over processes, each computes and checks the rows on its own devices. The result is divided in the same way,
    and an error on one process is raised on all.

    Args:
        reward: the reward; its `view` is applied.
        x: samples.
        cond: their conditions, arrays `[b, ...]`, for rewards that take them.

    Raises:
        RewardError: if the reward raises or returns anything else; the message names the sample and the remedy.
    """
    if reward.parts and not reward.differentiable:
        return sum(weight * compute_rewards(part, x, cond) for weight, part in reward.parts)  # pyright: ignore[reportReturnType]
    seen = x if reward.differentiable or reward.view is None else _apply(reward.view, x)
    try:
        values, error = _checked(reward, seen, cond), None
    except RewardError as found:
        values, error = None, found
    _raise_together(error, reward, x)
    return values.astype(x.dtype) if reward.differentiable else from_local_rows(values, x)  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]


def try_reward(reward: Reward, x: Float[Array, "b *x"], cond: Any = None) -> None:
    """Find the faults of a reward on a few samples, before anything long begins. A differentiable one is traced, not run.

    Raises:
        RewardError: as `compute_rewards`.
    """
    if not reward.differentiable:
        compute_rewards(reward, x, cond)
        return
    try:
        found = jax.eval_shape(reward, x, cond)
    except Exception as error:
        raise RewardError(f"reward {reward.name!r} raised {type(error).__name__} on a batch of {x.shape}: {error}") from error
    check_numbers(reward.name, np.shape(found), np.zeros(x.shape[0], getattr(found, "dtype", object)), x.shape)


def gradient_fault(reward: Reward, x: Float[Array, "b *x"], cond: Any = None) -> str | None:
    """A sentence that names the samples at which the reward is finite and its gradient is not; `None` if there is none."""
    if not reward.differentiable:
        return None
    gradient = jax.grad(lambda x: jnp.sum(reward(x, cond)))(x)
    bad = np.flatnonzero(np.isfinite(np.asarray(reward(x, cond))) & ~np.asarray(are_finite(gradient)))
    if not len(bad):
        return None
    return (
        f"the gradient of reward {reward.name!r} is not finite at sample {bad[0]} ({len(bad)} of {len(x)}), though its value is: look for "
        "a square root, norm, logarithm or quotient at 0, also in the branch of jnp.where that is not taken"
    )


def _checked(reward: Reward, x: Float[Array, "b *x"], cond: Any) -> Any:
    """All numbers of a differentiable reward; of a black box, the numbers of this process's rows."""
    if reward.differentiable:  # all processes call it, also one that will raise: its program may be divided over them
        values = _called(reward, x, cond)
        check_samples(reward.name, local_rows(are_finite(x)))
        check_numbers(reward.name, values.shape, local_rows(values) if values.ndim else np.asarray(values), x.shape)
        return values
    rows, cond = jax.tree.map(local_rows, (x, cond))
    check_samples(reward.name, np.isfinite(rows).reshape(len(rows), -1).all(axis=1))
    values = as_numbers(reward.name, _called(reward, rows, cond), x.dtype)
    check_numbers(reward.name, values.shape, values, rows.shape)
    return values


def _raise_together(error: RewardError | None, reward: Reward, x: Float[Array, "b *x"]) -> None:
    """Raise the error on all processes that share `x`. Otherwise the others would wait for the one that failed."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(error is not None)))
        if error is None and len(failed):
            error = RewardError(f"reward {reward.name!r} failed on process {failed[0]}: see the error message of that process.")
    if error is not None:
        raise error


def compute_reward_terms(
    reward: Reward, x: Float[Array, "b *x"], cond: Any = None
) -> tuple[Float[Array, " b"], dict[str, Float[Array, " b"]]]:
    """`compute_rewards`, and the rewards of the parts of a `weighted_sum` by name; other rewards have no parts."""
    if not reward.parts:
        return compute_rewards(reward, x, cond), {}
    values = {part.name: compute_rewards(part, x, cond) for _, part in reward.parts}
    return sum(weight * values[part.name] for weight, part in reward.parts), values  # pyright: ignore[reportReturnType]


def _called(reward: Reward, x, cond) -> Any:
    try:
        return reward(x, cond)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward {reward.name!r} raised {type(error).__name__} on a batch of {x.shape}: {error}") from error


def _name(fn: Callable) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
