"""Waiting for several things at once, without leaving one behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


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
