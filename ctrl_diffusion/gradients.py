"""A mean over rows and its gradient: part by part in time, device by device in space, and reduced once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from .objective import Rows
from .parallel import BATCH, DATA, FSDP, ONE_DEVICE, Layout
from .process import Params

Loss = Callable[[Params, Rows], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
GivenLoss = Callable[[Params, Rows, Any], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def reduced_once(loss: GivenLoss, given: Any, layout: Layout, parts: int) -> Loss:
    """`loss(params, rows, given)`, a mean over rows, with a gradient that is summed over `parts` equal parts of the rows.

    `given` are arrays that are not differentiated, the same for all rows. Parts are worked through one after the other.

    Where devices have all parameters, each works through its own rows and the sums are reduced over the devices once, at the end,
    whatever loops the loss has inside. Where parameters are divided (`fsdp > 1`) the compiler brings them together and reduces their
    gradients as it sees fit, in every part. Metrics are means, those named `max_...` maxima.
    """
    alone = layout.mesh is None
    whole_parameters = layout.mesh is not None and layout.mesh.shape[FSDP] == 1
    if alone and parts == 1:
        return lambda params, rows: loss(params, rows, given)

    def in_parts(params: Params, rows: Rows, given: Any) -> tuple[Any, Params]:
        def one(part):
            return jax.value_and_grad(loss, has_aux=True)(params, part, given)

        return mean_in_parts(one, rows, ONE_DEVICE if whole_parameters else layout, parts)

    def on_each(params: Params, rows: Rows, given: Any) -> tuple[Any, Params]:
        (value, metrics), gradient = in_parts(params, rows, given)
        axes = (DATA, FSDP)
        maxima = {name: jax.lax.pmax(v, axes) for name, v in metrics.items() if name.startswith("max_")}
        means = {name: v for name, v in metrics.items() if name not in maxima}
        value, means, gradient = jax.lax.pmean((value, means, gradient), axes)
        return (value, means | maxima), gradient

    def evaluated(params: Params, rows: Rows) -> tuple[Any, Params]:
        if not whole_parameters:
            return in_parts(params, rows, given)
        everywhere = PartitionSpec()
        return jax.shard_map(
            on_each, mesh=layout.mesh, in_specs=(everywhere, BATCH, everywhere), out_specs=everywhere, check_vma=False
        )(params, rows, given)  # fmt: skip

    @jax.custom_vjp
    def total(params, rows):
        return evaluated(params, rows)[0]

    def forward(params, rows):
        found, gradient = evaluated(params, rows)
        return found, (gradient, rows)

    def backward(saved, cotangent):
        gradient, rows = saved
        return jax.tree.map(lambda g: cotangent[0] * g, gradient), jax.tree.map(_no_cotangent, rows)

    total.defvjp(forward, backward)
    return total


def mean_in_parts(mean: Callable[[Any], Any], rows: Any, layout: Layout = ONE_DEVICE, parts: int = 1) -> Any:
    """`mean(rows)`, a tree of means over rows, from those of `parts` equal parts, one after the other: in the memory of one.

    Entries named `max_...` are maxima. Of `n` parts the first has the rows `0, n, 2 n, ...`, so that every device has its share of each.
    """
    if parts == 1:
        return mean(rows)
    divided = jax.tree.map(lambda v: jnp.moveaxis(v.reshape((v.shape[0] // parts, parts) + v.shape[1:]), 1, 0), rows)
    divided = layout.constrain(divided, lambda tree: layout.batch(tree, 1))
    first = jax.eval_shape(mean, jax.tree.map(lambda v: v[0], divided))

    def start(path: Any, v: jax.ShapeDtypeStruct) -> Array:
        return jnp.full(v.shape, -jnp.inf if _is_maximum(path) else 0, v.dtype)

    def add(path: Any, total: Array, part: Array) -> Array:
        return jnp.maximum(total, part) if _is_maximum(path) else total + part / parts

    def one(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map_with_path(add, total, mean(part)), None

    return jax.lax.scan(one, jax.tree.map_with_path(start, first), divided)[0]


def _is_maximum(path: Any) -> bool:
    return any(isinstance(key, jax.tree_util.DictKey) and str(key.key).startswith("max_") for key in path)


def _no_cotangent(v):
    return jnp.zeros_like(v) if jnp.issubdtype(v.dtype, jnp.floating) else np.zeros(v.shape, jax.dtypes.float0)
