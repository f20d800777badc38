"""Logs that grow, on a storage that may not be able to append: each push writes what is new.

A log `NAME` lies in `logs/NAME/` as segments `GGGG-OOOOOOOOOOOO`: generation, and the byte of the
log at which the segment starts. A process starts a generation with the whole log, and again where
the log was written anew (steps were rolled back); after that it adds segments. A reader takes the
newest generation that has a beginning, and its segments in order as far as they join.
"""

from __future__ import annotations

import os
from pathlib import Path

from actors.storage import Store

FOLDER = "logs"


class LogCopy:
    """The copy of one log, brought up to date by one process."""

    def __init__(self, store: Store, path: Path) -> None:
        self._store = store
        self._path = path
        self._folder = f"{FOLDER}/{path.name}"
        self._generation: int | None = None  # None: the storage was not looked at yet
        self._inode = 0
        self._copied = 0  # bytes

    def size(self) -> int:
        """Bytes of the log as it is now."""
        return self._path.stat().st_size if self._path.is_file() else 0

    def push(self, size: int) -> None:
        """Copy what is new of the log's first `size` bytes. Raises OSError where the storage does
        not take it: then the next push copies it again."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            anew = status.st_ino != self._inode or status.st_size < self._copied
            start = 0 if self._generation is None or anew else self._copied
            file.seek(start)
            content = file.read(max(0, size - start))
        content = content[: content.rfind(b"\n") + 1]  # a line that is being written comes later
        older: list[str] = []
        if self._generation is None or anew:
            self._store.make_folder(self._folder)
            older = self._store.names(self._folder)
            self._generation = max((int(name.partition("-")[0]) for name in older), default=0) + 1
        elif not content:
            return
        self._store.write(f"{self._folder}/{self._generation:04d}-{start:015d}", content)
        self._inode, self._copied = status.st_ino, start + len(content)
        for name in older:
            self._store.remove_file(f"{self._folder}/{name}")


def read_log(store: Store, name: str) -> bytes | None:
    """The whole log as it was last pushed, or None where there is none."""
    folder = f"{FOLDER}/{name}"
    if not store.has_folder(folder):
        return None
    segments: dict[int, dict[int, str]] = {}
    for segment in store.names(folder):
        generation, _, start = segment.partition("-")
        segments.setdefault(int(generation), {})[int(start)] = segment
    whole = [generation for generation, starts in segments.items() if 0 in starts]
    if not whole:
        return None
    starts, content = segments[max(whole)], b""
    while len(content) in starts:
        part = store.read(f"{folder}/{starts[len(content)]}")
        if not part:
            break
        content += part
    return content
