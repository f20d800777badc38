"""The rights of the files that a run leaves for others."""

from __future__ import annotations

import os
from pathlib import Path


def as_usual(folder: Path) -> None:
    """Give every file below `folder` the rights that new files have here.

    safetensors writes through a file that its owner alone can read, so that another user's server
    could not load the model. A disk that refuses is left as it is.
    """
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            try:
                path.chmod(path.stat().st_mode & 0o7000 | 0o666 & ~mask)
            except OSError:
                return
