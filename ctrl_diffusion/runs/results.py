"""Results of runs that consist of units: one file per unit."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .devices import exists_for_all, is_first, wait_for_all
from .files import write_atomic


class Results:
    """One JSON file per unit of a run, complete or absent. A unit whose file exists need not be computed again.

    All processes have the result of a unit; the first of them writes it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        wait_for_all("earlier results are seen")

    def has(self, name: str) -> bool:
        """Whether the result of a unit exists; the same answer on all processes."""
        return exists_for_all(self.folder / f"{name}.json")

    def keep(self, name: str, result: dict[str, Any]) -> None:
        """Write the result of a unit."""
        if is_first():
            write_atomic(self.folder / f"{name}.json", json.dumps(result, allow_nan=False) + "\n")
        wait_for_all("a result is written")

    def read(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """Read the results of units, in the order of their names."""
        return [json.loads((self.folder / f"{name}.json").read_text()) for name in names]
