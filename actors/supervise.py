"""A set of replicas of one role: dispatch, deadlines, restarts, growth; and the policy's ranks.

Invariant: no call outlives its deadline. A replica that dies or does not answer in time is killed
and replaced, its callers get `ReplicaLost` with the reason, and the replacement takes no call
before its start-up (the current weights, say) is done. What becomes of lost work, callers decide.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

log = logging.getLogger(__name__)

PEER_SECONDS = 10.0  # how long the cause of a rank's broken connection may come after it


class ReplicaLost(RuntimeError):
    """A replica died or missed a deadline; what it was doing did not happen, or cannot be had."""

    def __init__(self, replica: str, reason: str) -> None:
        super().__init__(f"{replica}: {reason}")
        self.replica = replica
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.replica, self.reason)


class ObjectsLost(RuntimeError):
    """An argument's object is gone with the node that held it; it must be made again."""


class RoleExhausted(RuntimeError):
    """No replica of a role is left and none may be started any more; the run cannot go on."""


async def answer(ref: Any, replica: str, what: str, deadline_s: float) -> Any:
    """The value of `ref`. A death, a lost object or a missed deadline is `ReplicaLost`; an
    exception raised by the actor's own code comes through as itself."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(ref.future()), deadline_s)
    except (TimeoutError, GetTimeoutError) as error:
        raise ReplicaLost(replica, f"{what} had no answer within {deadline_s:g} s") from error
    except RayTaskError as error:
        # An actor's death comes to those who wait for what it was making as a failed fetch.
        if isinstance(error.cause, ObjectLostError | RayActorError | WorkerCrashedError):
            raise ObjectsLost(f"an argument of {what} is lost: {error.cause}") from error
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
    except ObjectLostError as error:
        raise ObjectsLost(f"the answer of {what}, or an argument, is lost: {error}") from error
    except (RayActorError, WorkerCrashedError) as error:
        reason = str(error).strip().splitlines()
        raise ReplicaLost(replica, f"died during {what}: {reason[0] if reason else error!r}") from (
            error
        )


@dataclass
class _Replica:
    name: str
    handle: ActorHandle
    slots: int
    busy: int = 0
    serving: bool = False
    calls: int = field(default=0)


Event = Callable[..., None]


class ReplicaSet:
    """Replicas of one role, least loaded first.

    `make(index, name)` creates an actor; `prepare(handle, name)` brings it to where it may serve,
    and is awaited before it does. A replica has up to `slots` calls at a time, fewer where
    `prepare` returns a smaller number. `event(kind, **fields)` hears of losses and restarts.
    """

    def __init__(
        self,
        role: str,
        size: int,
        make: Callable[[int, str], ActorHandle],
        prepare: Callable[[ActorHandle, str], Awaitable[int | None]],
        *,
        slots: int,
        max_restarts: int,
        event: Event,
    ) -> None:
        self.role = role
        self._size = size
        self._make = make
        self._prepare = prepare
        self._slots = slots
        self._restarts_left = max_restarts
        self._event = event
        self._replicas: dict[int, _Replica] = {}
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._generation = 0
        self._changed = asyncio.Condition()
        self._closed = False
        self._failure: str | None = None

    @property
    def serving(self) -> int:
        """Replicas that take calls now."""
        return sum(replica.serving for replica in self._replicas.values())

    @property
    def busy(self) -> int:
        """Calls in flight."""
        return sum(replica.busy for replica in self._replicas.values())

    async def start(self) -> None:
        """Start every replica; returns when all serve. Raises what kept one from starting."""
        await asyncio.gather(*(self._bring_up(index) for index in range(self._size)))

    async def _bring_up(self, index: int) -> None:
        name = f"{self.role}-{index}.{self._generation}"
        self._generation += 1
        replica = _Replica(name, self._make(index, name), self._slots)
        self._replicas[index] = replica
        slots = await self._prepare(replica.handle, name)
        replica.slots = min(self._slots, slots or self._slots)
        replica.serving = True  # no await in between: what `prepare` checked last still holds
        async with self._changed:
            self._changed.notify_all()

    def grow(self, limit: int, room: Callable[[int], bool]) -> None:
        """Bring up replicas beyond the first `size`, `limit` in all, where `room(index)` says that
        there is a place. One that is lost is not replaced, but a later call may bring it up again.
        """
        for index in range(self._size, limit):
            known = index in self._replicas or index in self._starting
            if not known and not self._closed and room(index):
                self._starting[index] = asyncio.create_task(self._join(index))

    async def _join(self, index: int) -> None:
        """Bring up one replica more; the set does without it where that fails."""
        try:
            await self._bring_up(index)
            self._event("replica_joined", role=self.role, replica=self._replicas[index].name)
        except Exception as error:  # noqa: BLE001 - a failed start is a lost replica
            replica = self._replicas.pop(index)
            ray.kill(replica.handle)
            self._event("replica_lost", role=self.role, replica=replica.name, reason=str(error))
        finally:
            self._starting.pop(index, None)
            async with self._changed:
                self._changed.notify_all()

    async def _replace(self, index: int) -> None:
        """Bring up a replacement, trying again while restarts are left."""
        try:
            while self._restarts_left > 0 and not self._closed:
                self._restarts_left -= 1
                try:
                    await self._bring_up(index)
                except Exception as error:  # noqa: BLE001 - a failed start is one more lost replica
                    self._failure = str(error)
                    ray.kill(self._replicas[index].handle)
                    self._event("replica_lost", role=self.role, reason=str(error))
                    continue
                self._event("replica_restarted", role=self.role, replica=self._replicas[index].name)
                return
            self._replicas.pop(index, None)
        finally:
            self._starting.pop(index, None)
            async with self._changed:
                self._changed.notify_all()

    async def _lost(self, index: int, replica: _Replica, reason: str) -> None:
        """Take a replica out of service and start its replacement, once for all who saw it."""
        if self._closed or self._replicas.get(index) is not replica or index in self._starting:
            return
        replica.serving = False
        self._failure = reason
        ray.kill(replica.handle)
        self._event("replica_lost", role=self.role, replica=replica.name, reason=reason)
        if index >= self._size:
            del self._replicas[index]
            async with self._changed:
                self._changed.notify_all()
            return
        self._starting[index] = asyncio.create_task(self._replace(index))

    async def _acquire(self, deadline_s: float) -> tuple[int, _Replica]:
        def free() -> list[tuple[int, int, int]]:
            return [
                (replica.busy, replica.calls, index)
                for index, replica in self._replicas.items()
                if replica.serving and replica.busy < replica.slots
            ]

        def hopeless() -> bool:
            return self._closed or not (self.serving or self._starting)

        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: bool(free()) or hopeless()), deadline_s
                )
            except TimeoutError as error:
                raise RoleExhausted(
                    f"no {self.role} replica was free within {deadline_s:g} s "
                    f"({self.serving} serving, {self.busy} calls in flight)"
                ) from error
            if not free():
                raise RoleExhausted(
                    f"no {self.role} replica is left ({self._failure or 'the set is closed'}); "
                    f"raise {self.role}.max_restarts or mend the cause"
                )
            _, _, index = min(free())
            replica = self._replicas[index]
            replica.busy += 1
            replica.calls += 1
            return index, replica

    async def call(
        self,
        method: str,
        *args: Any,
        deadline_s: float,
        queue_s: float,
        returns: int = 1,
        on_dispatch: Callable[[str], None] | None = None,
    ) -> tuple[Any, ...]:
        """Call `method` on the least loaded replica; returns (first value, further references...).

        `on_dispatch(replica)` runs when a replica is chosen. Raises ReplicaLost, RoleExhausted, or
        what the actor's method raised.
        """
        index, replica = await self._acquire(queue_s)
        try:
            if on_dispatch is not None:
                on_dispatch(replica.name)
            refs = getattr(replica.handle, method).options(num_returns=returns).remote(*args)
            first, *rest = refs if returns > 1 else [refs]
            return await answer(first, replica.name, method, deadline_s), *rest
        except ReplicaLost as lost:
            await self._lost(index, replica, lost.reason)
            raise
        finally:
            async with self._changed:
                replica.busy -= 1
                self._changed.notify_all()

    async def broadcast(self, method: str, *args: Any, deadline_s: float) -> list[Any]:
        """Call `method` on every serving replica; a replica lost at it is replaced, not retried.

        Replicas that are starting are left out: `prepare` brings them up to date. Raises
        ObjectsLost, once all have answered, where an argument is gone.
        """

        async def one(index: int, replica: _Replica) -> Any:
            try:
                ref = getattr(replica.handle, method).remote(*args)
                return await answer(ref, replica.name, method, deadline_s)
            except ReplicaLost as lost:
                await self._lost(index, replica, lost.reason)
                return None

        serving = [(i, r) for i, r in self._replicas.items() if r.serving]
        answers = await asyncio.gather(*(one(i, r) for i, r in serving), return_exceptions=True)
        for given in answers:
            if isinstance(given, BaseException):
                raise given
        return [given for given in answers if given is not None]

    async def close(self) -> None:
        """Stop every replica and whatever is still starting."""
        self._closed = True
        for task in list(self._starting.values()):
            task.cancel()
        await asyncio.gather(*self._starting.values(), return_exceptions=True)
        for replica in self._replicas.values():
            ray.kill(replica.handle)
        self._replicas.clear()
        async with self._changed:
            self._changed.notify_all()


class RankSet:
    """The ranks of the policy (or critic): called together, lost together."""

    def __init__(self, role: str, handles: Sequence[ActorHandle]) -> None:
        self.role = role
        self._handles = list(handles)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self._handles)

    async def each(
        self, method: str, args: Sequence[tuple[Any, ...]], deadline_s: float
    ) -> list[Any]:
        """Call `method` on every rank with its own arguments; see `together` for what it raises."""
        refs = [
            getattr(handle, method).remote(*a)
            for handle, a in zip(self._handles, args, strict=True)
        ]
        return await self.answers(method, refs, deadline_s)

    async def answers(self, method: str, refs: Sequence[Any], deadline_s: float) -> list[Any]:
        """What the ranks answer to calls that were started; one reference a rank."""
        waits = [
            answer(ref, f"{self.role}-{rank}", method, deadline_s) for rank, ref in enumerate(refs)
        ]
        return await together(self.role, waits)

    async def all(self, method: str, *args: Any, deadline_s: float) -> list[Any]:
        """Call `method` on every rank with the same arguments."""
        return await self.each(method, [args] * self.size, deadline_s)

    def start_call(self, rank: int, method: str, *args: Any, returns: int) -> list[Any]:
        """Start a call with several returns on one rank; returns their references."""
        refs = getattr(self._handles[rank], method).options(num_returns=returns).remote(*args)
        return refs if returns > 1 else [refs]

    def kill(self) -> None:
        """Stop every rank at once."""
        for handle in self._handles:
            ray.kill(handle)
        self._handles.clear()


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
