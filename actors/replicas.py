"""Which replica of a role serves which call: states, slots, waiters, replacements. Pure.

Invariant: a slot is with one call or free, never lost and never given twice, whatever dies or is
cancelled meanwhile. Callers that wait are served in the order in which they came, and a freed slot
wakes exactly one of them. When no replica is left that could ever serve, all of them hear so. A
caller may ask for little company: its replica has no more calls than that while it is there.

    STARTING --> STALE --> READY <--> SUSPECT     any of them --> DEAD
                   ^         |            |       STALE runs, but has not got the current weights
                   +---------+------------+       SUSPECT finishes its calls and gets no new one

A DEAD replica never comes back: its replacement is another one, which is STARTING.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count

from actors.restarts import Restarts, pause

Offer = tuple[int, int, int, int, "Replica"]  # busy, calls, index, a number of its own, replica


class State(StrEnum):
    """Where a replica is. A slot is given out by a READY one only."""

    STARTING = "STARTING"
    STALE = "STALE"
    READY = "READY"
    SUSPECT = "SUSPECT"
    DEAD = "DEAD"


MOVES: dict[State, frozenset[State]] = {
    State.STARTING: frozenset({State.STALE, State.READY, State.DEAD}),
    State.STALE: frozenset({State.READY, State.DEAD}),
    State.READY: frozenset({State.STALE, State.SUSPECT, State.DEAD}),
    State.SUSPECT: frozenset({State.STALE, State.READY, State.DEAD}),
    State.DEAD: frozenset(),
}


@dataclass(eq=False)
class Replica:
    """One replica: the `index` of its place, and a name that no other replica ever has."""

    index: int
    name: str
    slots: int  # calls it takes at a time
    state: State = State.STARTING
    busy: int = 0  # calls it has now
    calls: int = 0  # calls it ever had
    company: int = 0  # calls it had when it was lost
    served: bool = False  # whether it was ever READY
    pause_s: float = 0.0  # before it is started
    failed_starts: int = 0  # at its place, one after the other before it
    shy: list[int] = field(default_factory=list)  # the company that its calls put up with

    @property
    def room(self) -> int:
        """Calls that it may have at a time, with those that it has."""
        return min(self.slots, *self.shy) if self.shy else self.slots


@dataclass(eq=False)
class Waiter:
    """A caller that asked for a slot. `settled` with a replica: it has one; without: never."""

    company: int | None = None  # calls that its replica may have meanwhile, its own too
    wake: Callable[[], None] | None = None  # called once, where it is settled after `ask`
    replica: Replica | None = None
    settled: bool = False


@dataclass
class Replicas:
    """The replicas of one role: `size` places that are filled again, and those grown beyond."""

    role: str
    size: int
    slots: int
    restarts: Restarts
    failure: str | None = None  # why the last replica was lost
    closed: bool = False
    woken: int = 0  # waiters that were settled after they had to wait
    _live: dict[int, Replica] = field(default_factory=dict)
    _empty: OrderedDict[int, int] = field(default_factory=OrderedDict)  # index: failed starts
    _free: list[Offer] = field(default_factory=list)  # a heap; see `_offer`
    _waiters: OrderedDict[Waiter, None] = field(default_factory=OrderedDict)
    _made: int = 0
    _offers: count[int] = field(default_factory=count)

    @property
    def live(self) -> list[Replica]:
        """Every replica that is not dead."""
        return list(self._live.values())

    @property
    def serving(self) -> list[Replica]:
        """The replicas that take calls now."""
        return [replica for replica in self._live.values() if replica.state is State.READY]

    @property
    def reached(self) -> list[Replica]:
        """The replicas that have the current weights, and get the next ones with each other."""
        states = (State.READY, State.SUSPECT)
        return [replica for replica in self._live.values() if replica.state in states]

    @property
    def hopeless(self) -> bool:
        """Whether nobody who waits will ever get a slot."""
        return self.closed or not self._live

    def begin(self, index: int) -> Replica:
        """A new replica at a place without one, STARTING."""
        if index in self._live:
            raise ValueError(f"{self.role} {index} is {self._live[index].state} and not free")
        replica = Replica(index, f"{self.role}-{index}.{self._made}", self.slots)
        self._made += 1
        self._live[index] = replica
        return replica

    def refill(self) -> list[Replica]:
        """New replicas at places that had to stay empty, as far as restarts have come back: the one
        that is empty for longest first."""
        new = []
        while self._empty and not self.closed and self.restarts.take():
            new.append(self._again(*self._empty.popitem(last=False)))
        return new

    def _again(self, index: int, failed_starts: int) -> Replica:
        """A new replica at a place where so many in a row have not even started."""
        replica = self.begin(index)
        replica.failed_starts, replica.pause_s = failed_starts, pause(failed_starts)
        return replica

    def grow(self, limit: int, room: Callable[[int], bool]) -> list[Replica]:
        """New replicas beyond the first `size`, `limit` in all, where `room(index)` has a place."""
        if self.closed:
            return []
        places = [index for index in range(self.size, limit) if index not in self._live]
        return [self.begin(index) for index in places if room(index)]

    def move(self, replica: Replica, to: State, slots: int | None = None) -> None:
        """A state that leaves it alive; `slots` lowers how many calls it takes.

        Raises ValueError where it may not go there: a dead one never comes back.
        """
        if to is State.DEAD or to not in MOVES[replica.state]:
            raise ValueError(f"{replica.name} is {replica.state} and cannot become {to}")
        replica.state = to
        replica.served |= to is State.READY
        if slots:
            replica.slots = min(self.slots, slots)
        self._offer(replica)
        self._hand_over()

    def lost(self, replica: Replica, reason: str) -> Replica | None:
        """A replica is dead; returns its replacement, where there may be one, to be brought up.

        One that is lost again and again uses up the restarts of the role, and one that does not
        even start is tried again after a pause. Where no restart is left its place stays empty, up
        to a `refill`. One that was grown is not replaced, but `grow` may fill its place again.
        """
        if replica.state is State.DEAD:
            return None
        replica.state = State.DEAD
        replica.company = replica.busy
        self.failure = reason
        del self._live[replica.index]
        new = None
        if replica.index < self.size:
            failed_starts = 0 if replica.served else replica.failed_starts + 1
            if self.restarts.take():
                new = self._again(replica.index, failed_starts)
            else:
                self._empty[replica.index] = failed_starts
        self._hand_over()
        return new

    def ask(self, company: int | None = None) -> Waiter:
        """Ask for a slot of the least loaded replica; see whether it is settled at once."""
        waiter = Waiter(company)
        self._waiters[waiter] = None
        self._hand_over()
        return waiter

    def give_up(self, waiter: Waiter) -> None:
        """A caller goes away: out of the queue, and the slot that it may just have got is free."""
        if waiter.replica is not None:
            self.release(waiter.replica, waiter.company)
        self._waiters.pop(waiter, None)

    def release(self, replica: Replica, company: int | None = None) -> None:
        """A call, that asked for this company, has ended; its slot goes to the first who waits."""
        if replica.busy == 0:
            raise ValueError(f"{replica.name} has no call that could end")
        replica.busy -= 1
        if company is not None:
            replica.shy.remove(company)
        self._offer(replica)
        self._hand_over()

    def close(self) -> list[Replica]:
        """The end of the role: nobody waits any more. Returns the replicas to stop."""
        self.closed = True
        stopped = self.live
        for replica in stopped:
            replica.state = State.DEAD
        self._live.clear()
        self._hand_over()
        return stopped

    def _offer(self, replica: Replica) -> None:
        """Put a replica that can take a call on the heap, as loaded as it is now.

        What the heap held of it before stays there and is passed over: its load is another. The
        heap is made anew before such offers outnumber the replicas.
        """
        if replica.state is not State.READY or replica.busy >= replica.room:
            return
        if len(self._free) > 2 * len(self._live) + 16:
            self._free = [offer for offer in self._free if _holds(offer)]
            heapq.heapify(self._free)
        number = next(self._offers)
        heapq.heappush(self._free, (replica.busy, replica.calls, replica.index, number, replica))

    def _least_loaded(self, company: int | None) -> Replica | None:
        """The replica for the next call, where there is one with no more than `company` then."""
        while self._free:
            offer = heapq.heappop(self._free)
            if not _holds(offer):
                continue
            if company is not None and offer[-1].busy >= company:
                heapq.heappush(self._free, offer)
                return None
            return offer[-1]
        return None

    def _hand_over(self) -> None:
        """Give free slots to those who wait, first come first served; or tell them all."""
        while self._waiters:
            waiter = next(iter(self._waiters))
            replica = self._least_loaded(waiter.company)
            if replica is None and not self.hopeless:
                return
            del self._waiters[waiter]
            waiter.settled, waiter.replica = True, replica
            if replica is not None:
                replica.busy += 1
                replica.calls += 1
                if waiter.company is not None:
                    replica.shy.append(waiter.company)
                self._offer(replica)
            if waiter.wake is not None:
                self.woken += 1
                waiter.wake()


def _holds(offer: Offer) -> bool:
    """Whether what the heap says of a replica is still so."""
    busy, calls, *_, replica = offer
    return (
        replica.state is State.READY
        and (replica.busy, replica.calls) == (busy, calls)
        and busy < replica.room
    )
