"""Settings of `experiments.exact`, and the names of its entries and problems."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..devices import Devices
from ..names import AlgorithmName

Entry = Literal[AlgorithmName, "sqdf_per_time", "adjoint_matching_bootstrapped", "exact_critic"]
"""Of `experiments.exact.units.ENTRIES`."""

ProblemName = Literal[
    "ring_linear", "ring_quadratic", "gaussian_quadratic", "quadratic_ou_easy", "quadratic_ou_hard", "linear_ou", "double_well"
]
"""Of `experiments.exact.setup.PROBLEMS`."""

_ONE_OF_TWO = tyro.conf.create_mutex_group(required=False, title="size of the selection")


@dataclasses.dataclass(frozen=True)
class Config:
    """Which units to run. A unit is one algorithm on one problem with one seed."""

    out: Path = Path("runs/exact")
    """Folder for results, table and figures."""
    quick: Annotated[bool, _ONE_OF_TWO] = False
    """Four algorithms on the ring, with a twelfth of the iterations."""
    full: Annotated[bool, _ONE_OF_TWO] = False
    """Every algorithm on every problem that it applies to, three seeds."""
    algorithms: tuple[Entry, ...] = ()
    """Only these algorithms (default: all of the selection)."""
    problems: tuple[ProblemName, ...] = ()
    """Only these problems (default: all of the selection)."""
    seeds: int | None = None
    """Number of seeds (default 1, with --full 3)."""
    iterations: int | None = None
    """Iterations of every unit (default: each algorithm's own budget)."""
    workers: int | None = None
    """Units that run at the same time, each in a process of its own (default: 2 on one CPU device, else 1)."""
    devices: Devices = Devices()
    """Devices that share a unit."""
