"""Layouts of arrays over a mesh of devices: batches are divided over all devices, parameters are whole or divided.

This is JAX's own SPMD: programs are written for global arrays, and the compiler divides them. A layout without a mesh is one device and
changes nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP = "data", "fsdp"
BATCH = PartitionSpec((DATA, FSDP))
PARAMETERS, WHOLE = "parameters", "whole"
"""Values that replace the axis that counts samples: `PARAMETERS` for arrays divided like parameters, `WHOLE` for arrays on every device."""


def make_mesh(fsdp: int = 1, devices: list[Any] | None = None) -> Mesh:
    """A mesh `(data, fsdp)` of all devices of all processes. Batches are divided over both axes, parameters over `fsdp`.

    Args:
        fsdp: number of devices that share one copy of the parameters; 1 keeps all parameters on every device (data parallelism).
        devices: the devices to use (default: all).
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise ValueError(f"fsdp={fsdp} must divide the number of devices, {len(devices)}.")
    return jax.make_mesh((len(devices) // fsdp, fsdp), (DATA, FSDP), (AxisType.Auto, AxisType.Auto), devices=devices)


class Layout(NamedTuple):
    """How arrays are divided over a mesh. `put` places existing arrays; `constrain` divides arrays inside a traced program.

    Attributes:
        mesh: the mesh, from `make_mesh`, or `None` for one device.
        min_size: parameters with fewer entries are kept whole on every device.
    """

    mesh: Mesh | None = None
    min_size: int = 2**14

    @property
    def devices(self) -> int:
        """Number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    def check_batch(self, name: str, size: int) -> None:
        """Raise `ValueError` if the devices cannot share a batch of `size` evenly; `name` is the argument that sets it."""
        if size % self.devices:
            raise ValueError(f"{name}={size} must be a multiple of the number of devices, {self.devices}.")

    def parameters(self, tree: Any) -> Any:
        """Shardings of parameters, or of arrays with their shapes. The largest axis that `fsdp` divides evenly is divided."""

        def sharding(leaf):
            parts = self._mesh.shape[FSDP]
            axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
            spec: list[Any] = [None] * len(leaf.shape)
            if parts > 1 and axes and leaf.size >= self.min_size:
                spec[max(axes, key=lambda axis: leaf.shape[axis])] = FSDP
            return NamedSharding(self._mesh, PartitionSpec(*spec))

        return jax.tree.map(sharding, tree)

    def batch(self, tree: Any, axis: int = 0) -> Any:
        """Shardings of arrays whose `axis` counts samples."""
        spec = PartitionSpec(*(None,) * axis, *BATCH)
        return jax.tree.map(lambda _: NamedSharding(self._mesh, spec), tree)

    def replicated(self, tree: Any) -> Any:
        """Shardings of arrays that are whole on every device."""
        return jax.tree.map(lambda _: NamedSharding(self._mesh, PartitionSpec()), tree)

    def shardings(self, axes: Any, tree: Any) -> Any:
        """Shardings of `tree`. `axes`, a prefix of it, holds the axis that counts samples, `PARAMETERS` or `WHOLE`."""

        def of(axis: Any, part: Any) -> Any:
            if axis == PARAMETERS:
                return self.parameters(part)
            return self.replicated(part) if axis == WHOLE else self.batch(part, axis)

        return jax.tree.map(of, axes, tree)

    def described(self, axes: Any, tree: Any) -> Any:
        """Shapes and types of the arrays in `tree`, on a mesh with shardings by `axes`. `tree` may hold shapes only."""
        if self.mesh is None:
            return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), tree)
        return jax.tree.map(lambda v, s: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=s), tree, self.shardings(axes, tree))

    def gathering(self, control: Callable) -> Callable:
        """`control(params, ...)` that gathers divided parameters whenever it is called, and only there."""
        if self.mesh is None or self.mesh.shape[FSDP] == 1:
            return control
        return _Gathering(control, self)

    def put(self, tree: Any, shardings: Callable[[Any], Any]) -> Any:
        """Place `tree`, which is the same on every process, by `shardings(tree)`."""
        return tree if self.mesh is None else jax.tree.map(_placed, tree, shardings(tree))

    def constrain(self, tree: Any, shardings: Callable[[Any], Any]) -> Any:
        """Divide `tree` by `shardings(tree)`, inside a traced program."""
        return tree if self.mesh is None else jax.lax.with_sharding_constraint(tree, shardings(tree))

    def paced(self, tree: Any) -> Any:
        """`tree`; on several CPU devices after waiting for it, because their collectives can deadlock if two programs run at once."""
        if self.mesh is not None and self.mesh.devices.flat[0].platform == "cpu":
            jax.block_until_ready(tree)
        return tree

    @property
    def _mesh(self) -> Mesh:
        assert self.mesh is not None
        return self.mesh


class _Gathering(eqx.Module):
    """A control that gathers its parameters and its own arrays before it is evaluated."""

    control: Callable
    layout: Layout = eqx.field(static=True)

    def __call__(self, params: Any, *args: Any) -> Any:
        arrays, rest = eqx.partition(self.control, eqx.is_array)
        params, arrays = self.layout.constrain((params, arrays), self.layout.replicated)
        return eqx.combine(arrays, rest)(params, *args)


def _placed(v: Any, sharding: NamedSharding) -> jax.Array:
    """Place `v`, which every process has as a whole, on the devices of all processes."""
    if isinstance(v, Tracer):  # shapes only: the devices need not be here
        return jax.lax.with_sharding_constraint(v, sharding)
    if sharding.is_fully_addressable or not getattr(v, "is_fully_addressable", True):
        return jax.device_put(v, sharding)
    if jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
        spec = PartitionSpec(*sharding.spec, *(None,) * (jax.random.key_data(v).ndim - len(sharding.spec)))
        data = _placed(jax.random.key_data(v), NamedSharding(sharding.mesh, spec))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(v))
    local = np.asarray(v)
    return jax.make_array_from_callback(local.shape, sharding, lambda index: local[index])


ONE_DEVICE = Layout()


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of `x` `[b, ...]` on this process's devices, each once and in order. A single process has all rows."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def whole(tree: Any) -> Any:
    """Arrays as numpy arrays. If they are divided over several processes they are gathered, and every process must call this."""

    def gathered(v):
        if v.is_fully_addressable or v.is_fully_replicated:
            return np.asarray(v)
        return np.asarray(multihost_utils.process_allgather(v, tiled=True))

    return jax.tree.map(gathered, tree)


def from_local_rows(values: np.ndarray, like: jax.Array) -> jax.Array:
    """A global array `[b]` from the numbers of `local_rows(like)`, with the type of `like` and divided in the same way."""
    values = np.asarray(values, like.dtype)
    if isinstance(like.sharding, NamedSharding):
        rows = NamedSharding(like.sharding.mesh, PartitionSpec(*like.sharding.spec[:1]))
        return jax.make_array_from_process_local_data(rows, values, like.shape[:1])
    return jnp.asarray(values)
