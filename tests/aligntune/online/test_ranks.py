"""Ranks of a trained model on real Ray actors: they start together and are lost together."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle

from actors import together
from actors.specs import CriticSpec
from aligntune.online.ranks import PolicyLost, Ranks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


class Rank:
    def __init__(self, rank: int) -> None:
        self.rank = rank

    async def address(self) -> tuple[str, int]:
        return "here", 7000 + self.rank

    async def start(self, host: str, port: int) -> dict[str, Any]:
        return {"met": (host, port)}

    async def pid(self) -> int:
        return os.getpid()

    async def work(self, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return self.rank

    async def pieces(self, count: int) -> Any:
        return (self.rank, *range(count)) if count else self.rank


def make(rank: int, name: str) -> ActorHandle:
    return ray.remote(Rank).options(num_cpus=0.1, max_restarts=0, max_concurrency=4).remote(rank)


def two() -> Ranks:
    return Ranks(CriticSpec(strategy="deepspeed", ranks=2), make)


def test_ranks_meet_at_the_first_and_each_call_may_have_arguments_and_objects_of_its_own() -> None:
    async def run() -> None:
        ranks = two()
        with pytest.raises(PolicyLost, match="critic ranks are not running"):
            await ranks.all("pid")
        started = await ranks.start()
        assert started == [(f"critic-{rank}", {"met": ("here", 7000)}) for rank in range(2)]
        assert await ranks.each("work", [(0.0,), (0.01,)]) == [0, 1]
        answers, objects = ranks.begin("pieces", [(0,), (2,)], [0, 2])
        assert await answers == [0, 1]
        assert [ray.get(own) for own in objects] == [[], [0, 1]]
        ranks.kill()
        with pytest.raises(PolicyLost, match="critic ranks are not running"):
            await ranks.all("pid")

    asyncio.run(run())


def test_a_rank_that_dies_loses_the_call_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "PEER_SECONDS", 0.5)  # the other rank is asleep

    async def run() -> None:
        ranks = two()
        await ranks.start()
        pids = await ranks.all("pid")
        work = asyncio.create_task(ranks.all("work", 60))
        await asyncio.sleep(0)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(PolicyLost, match="critic-1"):
            await work
        ranks.kill()

    asyncio.run(run())
