"""Ranks that send: all of them together, and rank 0 beside that."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.specs import CriticSpec
from aligntune.online.ranks import PolicyLost, Ranks
from tests.aligntune.online.hands import Hand


class Rank:
    """Rank 0 sends until it is told to end."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.told = asyncio.Event()

    async def address(self) -> tuple[str, int]:
        return ("nowhere" if self.rank < 0 else "here"), 7000

    async def start(self, host: str, port: int) -> dict[str, Any]:
        if host == "nowhere":
            await asyncio.Event().wait()
        return {}

    async def send(self, what: str) -> str:
        if what == "end":
            self.told.set()
        elif self.rank == 0:
            await self.told.wait()
        return f"{self.rank} {what}"


def test_rank_0_hears_beside_what_all_ranks_do_together() -> None:
    async def run() -> None:
        spec = CriticSpec(strategy="deepspeed", ranks=2)
        ranks = Ranks(spec, lambda rank, name: Hand(Rank(rank)))  # type: ignore[arg-type,return-value]
        with pytest.raises(PolicyLost, match="critic ranks are not running"):
            await ranks.beside("send", "end", deadline_s=30)
        await ranks.start()
        sending = asyncio.create_task(ranks.each("send", [("a",), ("a",)], 30))
        assert await ranks.beside("send", "end", deadline_s=30) == "0 end"
        assert await sending == ["0 a", "1 a"]
        ranks.handles["critic-0"].kill()  # type: ignore[attr-defined]
        with pytest.raises(PolicyLost, match="critic-0"):
            await ranks.beside("send", "end", deadline_s=30)

    asyncio.run(run())


def test_ranks_that_send_for_longer_than_they_may_are_lost() -> None:
    async def run() -> None:
        ranks = Ranks(CriticSpec(), lambda rank, name: Hand(Rank(rank)))  # type: ignore[arg-type,return-value]
        await ranks.start()
        with pytest.raises(PolicyLost, match=r"send had no answer within 0\.05 s \(a\.limit\)"):
            await ranks.each("send", [("a",)], 0.05, "a.limit")

    asyncio.run(run())


@pytest.mark.parametrize("key", ["start_timeout_s", "update_timeout_s"])
def test_ranks_that_are_too_slow_are_lost_with_the_setting_of_their_deadline(key: str) -> None:
    async def run() -> None:
        first = -1 if key == "start_timeout_s" else 0
        spec = CriticSpec.model_validate({key: 0.05})
        ranks = Ranks(spec, lambda rank, name: Hand(Rank(rank + first)))  # type: ignore[arg-type,return-value]
        await ranks.start()
        await ranks.all("send", "a")

    with pytest.raises(PolicyLost, match=rf"had no answer within 0\.05 s \(critic\.{key}\)"):
        asyncio.run(run())
