"""The devices and processes that share a run, on one machine or on many."""

from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..parallel import DATA, FSDP, Layout, make_mesh


def start_devices(
    count: int | None = None,
    fsdp: int = 1,
    *,
    distributed: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> Layout:
    """Make a layout over devices; with `distributed`, join the other processes first. Call it before any other function of JAX.

    Args:
        count: number of devices to use (default: all).
        fsdp: number of devices that share one copy of the parameters and the optimiser's state (1: every device has its own copy).
        distributed: join the processes that run this program, one on each host. On TPU pods, under SLURM, Open MPI and Kubernetes
            they find each other. Elsewhere give the three arguments below.
        coordinator: address `host:port` of process 0.
        processes: number of processes.
        process: number of this process, from 0.

    Returns:
        The layout, for `Training(layout=...)` and for the functions of this package.

    Raises:
        ValueError: if only some of `coordinator`, `processes` and `process` are given, or without `distributed`; if there are fewer
            devices than `count`; if `fsdp` does not divide the number of devices.
    """
    explicit = (coordinator, processes, process)
    if any(v is not None for v in explicit) and (not distributed or any(v is None for v in explicit)):
        raise ValueError(
            f"coordinator={coordinator!r}, processes={processes}, process={process}: give all three, with distributed=True, or none "
            "of them."
        )
    if distributed:
        jax.distributed.initialize(*explicit)
    devices = jax.devices()
    if count is not None and not 1 <= count <= len(devices):
        raise ValueError(f"count={count} must be from 1 to {len(devices)}, the number of devices there are.")
    devices = devices[:count]
    if len(devices) == 1:
        if fsdp != 1:
            raise ValueError(f"fsdp={fsdp} must be 1 on one device: there is nothing to divide parameters over.")
        return Layout()
    return Layout(make_mesh(fsdp, devices))


def describe(layout: Layout, **batches: int) -> str:
    """One line of text: the devices, and the share of each in the given batches."""
    kind = jax.devices()[0].device_kind
    if layout.mesh is None:
        return f"1 device ({kind})"
    shape = layout.mesh.shape
    mesh = f"{layout.devices} devices ({kind}) of {jax.process_count()} process(es), mesh {DATA} {shape[DATA]} x {FSDP} {shape[FSDP]}"
    shares = ", ".join(f"{name} {size} = {size // layout.devices} each" for name, size in batches.items())
    return f"{mesh}; {shares}" if shares else mesh


def is_first() -> bool:
    """Whether this is the first process, which writes logs and results."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Wait until every process has called this with the same name `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def exists_for_all(file: Path) -> bool:
    """Whether the first process sees the file. All processes get its answer before any of them can write the file."""
    found = file.exists()
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(found))) if jax.process_count() > 1 else found
