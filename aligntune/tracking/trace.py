"""`trace.json`: a run's remote calls in the trace event format of Chrome, which Perfetto opens.

One process a role, one thread a replica and lane; a call is a complete event ("ph": "X") with what
it was for, and inside it the parts that the actor says it spent its time on. Times are microseconds
of the driver's clock. The file is an array whose end may be missing, where a run was killed:
the format allows that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from actors.timeline import Span


class Trace:
    """The trace of one process of a run; an earlier one is replaced."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._file.write("[")
        self._processes: dict[str, int] = {}
        self._threads: dict[tuple[str, int], int] = {}
        self._separator = "\n"

    def add(self, span: Span) -> None:
        """Write a call that is over."""
        for event in self._events(span):
            self._file.write(self._separator + json.dumps(event))
            self._separator = ",\n"

    def close(self) -> None:
        """End the array."""
        self._file.write("\n]\n")
        self._file.close()

    def _events(self, span: Span) -> Iterator[dict[str, Any]]:
        role = span.replica.partition("-")[0]
        if role not in self._processes:
            self._processes[role] = len(self._processes) + 1
            yield _name("process_name", role, self._processes[role], 0)
        process, place = self._processes[role], (span.replica, span.lane)
        if place not in self._threads:
            self._threads[place] = len(self._threads) + 1
            yield _name("thread_name", span.replica, process, self._threads[place])
        assert span.end is not None, "only calls that are over are written"
        about = {"for": span.about, **({"failed": True} if span.failed else {})}
        where = {"pid": process, "tid": self._threads[place], "cat": role, "ph": "X"}
        yield {**where, "name": span.method, **_time(span.start, span.end), "args": about}
        end, parts = span.end, list((span.inside or {}).items())
        for name, seconds in reversed(parts):  # one after the other, to the end of the call
            start = max(span.start, end - seconds)
            yield {**where, "name": name, **_time(start, end), "args": about}
            end = start


def _name(kind: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _time(start: float, end: float) -> dict[str, float]:
    """Microseconds, to a tenth: whole events stay within the one they are inside of."""
    return {"ts": round(start * 1e6, 1), "dur": round(end * 1e6, 1) - round(start * 1e6, 1)}
