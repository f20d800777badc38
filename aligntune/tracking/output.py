"""Standard output as a view: where it takes nothing any more, whatever writes to it goes on.

A full disk, a terminal that is gone or a reader that has ended raises in whoever prints. A run that
is watched must not end by that.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

BROKEN = (OSError, ValueError)
"""What a stream raises that takes nothing: a full disk, a broken pipe; or it is closed."""


class Shown:
    """`stream`, for `print` and rich. The first write that fails is told to `lost(reason=...)`, and
    nothing is written after it: what a stream keeps of writes that failed would grow."""

    def __init__(self, stream: TextIO | None, lost: Callable[..., None]) -> None:
        """No stream is what Python has for a standard output that was closed before its start."""
        self._stream: Any = stream
        self._lost = lost
        self._over = stream is None
        self._lock = threading.RLock()  # rich draws in a thread of its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # its encoding, say

    def isatty(self) -> bool:
        """Whether a person sees it."""
        try:
            return not self._over and bool(self._stream.isatty())
        except BROKEN:
            return False

    def write(self, text: str) -> int:
        """Write, with a mark in the place of characters that the stream's encoding lacks."""
        self._try(lambda: self._stream.write(_fitting(text, self._stream)))
        return len(text)

    def flush(self) -> None:
        """Hand over what was written."""
        self._try(lambda: self._stream.flush())

    def _try(self, act: Callable[[], object]) -> None:
        with self._lock:
            if self._over:
                return
            try:
                act()
            except BROKEN as error:
                self._over = True
                self._lost(reason=" ".join(f"{type(error).__name__}: {error}".split()))


def _fitting(text: str, stream: TextIO | None) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def say(*lines: str) -> None:
    """The last lines of work that is done: that a standard output does not take them is no fault of
    the work, which every file has."""
    with suppress(*BROKEN):
        for line in lines:
            print(_fitting(line, sys.stdout), flush=True)
    let_go()


def let_go() -> None:
    """See that a standard output that takes nothing does not change the exit code: Python would
    flush it once more, and end with 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BROKEN:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the process's end
