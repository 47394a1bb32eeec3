"""What tells one run from another where names do not: the source of a function, the content of a folder."""

import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..rewards import Reward

BLOCKS, SIZE = 16, 2**16  # of a file, evenly spaced: two models of one shape differ everywhere


def source_digest(function: Reward | Callable[..., Any]) -> str | None:
    """A hash of a function's source, which tells two versions of it apart. `None` for functions without source and those of this library.

    The source of what the function calls is not part of it.
    """
    found: Any = function
    while not inspect.isroutine(found) and (inner := getattr(found, "fn", None) or getattr(found, "func", None)) is not None:
        found = inspect.unwrap(inner)
    found = inspect.unwrap(found)
    found = found if inspect.isroutine(found) or inspect.isclass(found) else type(found)
    if (getattr(found, "__module__", "") or "").startswith("ctrl_diffusion."):
        return None
    try:
        if inspect.getfile(found) == "<string>":  # a text that was executed: what Python keeps under that name may be another
            return None
        return hashlib.sha256(inspect.getsource(found).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return None


def folder_digest(folder: Path) -> str:
    """A hash that tells two folders of weights apart, wherever they lie: of the names and sizes of their files, and 16 blocks of each.

    Hidden files and folders, such as notes of a download, do not count.
    """
    digest = hashlib.sha256()
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in (name for name in names if not any(part.startswith(".") for part in name.parts)):
        path = folder / name
        size = path.stat().st_size
        digest.update(f"{name.as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(BLOCKS):
                file.seek(i * max(size - SIZE, 0) // (BLOCKS - 1))
                digest.update(file.read(SIZE))
    return digest.hexdigest()[:16]
