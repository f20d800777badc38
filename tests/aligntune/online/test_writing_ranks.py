"""Ranks write their snapshots each for itself, and a checkpoint is of all of them or fails."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.specs import CriticSpec
from aligntune.online.ranks import PolicyLost, Ranks
from tests.aligntune.online.hands import Hand


class Rank:
    """One of two, whose disk may be full."""

    def __init__(self, rank: int, ended: list[int]) -> None:
        self.rank = rank
        self._ended = ended

    async def address(self) -> tuple[str, int]:
        return "here", 7000

    async def start(self, host: str, port: int) -> dict[str, Any]:
        return {}

    async def write(self, folder: str) -> None:
        if self.rank == 0:
            raise OSError(28, "No space left on device")
        await asyncio.sleep(0.05)
        (Path(folder) / "rank-1").write_text("written")
        self._ended.append(self.rank)


def test_where_one_disk_of_several_is_full_the_write_fails_when_the_others_have_ended(
    tmp_path: Path,
) -> None:
    """Or what they still write would be in the way of the next try."""
    ended: list[int] = []
    spec = CriticSpec(strategy="deepspeed", ranks=2)
    ranks = Ranks(spec, lambda rank, name: Hand(Rank(rank, ended)))  # type: ignore[arg-type,return-value]

    async def run() -> None:
        with pytest.raises(PolicyLost, match="critic ranks are not running"):
            await ranks.write(str(tmp_path))
        await ranks.start()
        with pytest.raises(OSError, match="No space left"):
            await ranks.write(str(tmp_path))
        assert ended == [1]
        ranks.handles["critic-1"].kill()  # type: ignore[attr-defined]
        with pytest.raises(PolicyLost, match="critic-1"):
            await ranks.write(str(tmp_path))

    asyncio.run(run())
