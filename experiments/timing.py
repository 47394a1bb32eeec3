"""Times of calls that take turns, so that a machine that slows down slows all of them."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ctrl_diffusion.runs import ProgressBar


def interleaved(
    calls: Sequence[Callable[[], Any]], repeats: int, pause: float = 0.0, name: str = "timing", warmup: int = 2
) -> list[list[float]]:
    """Seconds of each call after `warmup` rounds; JAX's results are waited for.

    Rounds go through the calls forwards and backwards in turn, so that none always has the same one before it.
    """
    turns = [(call, []) for call in calls]
    with ProgressBar(repeats + warmup, name, "round") as bar:
        for i in range(repeats + warmup):
            for call, found in turns if i % 2 == 0 else reversed(turns):
                time.sleep(pause)
                begin = time.perf_counter()
                jax.block_until_ready(call())
                if i >= warmup:
                    found.append(time.perf_counter() - begin)
            bar.update()
    return [found for _, found in turns]
