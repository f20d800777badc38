"""Which replica serves which call, as a state machine: no Ray, no clock."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from actors.replicas import MOVES, Replica, Replicas, State, Waiter
from actors.restarts import Restarts


def ready(size: int, *, slots: int = 4, restarts: int = 3) -> Replicas:
    """A role whose replicas all serve."""
    replicas = Replicas("worker", size, slots, Restarts(restarts, now=lambda: 0.0))
    for index in range(size):
        replicas.move(replicas.begin(index), State.READY)
    return replicas


def served(waiter: Waiter) -> Replica:
    assert waiter.replica is not None
    return waiter.replica


def test_calls_go_to_the_least_loaded_replica_and_then_to_the_one_called_least() -> None:
    replicas = ready(3)
    got = [served(replicas.ask()) for _ in range(9)]
    assert [replica.index for replica in got] == [0, 1, 2] * 3
    replicas.release(got[1])
    assert served(replicas.ask()) is got[1]
    for replica in got:
        replicas.release(replica)
    assert served(replicas.ask()).index == 0
    assert served(replicas.ask()).index == 2, "1 has had one call more"


def test_a_freed_slot_wakes_the_first_who_waits_and_no_other() -> None:
    replicas = ready(1, slots=1)
    holder = served(replicas.ask())
    woken: list[int] = []
    waiters = []
    for place in range(1000):
        waiter = replicas.ask()
        assert not waiter.settled
        waiter.wake = lambda place=place: woken.append(place)
        waiters.append(waiter)
    for place, waiter in enumerate(waiters):
        replicas.release(holder)
        assert woken == list(range(place + 1))
        assert served(waiter) is holder
        assert holder.busy == 1
    assert replicas.woken == 1000


def test_a_waiter_that_goes_away_costs_those_behind_it_nothing() -> None:
    replicas = ready(1, slots=1)
    holder = served(replicas.ask())
    first, second, third = (replicas.ask() for _ in range(3))
    replicas.give_up(first)
    replicas.release(holder)
    assert not first.settled
    assert served(second) is holder
    replicas.give_up(second)  # cancelled when it had just been given its slot
    assert served(third) is holder
    assert holder.busy == 1


def test_a_replica_takes_no_more_calls_than_it_says() -> None:
    replicas = Replicas("worker", 2, 5, Restarts(0))
    for index, said in enumerate((2, 99)):
        replicas.move(replicas.begin(index), State.READY, said)
    got = [replicas.ask() for _ in range(8)]
    assert [waiter.settled for waiter in got] == [True] * 7 + [False]
    assert sorted(replica.busy for replica in replicas.live) == [2, 5]


@pytest.mark.parametrize("state", [State.STALE, State.SUSPECT])
def test_a_replica_that_is_stale_or_suspect_ends_its_calls_and_gets_no_new_one(
    state: State,
) -> None:
    replicas = ready(1, slots=2)
    holder = served(replicas.ask())
    replicas.move(holder, state)
    waiting = replicas.ask()
    assert not waiting.settled
    replicas.release(holder)
    assert not waiting.settled
    replicas.move(holder, State.READY)
    assert served(waiting) is holder


def test_a_caller_that_wants_little_company_gets_it_and_keeps_it() -> None:
    replicas = ready(1, slots=4)
    holder = served(replicas.ask())
    replicas.ask()
    alone, after = replicas.ask(1), replicas.ask()
    replicas.release(holder)
    assert not alone.settled, "one call is still there"
    replicas.release(holder)
    assert served(alone) is holder
    assert not after.settled, "none joins it, though three slots are free"
    replicas.release(holder, 1)
    assert served(after) is holder


def test_one_that_does_not_start_is_tried_again_after_ever_longer_pauses() -> None:
    replicas = Replicas("worker", 1, 1, Restarts(10, now=lambda: 0.0))
    replica, pauses = replicas.begin(0), []
    while (new := replicas.lost(replica, "out of memory")) is not None:
        pauses.append(new.pause_s)
        replica = new
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]

    replicas = ready(1)
    (replica,) = replicas.live
    new = replicas.lost(replica, "killed")
    assert new is not None
    assert new.pause_s == 0, "what has served is replaced at once"


def test_restarts_that_were_taken_come_back_with_time() -> None:
    now = 0.0
    restarts = Restarts(3, now=lambda: now)
    assert [restarts.take() for _ in range(4)] == [True, True, True, False]
    now = 1199.0
    assert not restarts.take()
    now = 1200.0
    assert restarts.take()
    assert not restarts.take()
    now = 1e6
    assert restarts.left == 3, "and never are more than the limit"


def test_a_lost_replica_is_replaced_under_another_name_while_restarts_are_left() -> None:
    replicas = ready(2, restarts=2)
    names = [replica.name for replica in replicas.live]
    first, second = replicas.live
    new = replicas.lost(first, "died")
    assert new is not None
    assert (new.index, new.state) == (0, State.STARTING)
    assert replicas.lost(first, "died, and another saw it") is None
    assert replicas.restarts.left == 1, "one loss is one loss, whoever saw it"
    assert replicas.serving == [second]
    again = replicas.lost(new, "its start failed")
    assert again is not None
    assert again.name not in [*names, new.name]
    assert replicas.lost(again, "its start failed") is None
    assert replicas.live == [second]
    assert not replicas.hopeless


def test_a_place_without_a_restart_is_filled_when_restarts_come_back() -> None:
    now = [0.0]
    replicas = Replicas("worker", 2, 1, Restarts(1, now=lambda: now[0]))
    assert replicas.refill() == [], "a place that never had a replica is not empty by a loss"
    for index in range(2):
        replicas.move(replicas.begin(index), State.READY)
    first, second = replicas.live
    again = replicas.lost(first, "died")
    assert again is not None
    assert replicas.lost(again, "its start failed") is None
    assert replicas.refill() == [], "no restart is left"
    now[0] = 3600.0
    (filled,) = replicas.refill()
    assert (filled.index, filled.state, filled.pause_s) == (0, State.STARTING, 1.0)
    assert replicas.refill() == [], "it is on its way"
    assert replicas.lost(second, "died") is None
    now[0] = 7200.0
    assert replicas.lost(filled, "its start failed") is not None, "a loss takes the restart"
    assert replicas.refill() == []
    now[0] = 10800.0
    (filled,) = replicas.refill()
    assert filled.index == 1
    replicas.lost(filled, "died")
    replicas.close()
    now[0] = 20000.0
    assert replicas.refill() == []


def test_those_who_wait_hear_when_nobody_will_ever_serve_and_not_before() -> None:
    replicas = ready(1, slots=1, restarts=1)
    holder = served(replicas.ask())
    waiting = [replicas.ask() for _ in range(3)]
    new = replicas.lost(holder, "died")
    assert new is not None
    assert not any(waiter.settled for waiter in waiting), "a replacement is on its way"
    replicas.lost(new, "its node left")
    assert all(waiter.settled and waiter.replica is None for waiter in waiting)
    assert replicas.failure == "its node left"
    late = replicas.ask()
    assert late.settled
    assert late.replica is None


def test_a_set_grows_beyond_its_size_where_there_is_room_and_replaces_none_of_those() -> None:
    replicas = ready(1)
    room = {1: True, 2: False, 3: True}
    (grown,) = replicas.grow(3, room.__getitem__)
    assert (grown.index, grown.state) == (1, State.STARTING)
    assert replicas.grow(3, room.__getitem__) == [], "it is on its way"
    replicas.move(grown, State.READY)
    assert replicas.lost(grown, "its node left") is None
    assert replicas.restarts.left == 3
    (again,) = replicas.grow(3, room.__getitem__)
    assert again.name != grown.name


def test_at_the_end_all_are_stopped_and_nobody_waits() -> None:
    replicas = ready(2, slots=1)
    held = [served(replicas.ask()) for _ in range(2)]
    waiting = replicas.ask()
    assert replicas.close() == held
    assert waiting.settled
    assert waiting.replica is None
    replicas.release(held[0])  # its call comes to its end
    assert replicas.lost(held[1], "killed") is None
    assert replicas.grow(9, lambda index: True) == []
    assert replicas.ask().settled


@given(state=st.sampled_from(list(State)), to=st.sampled_from(list(State)))
def test_a_replica_goes_only_where_it_may(state: State, to: State) -> None:
    replicas = Replicas("worker", 1, 1, Restarts(0))
    replica = replicas.begin(0)
    replica.state = state
    if to in MOVES[state] and to is not State.DEAD:
        replicas.move(replica, to)
        assert replica.state is to
    else:
        with pytest.raises(ValueError, match="cannot become"):
            replicas.move(replica, to)


def test_the_heap_of_free_slots_does_not_grow_with_the_calls() -> None:
    replicas = ready(4, slots=8)
    held = served(replicas.ask())
    for _ in range(2000):
        replicas.release(served(replicas.ask()))
    assert len(replicas._free) <= 2 * 4 + 17
    replicas.release(held)


class Histories(RuleBasedStateMachine):
    """Any order of calls, ends, losses, cancelled waits, growth and recovery."""

    @initialize(size=st.integers(1, 3), slots=st.integers(1, 3), restarts=st.integers(0, 4))
    def begin(self, size: int, slots: int, restarts: int) -> None:
        self.now, self.size = 0.0, size
        self.replicas = Replicas("worker", size, slots, Restarts(restarts, now=lambda: self.now))
        for index in range(size):
            self.replicas.begin(index)
        self.held: list[tuple[Replica, Waiter]] = []
        self.waiting: deque[Waiter] = deque()
        self.lost: list[Replica] = []

    def collect(self) -> None:
        """Whoever was settled leaves the queue, in the order in which it came."""
        while self.waiting and self.waiting[0].settled:
            waiter = self.waiting.popleft()
            if waiter.replica is not None:
                assert waiter.replica.busy <= (waiter.company or waiter.replica.slots)
                self.held.append((waiter.replica, waiter))
            else:
                assert self.replicas.hopeless

    @rule(company=st.none() | st.integers(1, 3))
    def ask(self, company: int | None) -> None:
        self.waiting.append(self.replicas.ask(company))
        self.collect()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        replica, waiter = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.replicas.release(replica, waiter.company)
        self.collect()

    @precondition(lambda self: self.waiting or self.held)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        """Somebody who waits, or who has a slot and does not know it yet, is cancelled."""
        place = data.draw(st.integers(0, len(self.waiting) + len(self.held) - 1))
        if place < len(self.waiting):
            waiter = self.waiting[place]
            del self.waiting[place]
        else:
            _, waiter = self.held.pop(place - len(self.waiting))
        self.replicas.give_up(waiter)
        self.collect()

    @precondition(lambda self: self.replicas.live)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(self.replicas.live))
        to = sorted(MOVES[replica.state] - {State.DEAD})
        self.replicas.move(replica, data.draw(st.sampled_from(to)), data.draw(st.integers(0, 4)))
        self.collect()

    @precondition(lambda self: self.replicas.live)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(self.replicas.live))
        left = self.replicas.restarts.left
        new = self.replicas.lost(replica, "died")
        replaced = replica.index < self.size and left > 0
        assert (new is not None) is replaced
        assert self.replicas.restarts.left == left - replaced
        self.lost.append(replica)
        self.collect()

    @rule(limit=st.integers(0, 5))
    def grow(self, limit: int) -> None:
        grown = self.replicas.grow(limit, lambda index: True)
        assert all(self.size <= replica.index < limit for replica in grown)

    @rule(seconds=st.sampled_from([0.0, 900.0, 3600.0]))
    def refill(self, seconds: float) -> None:
        self.now += seconds
        places = {replica.index for replica in self.replicas.live}
        left = self.replicas.restarts.left
        filled = self.replicas.refill()
        empty = 0 if self.replicas.closed else self.size - len(places & {*range(self.size)})
        assert len(filled) == min(left, empty)
        assert all(replica.index < self.size for replica in filled)

    @rule()
    def close(self) -> None:
        self.replicas.close()
        self.collect()
        assert not self.waiting

    @invariant()
    def no_slot_is_lost_or_given_twice(self) -> None:
        every = {*self.replicas.live, *self.lost, *(replica for replica, _ in self.held)}
        for replica in every:
            assert replica.busy == sum(holder is replica for holder, _ in self.held)
        for replica in self.replicas.live:
            assert replica.slots <= self.replicas.slots
            asked = [w.company for holder, w in self.held if holder is replica and w.company]
            assert sorted(replica.shy) == sorted(asked)

    @invariant()
    def none_waits_beside_a_free_slot_or_for_ever_and_all_are_served_in_order(self) -> None:
        assert not any(waiter.settled for waiter in self.waiting)
        if self.waiting:
            assert not self.replicas.hopeless
            most = self.waiting[0].company
            assert all(
                replica.busy >= min(replica.room, most or replica.room)
                for replica in self.replicas.serving
            )


@pytest.mark.slow
def test_no_slot_is_lost_or_given_twice_and_all_are_served_in_order_whatever_happens() -> None:
    run_state_machine_as_test(
        Histories, settings=settings(max_examples=150, stateful_step_count=40)
    )
