"""Settings of `experiments.solver_cost`."""

import dataclasses
from pathlib import Path

from ..names import SolverKind


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the measurement."""

    out: Path | None = None
    """Folder for `metrics.json` and `table.md` (default: print only)."""
    only: tuple[str, ...] = ()
    """Measure only solvers whose name contains one of these."""
    kinds: tuple[SolverKind, ...] = ()
    """Measure only solvers of these kinds: SDE (fixed grid and keyed noise), ODE, adaptive, implicit."""
    evaluations: int = 24
    """Network evaluations per solve; solvers of several stages make fewer steps."""
    batch: int = 512
    """Batch with the network of the digits."""
    trivial_batch: int = 4096
    """Batch with the trivial drift, of two-dimensional states."""
    width: int = 256
    """Features of the network."""
    depth: int = 3
    """Residual blocks of the network."""
    repeats: int = 15
    """Timed pairs, after two warm-up pairs; five times as many with the trivial drift (milliseconds), half as many for gradients."""
    memory: bool = True
    """Also compile gradients at 25, 100 and 400 evaluations, and report their temporary memory."""
