"""Files as a crash leaves them: replaced as a whole, or grown by whole records.

Invariant: what a call here has returned from is on disk, with the names that lead to it; where it
raises, the file is as it was before, or as `shorten` makes it. A disk may lose what was not forced
to it, or keep a half.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

from actors.disk import sync as sync
from actors.disk import sync_below as sync_below

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_shortened: Counter[tuple[int, int]] = Counter()  # by this process: times, by device and number


def is_full(error: BaseException) -> bool:
    """Whether a disk or a quota had no room, which somebody may make."""
    return isinstance(error, OSError) and error.errno in FULL


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where there is none."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader sees the old or the new content, never a part."""
    staging = path.with_name(path.name + ".partial")
    staging.write_bytes(content.encode() if isinstance(content, str) else content)
    sync(staging)
    os.replace(staging, path)
    sync(path.parent)


def shortenings(file: os.stat_result) -> int:
    """How often this process has shortened a file. Where the number is another than before, bytes
    that were read since may be others now, though the file has grown beyond them."""
    return _shortened[file.st_dev, file.st_ino]


class Appended:
    """A file that grows at its end."""

    def __init__(self, path: Path) -> None:
        new = not path.exists()
        self._file = path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size  # of what was written whole
        if new:
            sync(path.parent)

    def write(self, data: bytes) -> None:
        """Hand all of `data` to the operating system, or nothing. Raises OSError."""
        if os.fstat(self._file.fileno()).st_size != self._size:
            self._file.truncate(self._size)  # of a write that failed
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size += len(data)

    def sync(self) -> None:
        """Force what was handed over to disk; a thread may do this while others write."""
        os.fsync(self._file.fileno())

    def append(self, data: bytes) -> None:
        """`write`, and see it on disk."""
        before = self._size
        try:
            self.write(data)
            self.sync()
        except OSError:
            self._size = before
            raise

    def shorten(self, size: int) -> None:
        """Keep the first `size` bytes alone, in place: a copy needs room and time. A crash leaves
        all that was there, or these."""
        self._file.truncate(size)
        self._size = size
        status = os.fstat(self._file.fileno())
        _shortened[status.st_dev, status.st_ino] += 1  # before anything is written behind them
        self.sync()

    def close(self) -> None:
        """Let go of the file, as it is whole."""
        with self._file as file:
            if os.fstat(file.fileno()).st_size != self._size:
                file.truncate(self._size)
