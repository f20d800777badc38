"""Logs that grow, on a storage that may not be able to append: each push writes what is new.

A log `NAME` lies in `logs/NAME/` as segments `GGGG-OOOOOOOOOOOO`: generation, and the byte of the
log at which the segment starts. A process starts a generation with the whole log, and again where
the log was written anew, or shortened (steps were rolled back); after that it adds segments. A
reader takes the newest generation that has a beginning, and its segments in order as far as they
join.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from os.path import samestat
from pathlib import Path
from typing import BinaryIO
from weakref import finalize

from actors.storage import Store
from aligntune.runs.disk import shortenings, sync
from aligntune.runs.jsonl import line_end

FOLDER = "logs"
PIECE = 2**26  # bytes of a segment at most: a long run's samples are larger than memory


class LogCopy:
    """The copy of one log, brought up to date by one process."""

    def __init__(self, store: Store, path: Path) -> None:
        self._store = store
        self._path = path
        self._folder = f"{FOLDER}/{path.name}"
        self._generation = 0
        self._copied = 0  # bytes
        self._held: int | None = None  # the file that they are of
        self._shortened = 0  # times that it had been, before they were copied
        self._let_go: Callable[[], object] = lambda: None

    def size(self) -> int:
        """Bytes of the log as it is now."""
        return self._path.stat().st_size if self._path.is_file() else 0

    def push(self, size: int) -> None:
        """Copy what is new of the log's first `size` bytes. Raises OSError where the storage does
        not take it: then the next push copies it again."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            older = self._push(file, size)
        for name in older:
            self._store.remove_file(f"{self._folder}/{name}")

    def _push(self, file: BinaryIO, size: int) -> list[str]:
        """The segments that are of no use any more."""
        status = os.fstat(file.fileno())
        shortened = shortenings(status)
        same = self._held is not None and samestat(status, os.fstat(self._held))
        anew = not same or shortened != self._shortened or status.st_size < self._copied
        start = 0 if anew else self._copied
        # A line that is being written comes later.
        end = line_end(file, start, min(size, os.fstat(file.fileno()).st_size))
        older: list[str] = []
        if anew:
            self._hold(None)
            self._store.make_folder(self._folder)
            older = self._store.names(self._folder)
            numbers = (int(name.partition("-")[0]) for name in older)
            self._generation = max(numbers, default=0) + 1
        # The first piece last: without it the others are not read.
        for at in reversed(range(start, end, PIECE) or [0] * anew):
            file.seek(at)
            content = file.read(min(PIECE, end - at))
            if len(content) < min(PIECE, end - at):
                raise OSError(f"{self._path} was shortened while it was copied")
            self._store.write(f"{self._folder}/{self._generation:04d}-{at:015d}", content)
        self._copied, self._shortened = end, shortened
        if anew:
            self._hold(os.dup(file.fileno()))
        return older

    def _hold(self, descriptor: int | None) -> None:
        """Keep the file that was copied open, so that no other gets its number on the disk."""
        self._let_go()
        self._held = descriptor
        if descriptor is not None:
            self._let_go = finalize(self, os.close, descriptor)


def fetch_log(store: Store, name: str, target: Path) -> bool:
    """Write the whole log, as it was last pushed, to `target`, where it is on disk then; a segment
    at a time is in memory. False, and nothing is written, where there is none."""
    folder = f"{FOLDER}/{name}"
    if not store.has_folder(folder):
        return False
    segments: dict[int, dict[int, str]] = {}
    for segment in store.names(folder):
        generation, _, start = segment.partition("-")
        segments.setdefault(int(generation), {})[int(start)] = segment
    whole = [generation for generation, starts in segments.items() if 0 in starts]
    if not whole:
        return False
    starts, size = segments[max(whole)], 0
    with target.open("wb") as file:
        while size in starts and (part := store.read(f"{folder}/{starts[size]}")):
            file.write(part)
            size += len(part)
    sync(target)
    return True
