"""The options of the commands that say which devices share a run."""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctrl_diffusion.parallel import Layout


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices that share a run. All settings of an experiment are global: a batch is that of all devices together."""

    count: int | None = None
    """How many to use (default: all that there are)."""
    fsdp: int = 1
    """Number of devices that share one copy of the parameters and of the optimiser's state (1: each has its own copy)."""
    distributed: bool = False
    """Join the processes that run this command, one on each host. On TPU pods, under SLURM, Open MPI and Kubernetes they find
    each other; elsewhere give the three options below."""
    coordinator: str | None = None
    """Address host:port of process 0."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""

    def start(self) -> "Layout":
        """Join the other processes if `distributed`, and lay out a mesh. Call it before JAX uses a device."""
        from ctrl_diffusion.runs import start_devices  # not before options are read: it loads JAX

        return start_devices(
            self.count, self.fsdp, distributed=self.distributed, coordinator=self.coordinator, processes=self.processes,
            process=self.process,
        )  # fmt: skip
