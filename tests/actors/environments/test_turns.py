"""The turns of a group's episodes: which are asked together, and that none is left waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from actors.engines.base import Turn
from actors.environments.turns import Turns
from actors.messages import Completion, FinishReason, GroupSampling, Segment, VersionSpan


class Replica:
    """Answers whatever it is asked, and notes what was asked together."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    async def __call__(self, handle: Any, name: str, turns: Sequence[Turn]) -> list[Completion]:
        self.asked.append([turn.key.split("/", 2)[2] for turn in turns])
        answer = Segment((1,), (-1.0,), (VersionSpan(0, 1),))
        return [Completion((answer,), FinishReason.STOP) for _ in turns]


@pytest.mark.parametrize("lockstep", [True, False])
def test_turns_that_one_episode_asks_beside_each_other_are_answered(lockstep: bool) -> None:
    """An agent may have several requests under way; its sibling takes no turn at all."""
    replica = Replica()

    async def play() -> None:
        turns = Turns(GroupSampling(8, 1.0, 2, 7, 3), lockstep, replica)
        turns.use(None, "rollout-0")
        turns.begin(0)
        turns.begin(1)
        sample = turns.sampler(0)
        three = asyncio.gather(*(sample([5], 8, number) for number in range(3)))
        await asyncio.sleep(0)
        turns.end(1)
        await three
        await turns.close()

    asyncio.run(asyncio.wait_for(play(), 20))
    assert sorted(sum(replica.asked, [])) == ["0/0", "0/1", "0/2"]  # noqa: RUF017 - three


class Held:
    """Answers when it is let; knows what is under way and what was ended before its answer."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.under_way: list[list[str]] = []
        self.most = 0
        self.asked: list[list[str]] = []
        self.ended: list[list[str]] = []

    async def __call__(self, handle: Any, name: str, turns: Sequence[Turn]) -> list[Completion]:
        places = [turn.key.split("/", 2)[2] for turn in turns]
        self.asked.append(places)
        self.under_way.append(places)
        self.most = max(self.most, len(self.under_way))
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.ended.append(places)
            raise
        finally:
            self.under_way.remove(places)
        answer = Segment((1,), (-1.0,), (VersionSpan(0, 1),))
        return [Completion((answer,), FinishReason.STOP) for _ in turns]

    async def has(self, calls: int) -> None:
        """Wait until so many are under way."""
        while len(self.under_way) != calls:  # noqa: ASYNC110 - of tasks of this loop
            await asyncio.sleep(0)


def turns_of(replica: Any, lockstep: bool, rollouts: int) -> Turns:
    turns = Turns(GroupSampling(8, 1.0, rollouts, 7, 3), lockstep, replica)
    turns.use(None, "rollout-0")
    for rollout in range(rollouts):
        turns.begin(rollout)
    return turns


@pytest.mark.parametrize("lockstep", [True, False])
def test_a_group_has_no_more_calls_under_way_than_rollouts(lockstep: bool) -> None:
    """However many requests an agent sends side by side: a replica has room for so many."""
    replica = Held()

    async def play() -> None:
        turns = turns_of(replica, lockstep, 3)
        turns.end(1)
        turns.end(2)
        asked = [asyncio.ensure_future(turns.sampler(0)([5], 8, number)) for number in range(9)]
        await replica.has(3)
        replica.go_on.set()
        await asyncio.gather(*asked)
        await turns.close()

    asyncio.run(asyncio.wait_for(play(), 20))
    assert replica.most == 3
    assert sorted(sum(replica.asked, [])) == [f"0/{number}" for number in range(9)]  # noqa: RUF017


def test_what_an_episode_has_left_is_ended_and_makes_room() -> None:
    """An agent that returns amid its requests: one that has not been sent is asked of nobody."""
    replica = Held()

    async def play() -> None:
        turns = turns_of(replica, False, 2)
        left = [asyncio.ensure_future(turns.sampler(0)([5], 8, number)) for number in range(3)]
        await replica.has(2)
        sibling = asyncio.ensure_future(turns.sampler(1)([5], 8, 0))
        for request in left:
            request.cancel()
        turns.end(0)
        while replica.under_way != [["1/0"]]:  # noqa: ASYNC110 - of tasks of this loop
            await asyncio.sleep(0)
        replica.go_on.set()
        await sibling
        await turns.close()

    asyncio.run(asyncio.wait_for(play(), 20))
    assert replica.asked == [["0/0"], ["0/1"], ["1/0"]]
    assert replica.ended == [["0/0"], ["0/1"]]


def test_a_call_that_a_sibling_waits_for_is_not_ended() -> None:
    replica = Held()

    async def play() -> None:
        turns = turns_of(replica, True, 2)
        both = [asyncio.ensure_future(turns.sampler(rollout)([5], 8, 0)) for rollout in (0, 1)]
        await replica.has(1)
        both[0].cancel()
        turns.end(0)
        replica.go_on.set()
        await both[1]
        await turns.close()

    asyncio.run(asyncio.wait_for(play(), 20))
    assert (replica.asked, replica.ended) == ([["0/0", "1/0"]], [])


def test_a_turn_that_an_episode_asks_otherwise_when_it_is_begun_anew_is_ended() -> None:
    replica = Held()

    async def play() -> None:
        turns = turns_of(replica, False, 1)
        asked = asyncio.ensure_future(turns.sampler(0)([5], 8, 0))
        await replica.has(1)
        asked.cancel()
        turns.begin(0)
        again = asyncio.ensure_future(turns.sampler(0)([6], 8, 0))
        while len(replica.asked) < 2:  # noqa: ASYNC110 - of tasks of this loop
            await asyncio.sleep(0)
        replica.go_on.set()
        await again
        await turns.close()

    asyncio.run(asyncio.wait_for(play(), 20))
    assert replica.ended == [["0/0"]]
