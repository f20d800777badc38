"""An event loop whose clock jumps: whoever waits for a time waits for nothing, and whoever waits
for ever is found."""

from __future__ import annotations

import asyncio
import itertools
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


class _Task(asyncio.Task[Any]):
    """Its hash is its number, so that sets of tasks have the same order in each play."""

    def __init__(self, *args: Any, number: int, **kwargs: Any) -> None:
        self._number = number  # asked for amid what follows
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future[Any]):
    """As `_Task`."""

    def __init__(self, *, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self._number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its time starts at 0 and goes to the next timer at once. What is given to a thread is done at
    once, so that all comes in the same order each time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self.unheard: list[str] = []  # errors that nobody was told of
        self.set_exception_handler(self._hear)
        self.set_task_factory(self._task)

    def _task(self, loop: asyncio.AbstractEventLoop, of: Any, **named: Any) -> _Task:
        return _Task(of, loop=loop, number=next(self._numbers), **named)

    def create_future(self) -> _Future:
        """A future of this loop."""
        return _Future(number=next(self._numbers), loop=self)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        """A future of what `func` gives."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it is the caller's
            done.set_exception(error)
        return done

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
