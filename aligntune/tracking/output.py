"""Standard output as a view: where it takes nothing any more, whatever writes to it goes on.

A full disk, a terminal that is gone or a reader that has ended raises in whoever prints; a terminal
that is stopped, and a reader that stands still, hold it up. A run that is watched must neither end
nor wait by that.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO
from weakref import WeakSet

from aligntune.errors import RunFailed

BROKEN = (OSError, ValueError)
"""What a stream raises that takes nothing: a full disk, a broken pipe; or it is closed."""
PATIENCE_SECONDS = 0.2  # that a writer waits for a stream, once until the stream has caught up
MOST = 1000  # texts that wait for a stream that is held up; of more, the oldest are left out


class Shown:
    """`stream`, for `print` and rich. The first write that fails is told to `lost(reason=...)`, and
    nothing is written after it: what a stream keeps of writes that failed would grow.

    A thread writes, for a stream may be held up for hours: a terminal by Ctrl-S, a pipe by who
    should read it. A writer waits for it shortly, so that all is in its order with what others
    write, and then no more until the stream has taken what there is.
    """

    def __init__(self, stream: TextIO | None, lost: Callable[..., None]) -> None:
        """No stream is what Python has for a standard output that was closed before its start."""
        self._stream: Any = stream
        self._lost = lost
        self._over = stream is None
        self._text = ""  # what was written since the last flush
        self._given: deque[str] = deque()
        self._writing = self._behind = self._ended = False
        self._changed = threading.Condition()  # rich draws in a thread of its own
        self._thread: threading.Thread | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # its encoding, say

    def isatty(self) -> bool:
        """Whether a person sees it."""
        try:
            return not self._over and bool(self._stream.isatty())
        except BROKEN:
            return False

    @property
    def behind(self) -> bool:
        """Whether the stream is held up."""
        return self._behind

    def write(self, text: str) -> int:
        """Write, with a mark in the place of characters that the stream's encoding lacks."""
        with self._changed:
            if not self._over:
                self._text += text
        return len(text)

    def flush(self) -> None:
        """Hand over what was written."""
        with self._changed:
            text, self._text = self._text, ""
            if self._over or not text:
                return
            if not self._ended:
                self._give(text)
                return
        self._put(text)

    def end(self) -> None:
        """Wait until all is written, however long that takes; later texts are written at once."""
        self.flush()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _give(self, text: str) -> None:
        self._given.append(text)
        if len(self._given) > MOST:
            self._given.popleft()
        if self._thread is None:
            _SHOWN.add(self)
            self._thread = threading.Thread(target=self._run, name="output", daemon=True)
            self._thread.start()
        self._changed.notify_all()
        if not self._behind:
            taken = self._changed.wait_for(self._is_taken, PATIENCE_SECONDS)
            self._behind = not taken

    def _is_taken(self) -> bool:
        return not (self._given or self._writing)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._behind = self._behind and bool(self._given)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._given or self._ended)
                if not self._given:
                    return
                text = "".join(self._given)
                self._given.clear()
                self._writing = True
            self._put(text)

    def _put(self, text: str) -> None:
        if self._over:
            return
        try:
            self._stream.write(_fitting(text, self._stream))
            self._stream.flush()
        except BROKEN as error:
            self._over = True
            with suppress(RunFailed):  # the run's files take nothing either, which it hears itself
                self._lost(reason=" ".join(f"{type(error).__name__}: {error}".split()))


_SHOWN: WeakSet[Shown] = WeakSet()


def held_up() -> bool:
    """Whether a write has not come back: a flush would wait for it, deaf to every signal."""
    return any(each._writing for each in _SHOWN)


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
