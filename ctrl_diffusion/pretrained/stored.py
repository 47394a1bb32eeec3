"""Tensors in files that are not read yet, and views of them with the names and shapes of networks."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .names import Names


class Stored(NamedTuple):
    """A tensor in a file. `read()` reads it; `dtype` is safetensors' name of its type."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def by_todays_names(found: Mapping[str, Stored], names: Names) -> dict[str, Stored]:
    """Tensors of a file by their names of today."""
    renamed: dict[str, Stored] = {}
    for name, stored in found.items():
        today = names.today(name)
        if today in renamed:
            raise ValueError(f"{stored.file}: tensors {stored.name!r} and {renamed[today].name!r} are the same one.")
        renamed[today] = stored
    return renamed


def viewed(stored: Stored, shape: tuple[int, ...], view: Callable[[np.ndarray], np.ndarray]) -> Stored:
    """A view of a stored tensor, with another name and shape."""
    return stored._replace(shape=shape, read=lambda: view(stored.read()))


def transposed(stored: Stored) -> Stored:
    """A matrix with its axes exchanged."""
    return viewed(stored, stored.shape[::-1], np.transpose)


def thirds(stored: Stored) -> tuple[Stored, Stored, Stored]:
    """Queries, keys and values of a tensor that holds all three, one after the other."""
    rows = stored.shape[0] // 3
    if stored.shape[0] % 3:
        raise ValueError(
            f"{stored.file}: tensor {stored.name!r} is {list(stored.shape)}: its first axis must be a multiple of 3."
        )

    def part(i: int) -> Stored:
        return viewed(stored, (rows, *stored.shape[1:]), functools.partial(_rows, i * rows, (i + 1) * rows))

    return part(0), part(1), part(2)


def _rows(begin: int, end: int, array: np.ndarray) -> np.ndarray:
    return array[begin:end]
