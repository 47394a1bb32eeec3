"""Names of the networks' tensors in files, and the order of their axes there."""

import re
from typing import Any, NamedTuple

import numpy as np

Path = tuple[Any, ...]  # of a parameter in a module: ("down_blocks", 0, "resnets", 1, "conv1", "kernel")
Renamings = tuple[tuple[str, str], ...]  # (pattern, replacement), applied in order

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
AXES = {("kernel", 2): (1, 0), ("kernel", 4): (3, 2, 0, 1)}  # [in, out] -> [out, in] and [h, w, in, out] -> [out, in, h, w]


class Names(NamedTuple):
    """The names of one network's tensors.

    `renamed` maps paths in the module to today's names. `older` maps names of older files to today's names. `constants` are tensors that
    are no parameters, with the only value that they may have; a file may leave them out.
    """

    renamed: Renamings
    older: Renamings = ()
    constants: tuple[tuple[str, np.ndarray], ...] = ()

    def module(self, path: Path) -> str:
        """Today's name of the module at a path; adapters use it, too."""
        return _rename(".".join(map(str, path)), self.renamed)

    def tensor(self, path: Path) -> str:
        """Today's name of the parameter at a path."""
        module, leaf = self.module(path[:-1]), LEAVES.get(path[-1], str(path[-1]))
        return f"{module}.{leaf}" if module else leaf

    def today(self, name: str) -> str:
        """Today's name of a tensor in a file of any age."""
        return _rename(name, self.older)


def _rename(name: str, renamings: Renamings) -> str:
    for pattern, replacement in renamings:
        name = re.sub(pattern, replacement, name)
    return name


def to_file(path: Path, array: np.ndarray) -> np.ndarray:
    """A parameter with the axes of a file."""
    return array.transpose(AXES.get((path[-1], array.ndim), range(array.ndim)))


def from_file(path: Path, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_file`."""
    return array.transpose(np.argsort(AXES.get((path[-1], array.ndim), range(array.ndim))))


def shape_in_file(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `to_file` of an array of this shape."""
    return tuple(shape[i] for i in AXES.get((path[-1], len(shape)), range(len(shape))))
