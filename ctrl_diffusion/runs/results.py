"""Runs that consist of units: a file for the result of each."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .devices import exists_for_all, is_first, wait_for_all
from .files import write_atomic


class Results:
    """A JSON file per unit of a run, complete or absent: what is there is not done again.

    Of several processes, which all have the result, the first writes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        wait_for_all("earlier results are seen")

    def has(self, name: str) -> bool:
        return exists_for_all(self.folder / f"{name}.json")

    def keep(self, name: str, result: dict[str, Any]) -> None:
        if is_first():
            write_atomic(self.folder / f"{name}.json", json.dumps(result, allow_nan=False) + "\n")
        wait_for_all("a result is written")

    def read(self, names: Iterable[str]) -> list[dict[str, Any]]:
        return [json.loads((self.folder / f"{name}.json").read_text()) for name in names]
