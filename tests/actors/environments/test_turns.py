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
