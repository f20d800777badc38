"""What a call of an actor comes to: its answer, or how actor or answer were lost.

Invariant: no call outlives its deadline, and one that missed it says which setting that was. What
the actor's own code raised is no loss.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.timeline import spanned
from actors.waiting import done_within

DEATHS = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)
"""How Ray tells that a process is gone. The last: its node had little memory left, so Ray ended it;
another process may have taken the memory."""


class ReplicaLost(RuntimeError):
    """A replica died or missed a deadline; what it was doing did not happen, or cannot be had.

    `company` is how many calls it had then; 0 where that is not known. `limit` is the setting of
    the deadline that it missed; empty where it missed none, or one that nobody can set.
    """

    def __init__(self, replica: str, reason: str, company: int = 0, limit: str = "") -> None:
        super().__init__(f"{replica}: {reason}")
        self.replica = replica
        self.reason = reason
        self.company = company
        self.limit = limit

    def __reduce__(self) -> tuple[type, tuple[str, str, int, str]]:
        return type(self), (self.replica, self.reason, self.company, self.limit)


class ObjectsLost(RuntimeError):
    """An argument's object is gone with the node that held it; it must be made again."""


async def answer(ref: Any, replica: str, what: str, deadline_s: float, limit: str = "") -> Any:
    """The value of `ref`. A death, a lost object or a missed deadline is `ReplicaLost`; an
    exception raised by the actor's own code comes through as itself. `limit` is the setting that
    the deadline comes from, for the message."""
    future = asyncio.wrap_future(ref.future())
    try:
        with spanned(replica, what) as heard:
            if not await done_within(deadline_s, future):
                late = f"had no answer within {deadline_s:g} s{f' ({limit})' * bool(limit)}"
                raise ReplicaLost(replica, f"{what} {late}", limit=limit)
            heard(value := future.result())
            return value
    except RayTaskError as error:
        # An actor's death comes to those who wait for what it was making as a failed fetch.
        if isinstance(error.cause, (ObjectLostError, *DEATHS)):
            raise ObjectsLost(f"an argument of {what} is lost: {error.cause}") from error
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
    except ObjectLostError as error:
        raise ObjectsLost(f"the answer of {what}, or an argument, is lost: {error}") from error
    except DEATHS as error:
        reason = str(error).strip().splitlines()
        raise ReplicaLost(replica, f"died during {what}: {reason[0] if reason else error!r}") from (
            error
        )


def drop(ref: Any) -> None:
    """Have the actor end a call, where it can."""
    ray.cancel(ref, force=False, recursive=False)
