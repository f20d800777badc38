"""Copies beside a run: one at a time, the newest of those that wait, no harm where one hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligntune.runs.copies import Copies


class Storage:
    """A mirror that takes a folder when it is let."""

    def __init__(self) -> None:
        self.taken: list[str] = []
        self.asked = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.at_once = 0

    def push(self, folder: Path) -> None:
        self.at_once += 1
        assert self.at_once == 1
        self.asked.release()
        self.go.acquire()
        self.at_once -= 1
        self.taken.append(folder.name)

    def push_model(self, folder: Path) -> None:
        self.taken.append(folder.name)


def run(work: Callable[[Copies, Storage], Any], timeout_s: float = 60) -> tuple[list[Any], Storage]:
    """The events of what `work` does."""
    events: list[Any] = []
    storage = Storage()

    async def main() -> None:
        def told(**fields: Any) -> None:
            events.append(fields)

        await work(Copies(storage, timeout_s, told), storage)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(main(), 60))
    return events, storage


def test_of_the_checkpoints_that_wait_the_newest_is_copied_and_none_in_work_may_go() -> None:
    async def work(copies: Copies, storage: Storage) -> None:
        for step in (1, 2, 3):
            copies.offer(Path(f"step-{step}"))
            if step == 1:
                assert await asyncio.to_thread(storage.asked.acquire, timeout=30)
        assert copies.needed == {"step-1", "step-3"}
        storage.go.release(2)
        await copies.model(Path("model"))
        assert copies.needed == set()

    events, storage = run(work)
    assert storage.taken == ["step-1", "step-3", "model"]
    assert events == []


def test_a_copy_that_hangs_is_told_and_not_joined_by_another() -> None:
    async def work(copies: Copies, storage: Storage) -> None:
        copies.offer(Path("step-1"))
        await copies.settled()
        assert copies.needed == {"step-1"}, "its files are read still"
        copies.offer(Path("step-2"))
        await copies.model(Path("model"))
        assert copies.needed == {"step-1"}
        storage.go.release()
        assert copies._thread is not None
        await asyncio.wait_for(asyncio.wrap_future(copies._thread), 30)
        assert copies.needed == set()

    events, _ = run(work, timeout_s=0.05)
    assert events == [
        {"path": "step-1", "reason": "no end within 0.05 s"},
        {"path": "step-2", "reason": "an earlier copy has not ended yet"},
        {"path": "model", "reason": "an earlier copy has not ended yet"},
    ]


@pytest.mark.parametrize("kind", [OSError, TimeoutError])
def test_a_storage_that_takes_nothing_is_told_why(kind: type[Exception]) -> None:
    async def work(copies: Copies, storage: Storage) -> None:
        def push(_: Path) -> None:
            raise kind("connection\nreset")

        storage.push = push  # type: ignore[method-assign]
        copies.offer(Path("step-1"))
        await copies.settled()

    events, _ = run(work)
    assert events == [{"path": "step-1", "reason": "connection reset"}]
