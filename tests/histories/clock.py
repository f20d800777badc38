"""An event loop whose clock jumps: whoever waits for a time waits for nothing, and whoever waits
for ever is found."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")

TICK_S = 1e-6  # of a turn of the loop
LONGEST_S = 7 * 24 * 3600.0  # of the virtual clock: a week


class WaitsForEver(BaseException):
    """Nothing is left that could happen, or nothing comes to an end."""


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Looks for what is there and sleeps for no timer."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> Any:
        found = super().select(0)
        self.loop.now += TICK_S
        if found or timeout == 0:
            return found
        if timeout is None:
            raise WaitsForEver("nothing is left that could happen")
        self.loop.now += timeout
        if self.loop.now > LONGEST_S:
            raise WaitsForEver(f"no end within {LONGEST_S:g} s")
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time starts at 0 and goes to the next timer at once. Nothing in it may use threads."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self.unheard: list[str] = []  # errors that nobody was told of
        self.set_exception_handler(self._hear)

    def time(self) -> float:
        """Seconds."""
        return self.now

    def _hear(self, _: Any, context: dict[str, Any]) -> None:
        self.unheard.append(f"{context['message']}: {context.get('exception')!r}")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives; `time.monotonic` is this loop's meanwhile. Raises WaitsForEver."""
        with mock.patch("time.monotonic", self.time):
            try:
                return self.run_until_complete(work)
            finally:
                self._end()

    def _end(self) -> None:
        """End what is left, for as long as it takes."""
        left = asyncio.all_tasks(self)
        for task in left:
            task.cancel()
        if left:
            ended = asyncio.wait(left, timeout=LONGEST_S)
            self.run_until_complete(ended)
        self.close()
