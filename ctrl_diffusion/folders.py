"""Folders that are replaced as a whole: a reader sees a complete folder or none."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

StrPath = str | os.PathLike[str]


def local(path: StrPath) -> Path:
    """The path. `ValueError` for the address of a bucket (`gs://...`), which would become a folder of that name here."""
    scheme = re.match(r"([a-z][a-z0-9+.-]+):/", os.fspath(path))
    if scheme:
        raise ValueError(
            f"{os.fspath(path)} is an address, not a folder: mount the bucket (for {scheme[1]}, for example by Cloud Storage FUSE) and "
            "give the folder that it is mounted at."
        )
    return Path(path)


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to write into. At the end it replaces `folder`; on an error it is deleted, and `folder` stays."""
    local(folder).parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()  # unlike mkdtemp's, with the user's usual permissions
        yield new
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(new, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
