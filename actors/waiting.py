"""Waiting for several things at once, without leaving one behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def all_of(*work: Awaitable[Any]) -> list[Any]:
    """The answers of all. Where one fails the others are ended before its error is raised, so that
    none is left to fail unheard."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def unless(
    event: asyncio.Event, work: Coroutine[Any, Any, T], error: Callable[[], Exception]
) -> T:
    """Await `work`, or drop it and raise `error()` as soon as `event` is set."""
    task = asyncio.create_task(work)
    came = asyncio.create_task(event.wait())
    try:
        await asyncio.wait((task, came), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
    finally:
        came.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    raise error()


async def done_within(seconds: float, future: asyncio.Future[Any]) -> bool:
    """Whether `future` is done in time; it is cancelled where it is not, or where the caller is.

    What is there counts, however late the caller comes to it. `asyncio.wait_for` of Python 3.11
    does otherwise where the caller is cancelled as the answer comes: it returns the answer.
    """
    try:
        await asyncio.wait((future,), timeout=seconds)
        return future.done()
    finally:
        if not future.cancel() and not future.cancelled():
            future.exception()  # then asyncio reports none that a cancelled caller leaves
