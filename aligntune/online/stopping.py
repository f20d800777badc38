"""The wish that a run stops: heard once, told to whatever waits, and kept with its reason."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from actors.waiting import unless
from aligntune.errors import Interrupted
from aligntune.online.state import RunState

T = TypeVar("T")


class Stopping:
    """Of one run; `changed` is set when it is asked to stop."""

    def __init__(self, state: RunState, changed: asyncio.Event) -> None:
        self._state = state
        self._changed = changed
        self._asked = asyncio.Event()
        self._reason: str | None = None

    def ask(self, signal: int, reason: str | None = None) -> None:
        """Checkpoint and end; safe from a signal handler of the event loop. `signal` makes the exit
        code, `reason` is told where no signal came."""
        if not self._asked.is_set():
            self._state.signal, self._reason = signal, reason
            self._asked.set()
            self._changed.set()

    def check(self) -> None:
        """Raises Interrupted where the run was asked to stop."""
        if self._asked.is_set():
            raise Interrupted(self._state.signal, self._reason)

    async def unless(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, or drop it and raise Interrupted as soon as the run is asked to stop."""
        return await unless(
            self._asked, work, lambda: Interrupted(self._state.signal, self._reason)
        )
