"""Copies of a run's checkpoints to `checkpoint.storage`, beside the run.

Invariant: a storage that fails or hangs costs the run nothing but a copy, which is an event. There
is one copy at a time; of the checkpoints that wait meanwhile the newest is copied next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from actors.waiting import done_within
from aligntune.runs.deadline import asked
from aligntune.runs.mirror import Mirror


class Copies:
    """The copies of one run. `not_copied(path=..., reason=...)` hears of what was not taken."""

    def __init__(self, mirror: Mirror, timeout_s: float, not_copied: Callable[..., None]) -> None:
        self._mirror = mirror
        self._timeout_s = timeout_s
        self._not_copied = not_copied
        self._waiting: Path | None = None
        self._thread: Future[None] | None = None  # one that has missed its deadline stays here
        self._read: Path | None = None  # by that thread
        self._task: asyncio.Task[None] | None = None

    @property
    def needed(self) -> set[str]:
        """The names of the checkpoints that are being copied, also beyond the deadline, or are to
        be."""
        copied = None if self._thread is None or self._thread.done() else self._read
        return {path.name for path in (copied, self._waiting) if path is not None}

    def offer(self, checkpoint: Path) -> None:
        """Copy a checkpoint when the one before is through."""
        self._waiting = checkpoint
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="copies")

    async def _run(self) -> None:
        while self._waiting is not None:
            folder, self._waiting = self._waiting, None
            await self._copied(self._mirror.push, folder)

    async def settled(self) -> None:
        """Wait for the copies that run and wait, which have their deadlines."""
        if self._task is not None:
            await asyncio.wait((self._task,))

    async def model(self, folder: Path) -> None:
        """Copy the final export, as the last."""
        await self.settled()
        await self._copied(self._mirror.push_model, folder)

    async def _copied(self, push: Callable[[Path], None], folder: Path) -> None:
        if self._thread is not None and not self._thread.done():
            reason = "an earlier copy has not ended yet"
        else:
            self._read, self._thread = folder, asked(lambda: push(folder))
            copied = asyncio.wrap_future(self._thread)
            if not await done_within(self._timeout_s, copied):
                reason = f"no end within {self._timeout_s:g} s"
            elif (error := copied.exception()) is None:
                return
            else:
                reason = " ".join(str(error).split()) or type(error).__name__
        self._not_copied(path=folder.name, reason=reason)
