"""Calls that all ranks of a model are in together: every answer, or the cause of the failure."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from actors.answers import ReplicaLost

PEER_SECONDS = 10.0  # how long the cause of a rank's broken connection may come after it


async def together(role: str, waits: Sequence[Awaitable[Any]]) -> list[Any]:
    """What all ranks answer, or the cause of their failure.

    Where one rank dies the connections of the others break, often before its death is known: after
    a first failure the others have `PEER_SECONDS` to answer too. Raises ReplicaLost where a rank
    died, missed its deadline or lost its connection to the others; else what a rank raised.
    """
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=PEER_SECONDS)
        errors = {
            rank: error
            for rank, task in enumerate(tasks)
            if task.done() and (error := task.exception()) is not None
        }
        if errors:
            raise _cause(role, errors)
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def _cause(role: str, errors: Mapping[int, BaseException]) -> BaseException:
    """A death before an error of a rank's own before a broken connection, which is a lost rank."""

    def order(error: BaseException) -> int:
        return 0 if isinstance(error, ReplicaLost) else 2 if broken_connection(error) else 1

    rank, error = min(errors.items(), key=lambda item: order(item[1]))
    if broken_connection(error):
        return ReplicaLost(f"{role}-{rank}", f"lost its connection to the other ranks: {error}")
    return error


def broken_connection(error: BaseException) -> bool:
    """Whether an error of a collective says that another rank is gone or out of reach. NCCL, stores
    and sockets have classes of their own; gloo raises RuntimeError and names itself."""
    named = any(base.__name__ == "DistError" for base in type(error).__mro__)
    return named or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
