"""One clock for every remote call: who was asked for what, when, and for which group or step.

A run makes one `Timeline` current; `answer`, which every call passes, writes its spans. Where none
is current, nothing is kept. Times are the caller's `time.monotonic`, in seconds.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, slots=True)
class Span:
    """One call, while it runs (`end` is None) and after."""

    replica: str  # rollout-0.1, policy-0, ...
    method: str
    about: str  # group 17, step 3, ...
    start: float
    lane: int = 0  # of its replica: no two calls that overlap share one
    end: float | None = None
    failed: bool = False
    inside: Mapping[str, float] | None = None  # seconds that the actor says it spent, by part


class Timeline:
    """The calls of one run. `ended(span)`, where given, hears of each once it is over."""

    def __init__(
        self,
        ended: Callable[[Span], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ended = ended
        self._now = now
        self.calls = 0  # that have begun or ended
        self._since = now()
        self._running: dict[int, Span] = {}
        self._over: list[Span] = []
        self._lanes: dict[str, int] = {}  # by replica, how many there are
        self._free: dict[str, list[int]] = {}  # and which of them no call is in

    def begin(self, replica: str, method: str, about: str) -> Span:
        """A call starts now."""
        self.calls += 1
        free = self._free.setdefault(replica, [])
        if not free:
            self._lanes[replica] = self._lanes.get(replica, 0) + 1
            free.append(self._lanes[replica] - 1)
        span = Span(replica, method, about, self._now(), heapq.heappop(free))
        self._running[id(span)] = span
        return span

    def end(self, span: Span, failed: bool = False) -> None:
        """It is over."""
        self.calls += 1
        span.end, span.failed = self._now(), failed
        del self._running[id(span)]
        heapq.heappush(self._free[span.replica], span.lane)
        self._over.append(span)
        if self._ended is not None:
            self._ended(span)

    @property
    def open(self) -> list[Span]:
        """The calls that run now; safe to ask from any thread."""
        return list(self._running.values())

    def running(self) -> list[str]:
        """What is being waited for, the longest wait first."""
        now = self._now()
        spans = sorted(self.open, key=lambda span: span.start)
        return [f"{s.method} of {s.replica} ({s.about}): {now - s.start:.0f} s" for s in spans]

    def heard(self, span: Span, answer: Any) -> None:
        """A call was answered; where the actor says how long its own part took, that is kept."""
        seconds = getattr(answer, "seconds", None)
        if isinstance(seconds, Mapping):
            span.inside = seconds
        elif isinstance(seconds, int | float):
            span.inside = {"in the actor": float(seconds)}

    def take(self, activities: Mapping[str, Collection[str]]) -> dict[str, float]:
        """Wall seconds since the last call in which any of an activity's methods ran, what still
        runs included."""
        now, since = self._now(), self._since
        spans = [*self._over, *self._running.values()]
        self._over, self._since = [], now
        return {
            name: union(
                (max(span.start, since), now if span.end is None else span.end)
                for span in spans
                if span.method in methods
            )
            for name, methods in activities.items()
        }


def union(intervals: Iterator[tuple[float, float]]) -> float:
    """The length of what the intervals (start, end) cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


current: ContextVar[Timeline | None] = ContextVar("timeline", default=None)
about: ContextVar[str] = ContextVar("about", default="")  # what the calls of this task are for


@contextmanager
def spanned(replica: str, method: str) -> Iterator[Callable[[Any], None]]:
    """A call that lasts as long as this context; yields what hears its answer."""
    timeline = current.get()
    if timeline is None:
        yield lambda answer: None
        return
    span = timeline.begin(replica, method, about.get())
    failed = True
    try:
        yield lambda answer: timeline.heard(span, answer)
        failed = False
    finally:
        timeline.end(span, failed)
