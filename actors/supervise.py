"""Replicas of one role as Ray actors: calls with deadlines, losses, replacements, growth.

Invariant: no call outlives its deadline. A replica that dies or does not answer in time is killed
and replaced, its callers get `ReplicaLost` with the reason, and the replacement takes no call
before its start-up (the current weights, say) is done. What becomes of lost work, callers decide.
Which replica gets which call is decided in `replicas`, without Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.answers import ReplicaLost, answer, drop
from actors.liveness import USUAL, Patience, listen
from actors.replicas import Replica, Replicas, State, Waiter
from actors.restarts import Restarts
from actors.waiting import all_of


class RoleExhausted(RuntimeError):
    """No replica of a role is left and none may be started any more; the run cannot go on."""


class Lent:
    """A replica that somebody has a slot of."""

    def __init__(self, name: str, handle: ActorHandle, drop: Callable[[Any], None] = drop) -> None:
        self.name = name
        self.handle = handle
        self._drop = drop

    async def call(
        self, method: str, *args: Any, deadline_s: float, limit: str = "", returns: int = 1
    ) -> tuple[Any, ...]:
        """(first value, further references...) of a call, which ends where its caller is cancelled.
        `limit` is the setting that the deadline comes from. Raises ReplicaLost, ObjectsLost, or
        what the actor's method raised."""
        refs = getattr(self.handle, method).options(num_returns=returns).remote(*args)
        first, *rest = refs if returns > 1 else [refs]
        try:
            return await answer(first, self.name, method, deadline_s, limit), *rest
        except asyncio.CancelledError:
            self._drop(first)
            raise

    def tell(self, method: str, *args: Any) -> None:
        """A call whose end nobody waits for."""
        getattr(self.handle, method).remote(*args)


Event = Callable[..., None]


