"""Many episodes at once: none waits for the tool of another."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from actors.environments.base import Episode
from actors.environments.specs import EpisodeCode
from actors.environments.tool_episodes import ToolEpisodes
from actors.specs import ModelSpec
from tests.actors.environments.chat import LIMITS, Script, call_text, prompt_of

EPISODES = 256


@pytest.mark.slow
def test_256_episodes_are_as_fast_as_the_slowest_chain(
    chat_model: ModelSpec, user_folder: Path, tokenizer: Any, loop: Any, tmp_path: Path
) -> None:
    """By order of events: no tool ends before all have begun, and then all chains of naps but one
    end while that one's tool is still under way."""
    code = EpisodeCode(("user_tools:wait_at", "user_tools:nap"), search_path=(str(user_folder),))
    rng = random.Random(0)
    first, second, log = tmp_path / "first", tmp_path / "second", tmp_path / "log"
    for gate in (first, second):
        os.mkfifo(gate)

    def begun(name: int) -> str:
        return call_text("wait_at", gate=str(first), log=str(log), name=str(name))

    def naps(name: int) -> list[str]:
        chain = [call_text("nap", seconds=rng.uniform(0, 0.2)) for _ in range(rng.randint(1, 3))]
        return [begun(name), *chain, "done"]

    def all_have_begun() -> bool:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= EPISODES:
                return True
            time.sleep(0.05)
        return False

    async def body() -> list[Episode]:
        episodes = ToolEpisodes(code, LIMITS, chat_model, None)
        try:
            late = call_text("wait_at", gate=str(second), log=str(log), name="late")
            slowest = Script(tokenizer, [begun(0), late, "done"])
            policies = [Script(tokenizer, naps(name)) for name in range(1, EPISODES)]
            tasks = [
                asyncio.create_task(episodes.run(prompt_of("hi"), 0, 1, policy))
                for policy in (slowest, *policies)
            ]
            assert await asyncio.to_thread(all_have_begun)
            assert not any(len(policy.seen) > 1 for policy in (slowest, *policies))
            await asyncio.to_thread(lambda: first.open("w").close())
            await asyncio.gather(*tasks[1:])
            await slowest.turn(1)
            assert not tasks[0].done()
            await asyncio.to_thread(lambda: second.open("w").close())
            return [await task for task in tasks]
        finally:
            await episodes.close()

    ended = loop(body())
    assert [episode.messages[-1]["content"] for episode in ended] == ["done"] * EPISODES
    assert sum(episode.figures.tools_failed for episode in ended) == 0
