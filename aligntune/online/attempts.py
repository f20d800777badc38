"""How often a group is tried, and when it is to blame for what was lost with it.

Invariant: a group is given up for losses only where it was alone on the replica each time. Whoever
was there at one death may be there by chance; whoever was there at the next one too is tried in
ever smaller company, until it is alone or was not the cause.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from actors.answers import ObjectsLost, ReplicaLost

T = TypeVar("T")
Retried = Callable[[str], None]  # (reason): it is tried again

LONGEST_PAUSE_S = 30.0


class GroupFailed(RuntimeError):
    """A group failed as often as it may; the message is the last reason. `lost`: it is not known to
    be bad, its replicas died."""

    def __init__(self, reason: str, lost: bool = False) -> None:
        super().__init__(reason)
        self.lost = lost


@dataclass
class Suspicion:
    """What the deaths of replicas say of one group: `company` is what it is tried in next."""

    limit: int  # deaths with it alone
    alone: int = 0
    shared: int = 0
    company: int | None = None

    def heard(self, loss: ReplicaLost) -> bool:
        """Take a death into account; whether the group is to be given up."""
        if loss.company == 1:
            self.alone += 1
        elif loss.company > 1:
            self.shared += 1
            if self.shared > 1:
                self.company = max(1, loss.company // 4)
        return self.alone >= self.limit


async def outlive(call: Callable[[int | None], Awaitable[T]], limit: int, retried: Retried) -> T:
    """What `call(company)` gives, called again after each death of a replica.

    Raises GroupFailed after `limit` deaths with it alone.
    """
    suspicion = Suspicion(limit)
    while True:
        try:
            return await call(suspicion.company)
        except ReplicaLost as loss:
            if suspicion.heard(loss):
                times = f"{limit} times" if limit > 1 else "once"
                raise GroupFailed(
                    f"lost {times}, alone on its replica: {loss}", lost=True
                ) from loss
            retried(str(loss))


async def again(make: Callable[[int | None], Awaitable[T]], limit: int, retried: Retried) -> T:
    """As `outlive`, and made anew where its arrays are lost with their node: that says nothing of
    the group, so it goes on, with pauses, for as long as a step may take."""
    gone = 0
    while True:
        try:
            return await outlive(make, limit, retried)
        except ObjectsLost as loss:
            retried(str(loss))
            gone += 1
            await asyncio.sleep(min(LONGEST_PAUSE_S, 0.01 * 2**gone))
