"""The progress of a loop: a bar on a terminal; elsewhere, for example in the log of a batch job, a line now and then."""

import sys
import time
from typing import Any

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines


class ProgressBar:
    """Use it as `with ProgressBar(total, "fine-tuning", "iteration") as bar:`, and call `bar.update()` after each turn.

    Args:
        total: number of turns.
        label: name of the loop.
        unit: name of a turn.
        done: turns that were done before.
        brief: remove the bar at its end; elsewhere print lines only if the loop takes longer than half a minute.
        file: text file to write to (default: standard error).
    """

    def __init__(self, total: int, label: str, unit: str, *, done: int = 0, brief: bool = False, file: Any = None):
        self._file = sys.stderr if file is None else file
        self._label, self._unit, self._brief = label, unit, brief
        self._first, self._done, self._total = done, done, total
        self._begin = time.monotonic()
        self._printed = self._begin if brief else -float("inf")
        self._bar = None
        if self._file.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, unit=unit, leave=not brief, file=self._file)

    def update(self, turns: int = 1, note: str = "") -> None:
        """Count `turns` more as done; `note` is shown after the count."""
        self._done += turns
        if self._bar is not None:
            self._bar.update(turns)
            self._bar.set_postfix_str(note)
            return
        now, last = time.monotonic(), self._done >= self._total and not self._brief
        if last or now - self._printed >= EVERY:
            self._printed = now
            rate = (now - self._begin) / max(1, self._done - self._first)
            text = f"{self._label}: {self._done}/{self._total}, {rate:.3g} s/{self._unit}" + (f", {note}" if note else "")
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
