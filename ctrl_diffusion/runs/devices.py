"""The devices and processes that share a run: those of this machine, or those of many, by the same program."""

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
    """Join the other processes, if so asked, and lay out a mesh. Call it before anything else of JAX.

    Args:
        count: how many devices to use (default: all that there are).
        fsdp: so many devices share one copy of the parameters and of the optimiser's state (1: each has a copy of its own).
        distributed: join the processes that run this program, one on each host. On TPU pods, under SLURM, Open MPI and Kubernetes
            they find each other; elsewhere give the three arguments below.
        coordinator: address `host:port` of process 0.
        processes: number of processes.
        process: number of this process, from 0.

    Returns:
        The layout for `Training(layout=...)` and for the functions of this package: that of one device, where there is one.

    Raises:
        ValueError: for some of the last three without the others or without `distributed`, for a `count` that there is not, and
            for an `fsdp` that does not divide the devices.
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
            raise ValueError(f"fsdp={fsdp} must be 1 on one device.")
        return Layout()
    return Layout(make_mesh(fsdp, devices))


def describe(layout: Layout, **batches: int) -> str:
    """One line: the devices, and what each gets of batches that are given as a whole."""
    kind = jax.devices()[0].device_kind
    if layout.mesh is None:
        return f"1 device ({kind})"
    shape = layout.mesh.shape
    mesh = f"{layout.devices} devices ({kind}) of {jax.process_count()} process(es), mesh {DATA} {shape[DATA]} x {FSDP} {shape[FSDP]}"
    shares = ", ".join(f"{name} {size} = {size // layout.devices} each" for name, size in batches.items())
    return f"{mesh}; {shares}" if shares else mesh


def is_first() -> bool:
    """Whether this process writes logs and results."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Until every process is here; `what` is the same name on all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def exists_for_all(file: Path) -> bool:
    """Whether the first process sees a file: the same answer for all, before any goes on to make it."""
    found = file.exists()
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(found))) if jax.process_count() > 1 else found
