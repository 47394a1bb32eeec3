"""Files that are replaced as a whole: a reader sees a complete file or none."""

import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` (text as UTF-8). The old file stays complete until the new one replaces it.

    The temporary file is in the same folder, which must exist. It is removed if the write fails.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays to `path` in numpy's compressed `.npz` format, atomically."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # pyright: ignore[reportArgumentType]
    write_atomic(path, buffer.getvalue())
