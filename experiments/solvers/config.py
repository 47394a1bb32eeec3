"""Settings of `experiments.solvers`."""

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured; the defaults take a few minutes on two cores."""

    out: Path
    """Folder for `metrics.json`, `table.md` and `solvers.png`."""
    only: tuple[str, ...] = ()
    """Measure only solvers whose name contains one of these."""
    evaluations: tuple[int, ...] = (12, 24, 48, 96, 192, 384, 768)
    """Network evaluations per solve at which errors are measured."""
    samples: int = 16
    """Initial states of each of the two ODE problems."""
    ratio_evaluations: int = 12
    """Network evaluations per timed solve."""
    ratio_batch: int = 128
    """Batch of the timed solves."""
    repeats: int = 5
    """Timed pairs for `ratio_to_scan`, after a warm-up pair."""
