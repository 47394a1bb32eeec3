"""Means over rows and their gradients, computed in microbatches on every device and reduced over devices once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from optax.microbatching import AccumulationType, Accumulator, microbatch

from .parallel import BATCH, DATA, FSDP, ONE_DEVICE, Layout
from .process import Params

Loss = Callable[[Params, Any], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
GivenLoss = Callable[[Params, Any, Any], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def reduced_once(loss: GivenLoss, given: Any, layout: Layout, parts: int) -> Loss:
    """`loss(params, rows, given)`, a mean over rows. Its gradient is computed in `parts` equal microbatches.

    `given` holds arrays that are the same for all rows and are not differentiated.
    """
    if layout.mesh is None and parts == 1:
        return lambda params, rows: loss(params, rows, given)
    evaluated = mean_over_batch(jax.value_and_grad(loss, has_aux=True), layout, parts)

    @jax.custom_vjp
    def total(params, rows):
        return evaluated(params, rows, given)[0]

    def forward(params, rows):
        found, gradient = evaluated(params, rows, given)
        return found, (gradient, rows)

    def backward(saved, cotangent):
        gradient, rows = saved
        return jax.tree.map(lambda g: cotangent[0] * g, gradient), jax.tree.map(_no_cotangent, rows)

    total.defvjp(forward, backward)
    return total


def mean_over_batch(mean: Callable[..., Any], layout: Layout, parts: int) -> Callable[..., Any]:
    """`mean(params, rows, given)`, a tree of means over rows, computed in `parts` equal microbatches on the devices of `layout`.

    Entries named `max_...` are maxima. If every device has all parameters, each computes its own rows, and the results are reduced over
    devices once at the end; loops inside `mean` do not change this. If parameters are divided (`fsdp > 1`), the compiler gathers them and
    reduces their gradients in every microbatch.
    """
    whole_parameters = layout.mesh is not None and layout.mesh.shape[FSDP] == 1

    def in_parts(params: Params, rows: Any, given: Any) -> Any:
        within = ONE_DEVICE if whole_parameters else layout
        return mean_in_parts(lambda part: mean(params, part, given), rows, within, parts)

    def on_each(params: Params, rows: Any, given: Any) -> Any:
        found, tree = jax.tree.flatten_with_path(in_parts(params, rows, given))
        reduced = list(jax.lax.pmean([v for path, v in found if not _is_maximum(path)], (DATA, FSDP)))
        largest = list(jax.lax.pmax([v for path, v in found if _is_maximum(path)], (DATA, FSDP)))
        return tree.unflatten([(largest if _is_maximum(path) else reduced).pop(0) for path, _ in found])

    if not whole_parameters:
        return in_parts
    everywhere = PartitionSpec()
    return jax.shard_map(
        on_each, mesh=layout.mesh, in_specs=(everywhere, BATCH, everywhere), out_specs=everywhere, check_vma=False
    )


def mean_in_parts(mean: Callable[[Any], Any], rows: Any, layout: Layout = ONE_DEVICE, parts: int = 1) -> Any:
    """`mean(rows)`, a tree of means over rows, computed in `parts` equal microbatches one after the other, in the memory of one.

    Entries named `max_...` are maxima. The first of `n` parts has the rows `0, n, 2 n, ...`, so every device has its share of every part.
    """
    if parts == 1:
        return mean(rows)
    size = jax.tree.leaves(rows)[0].shape[0] // parts

    def one(part: Any) -> Any:
        return mean(layout.constrain(part, partial(layout.shardings, 0)))

    first = jax.eval_shape(mean, jax.tree.map(lambda v: jax.ShapeDtypeStruct((size, *v.shape[1:]), v.dtype), rows))
    how = jax.tree.map_with_path(lambda path, _: _MAXIMUM if _is_maximum(path) else AccumulationType.MEAN, first)
    return microbatch(one, 0, size, how)(rows)


def each_in_parts(fn: Callable[[Any], Float[Array, " m"]], rows: Any, layout: Layout = ONE_DEVICE, parts: int = 1) -> Any:
    """`fn(rows)`, one number per row, computed in `parts` equal microbatches; without a gradient."""
    size = jax.tree.leaves(rows)[0].shape[0] // parts
    found = microbatch(fn, 0, size, AccumulationType.CONCAT)(rows) if parts > 1 else fn(rows)
    return layout.constrain(jax.lax.stop_gradient(found), partial(layout.shardings, 0))


def _lowest(v: Any) -> Any:
    return jnp.full(v.shape, -jnp.inf, v.dtype)


def _larger(total: Any, part: Any, _: Any) -> Any:
    return jnp.maximum(total, part)


_MAXIMUM = Accumulator(init=_lowest, update=_larger, finalize=lambda total: total, aggregate=lambda v: v)


def _is_maximum(path: Any) -> bool:
    return any(isinstance(key, jax.tree_util.DictKey) and str(key.key).startswith("max_") for key in path)


def _no_cotangent(v):
    return jnp.zeros_like(v) if jnp.issubdtype(v.dtype, jnp.floating) else np.zeros(v.shape, jax.dtypes.float0)