class ReplicaSet:
    """Replicas of one role, least loaded first.

    `make(index, name)` creates an actor; `prepare(handle, name)` brings it to where it may serve,
    and is awaited before it does. A replica has up to `slots` calls at a time, fewer where
    `prepare` returns a smaller number. `event(kind, **fields)` hears of losses and restarts;
    `kill(handle)` stops an actor at once, `drop(reference)` a call whose answer nobody wants.
    `section` is that of the role's settings, for messages.
    `ping(handle)`, where given, is the reference to an answer that a live actor gives at once: one
    that says nothing for a while gets no new call, and for longer than `patience` is lost.
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
        kill: Callable[[ActorHandle], None] = ray.kill,
        drop: Callable[[Any], None] = drop,
        section: str | None = None,
        ping: Callable[[ActorHandle], Any] | None = None,
        patience: Patience = USUAL,
    ) -> None:
        self.role = role
        self._section = section or role
        self.replicas = Replicas(role, size, slots, Restarts(max_restarts))
        self._make = make
        self._prepare = prepare
        self._event = event
        self._kill = kill
        self._drop = drop
        self._ping = ping
        self._patience = patience
        self.progress = 0  # goes up with whatever a replica says that it has done
        self._limit = ""  # the setting of the deadline that the last lost one missed
        self._handles: dict[Replica, ActorHandle] = {}
        self._listening: dict[Replica, asyncio.Task[None]] = {}
        self._starting: set[asyncio.Task[None]] = set()

    @property
    def handles(self) -> dict[str, ActorHandle]:
        """Every actor that is not dead, by its name."""
        return {replica.name: handle for replica, handle in self._handles.items()}

    @property
    def serving(self) -> int:
        """Replicas that take calls now."""
        return len(self.replicas.serving)

    async def start(self) -> None:
        """Start every replica; returns when all serve.

        One that dies as it starts is replaced as anywhere else, but no more often than there are
        restarts, though some come back while a start takes long. Raises RoleExhausted where that
        has happened too often, or what the actor's own code raised.
        """
        first = [self.replicas.begin(index) for index in range(self.replicas.size)]
        await all_of(*(self._first(replica) for replica in first))

    async def _first(self, replica: Replica) -> None:
        while True:
            try:
                await self._bring_up(replica)
            except ReplicaLost as lost:
                new = self._take_out(replica, lost.reason, lost.limit)
                if new is None or new.failed_starts > self.replicas.restarts.limit:
                    raise self._exhausted() from lost
                replica = new
            else:
                if replica.failed_starts:
                    self._event("replica_restarted", role=self.role, replica=replica.name)
                return

    async def _bring_up(self, replica: Replica) -> None:
        await asyncio.sleep(replica.pause_s)
        handle = self._handles[replica] = self._make(replica.index, replica.name)
        slots = await self._prepare(handle, replica.name)
        # No await in between: what `prepare` checked last still holds.
        self.replicas.move(replica, State.READY, slots)
        if self._ping is not None:
            listening = self._listen(replica, handle, self._ping)
            self._listening[replica] = asyncio.create_task(listening, name=f"hear {replica.name}")

    async def _listen(
        self, replica: Replica, handle: ActorHandle, ping: Callable[[ActorHandle], Any]
    ) -> None:
        """Ask a replica whether it lives until it does not."""

        def heard(done: int) -> None:
            self.progress += done
            if replica.state is State.SUSPECT:
                self.replicas.move(replica, State.READY)

        def suspect(silent: float) -> None:
            if replica.state is State.READY:
                self.replicas.move(replica, State.SUSPECT)
                self._event(
                    "replica_silent", role=self.role, replica=replica.name, seconds=round(silent)
                )

        self._lost(replica, await listen(lambda: ping(handle), self._patience, heard, suspect))

    def refill(self) -> None:
        """Bring up what was lost while no restart was left, as far as some have come back."""
        for replica in self.replicas.refill():
            self._later(replica, "replica_restarted")

    def grow(self, limit: int, room: Callable[[int], bool]) -> None:
        """Bring up replicas beyond the first `size`, `limit` in all, where `room(index)` says that
        there is a place. One that is lost is not replaced, but a later call may bring it up again.
        """
        for replica in self.replicas.grow(limit, room):
            self._later(replica, "replica_joined")

    def _later(self, replica: Replica, kind: str) -> None:
        """Bring up one more replica beside what runs; `kind` is the event of its coming."""
        task = asyncio.create_task(self._come(replica, kind))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _come(self, replica: Replica, kind: str) -> None:
        try:
            await self._bring_up(replica)
        except ReplicaLost as lost:
            self._lost(replica, lost.reason, lost.limit)
        except Exception as error:  # noqa: BLE001 - a failed start is one more lost replica
            self._lost(replica, str(error))
        else:
            self._event(kind, role=self.role, replica=replica.name)

    def _lost(self, replica: Replica, reason: str, limit: str = "") -> None:
        """Take a replica out of service and start its replacement, once for all who saw it."""
        new = self._take_out(replica, reason, limit)
        if new is not None:
            self._later(new, "replica_restarted")

    def _take_out(self, replica: Replica, reason: str, limit: str) -> Replica | None:
        """Its replacement, to be brought up, for the first who saw that a replica is lost; `limit`
        is the setting of the deadline that it missed, if that is why."""
        if replica.state is State.DEAD:
            return None
        self._limit = limit
        new = self.replicas.lost(replica, reason)
        self._stop(replica)
        self._event("replica_lost", role=self.role, replica=replica.name, reason=reason)
        return new

    def _exhausted(self) -> RoleExhausted:
        why = self.replicas.failure or "the set is closed"
        raised = self._limit or f"{self._section}.max_restarts"
        return RoleExhausted(
            f"no {self.role} replica is left ({why}); raise {raised} or mend the cause"
        )

    def _stop(self, replica: Replica) -> None:
        listening = self._listening.pop(replica, None)
        if listening is not None and listening is not asyncio.current_task():
            listening.cancel()
        handle = self._handles.pop(replica, None)
        if handle is not None:  # else it was never made
            self._kill(handle)

    async def _acquire(self, deadline_s: float, company: int | None) -> tuple[Replica, ActorHandle]:
        """A slot of a replica, to be released. Raises RoleExhausted."""
        end = asyncio.get_running_loop().time() + deadline_s
        while True:
            waiter = self.replicas.ask(company)
            if not waiter.settled:
                await self._settled(waiter, end, deadline_s)
            if (replica := waiter.replica) is None:
                raise self._exhausted()
            if (handle := self._handles.get(replica)) is not None:
                return replica, handle
            self.replicas.release(replica, company)  # it was lost before its slot could be used

    async def _settled(self, waiter: Waiter, end: float, deadline_s: float) -> None:
        """Wait until a waiter has a slot, or will never have one. Raises RoleExhausted at the
        deadline; whoever is cancelled, or late, leaves the slot it may just have got to others."""
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not settled.done():
                settled.set_result(None)

        waiter.wake = wake
        try:
            async with asyncio.timeout_at(end):
                await settled
        except BaseException as error:
            self.replicas.give_up(waiter)
            if not isinstance(error, TimeoutError):
                raise
            busy = sum(replica.busy for replica in self.replicas.live)
            raise RoleExhausted(
                f"no {self.role} replica was free within {deadline_s:g} s "
                f"({self.serving} serving, {busy} calls in flight)"
            ) from error

    async def call(
        self,
        method: str,
        *args: Any,
        deadline_s: float,
        queue_s: float,
        limit: str = "",
        returns: int = 1,
        company: int | None = None,
        on_dispatch: Callable[[str], None] | None = None,
    ) -> tuple[Any, ...]:
        """Call `method` on the least loaded replica; returns (first value, further references...).

        `company` is how many calls, this one too, the replica may have while it runs; default: as
        many as it takes. `on_dispatch(replica)` runs when a replica is chosen. `limit` is the
        setting that the deadline comes from. A caller that is cancelled ends the call. Raises
        ReplicaLost, RoleExhausted, or what the actor's method raised.
        """
        async with self.lend(queue_s, company) as lent:
            if on_dispatch is not None:
                on_dispatch(lent.name)
            return await lent.call(
                method, *args, deadline_s=deadline_s, limit=limit, returns=returns
            )

    @asynccontextmanager
    async def lend(self, queue_s: float, company: int | None = None) -> AsyncIterator[Lent]:
        """A slot of the least loaded replica, for several calls or for those of another actor.

        `ReplicaLost` of this replica, raised while it is lent, takes it out of service, and says
        from then on in what company it was. Raises RoleExhausted.
        """
        replica, handle = await self._acquire(queue_s, company)
        try:
            yield Lent(replica.name, handle, self._drop)
        except ReplicaLost as lost:
            if lost.replica == replica.name:
                self._lost(replica, lost.reason, lost.limit)
                lost.company = replica.company
            raise
        finally:
            self.replicas.release(replica, company)

    async def broadcast(
        self,
        method: str,
        *args: Any,
        deadline_s: float,
        limit: str = "",
        only: Collection[str] | None = None,
    ) -> list[Any]:
        """Call `method` on every serving replica (`only`: of these), one that is silent for now
        too; a replica lost at it is replaced, not retried. `limit` as in `call`.

        Replicas that are starting are left out: `prepare` brings them up to date. A caller that is
        cancelled ends the calls. Raises ObjectsLost, once all have answered, where an argument is
        gone.
        """

        async def one(replica: Replica, handle: ActorHandle) -> Any:
            lent = Lent(replica.name, handle, self._drop)
            try:
                return (await lent.call(method, *args, deadline_s=deadline_s, limit=limit))[0]
            except ReplicaLost as lost:
                self._lost(replica, lost.reason, lost.limit)
                return None

        live = self.replicas.reached
        named = live if only is None else [each for each in live if each.name in only]
        serving = [(replica, self._handles[replica]) for replica in named]
        answers = await asyncio.gather(*(one(*each) for each in serving), return_exceptions=True)
        for given in answers:
            if isinstance(given, BaseException):
                raise given
        return [given for given in answers if given is not None]

    async def close(self) -> None:
        """Stop every replica and whatever is still starting."""
        stopped = self.replicas.close()
        starting = list(self._starting)
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        for replica in stopped:
            self._stop(replica)
