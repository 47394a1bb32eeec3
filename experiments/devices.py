"""Which devices share a run: those of this machine, or those of many, by the same command."""

import dataclasses

import jax

from ctrl_diffusion.parallel import DATA, FSDP, Layout, make_mesh


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices that share a run. All settings of an experiment are global: a batch is that of all devices together."""

    count: int | None = None
    """How many to use (default: all that there are)."""
    fsdp: int = 1
    """So many devices share one copy of the parameters and of the optimiser's state (1: each has a copy of its own)."""
    distributed: bool = False
    """Join the processes that run this command, one on each host. On TPU pods, under SLURM, Open MPI and Kubernetes they find
    each other; elsewhere give the three options below."""
    coordinator: str | None = None
    """Address host:port of process 0."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""

    def start(self) -> Layout:
        """Join the other processes, if so asked, and lay out a mesh; prints what each device gets. Call it before anything else."""
        explicit = (self.coordinator, self.processes, self.process)
        if any(v is not None for v in explicit):
            if not self.distributed or any(v is None for v in explicit):
                raise ValueError(
                    f"devices.coordinator={self.coordinator}, processes={self.processes}, process={self.process}: give all three, "
                    "with --devices.distributed, or none of them."
                )
        if self.distributed:
            jax.distributed.initialize(*explicit)
        devices = jax.devices()
        if self.count is not None and not 1 <= self.count <= len(devices):
            raise ValueError(f"devices.count={self.count} must be from 1 to {len(devices)}, the number of devices there are.")
        devices = devices[: self.count]
        if len(devices) == 1:
            if self.fsdp != 1:
                raise ValueError(f"devices.fsdp={self.fsdp} must be 1 on one device.")
            return Layout()
        return Layout(make_mesh(self.fsdp, devices))


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
