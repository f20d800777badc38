"""Files that ranks write: made in memory, written beside their work.

What a disk does not take is an OSError, whichever library wrote.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

Files = Mapping[str, bytes | memoryview]
"""Content by name, relative to a folder."""

Sums = dict[str, tuple[int, int]]
"""What was written: bytes and CRC-32 by name."""

DISK = "disk"
DISK_GROUP = {DISK: 1}
"""A thread of an actor that writes while it works."""

SIGNS = ("pytorchstreamwriter", "unexpected pos", "file write failed", "no space left", "i/o error")
"""In the RuntimeErrors of torch and the errors of safetensors, which have no class for it."""


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Raises OSError, one line, where what is written to `folder` does not come to disk."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if type(error).__name__ != "SafetensorError" and not any(s in text.lower() for s in SIGNS):
            raise
        raise OSError(f"{folder}: {text[:200]}") from error


def write_files(folder: Path, files: Files) -> Sums:
    """Write `files` below `folder`; they are on the disk when this returns. Other ranks may write
    theirs there meanwhile. Raises OSError."""
    sums: Sums = {}
    with writing(folder):
        places = {folder}
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            places.add(path.parent)
            with path.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            sums[name] = memoryview(content).nbytes, zlib.crc32(content)
        for place in places:
            sync(place)
    return sums


def sync(path: Path) -> None:
    """Force a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system has no such thing
            raise
    finally:
        os.close(descriptor)


def sync_below(folder: Path) -> None:
    """Force a folder with all that is in it to disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
