"""A turn of an episode that nobody waits for, between two Ray actors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray

from actors.environment import EnvironmentActor
from actors.environments.specs import EpisodeCode, EpisodesSpec
from actors.specs import ModelSpec
from tests.actors.environments.chat import LIMITS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


class Rollout:
    """Samples for ever."""

    def __init__(self) -> None:
        self.under_way = 0

    async def sample(self, turns: Any) -> None:
        self.under_way += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.under_way -= 1

    async def sampling(self) -> int:
        return self.under_way


class Environment(EnvironmentActor):
    def __init__(self) -> None:
        given = (ModelSpec(name="m"), EpisodesSpec(), EpisodeCode(), LIMITS, "environment-0")
        super().__init__(*given, 60.0, False)

    async def leave(self, rollout: Any) -> None:
        """Ask for a turn, and leave."""

        async def until(calls: int) -> None:
            async with asyncio.timeout(60):
                while await rollout.sampling.remote() != calls:
                    pass

        asked = asyncio.create_task(self._ask(rollout, "rollout-0", ()))
        await until(1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await until(0)


def test_a_turn_that_nobody_waits_for_any_more_ends_at_the_rollout_replica() -> None:
    rollout, environment = (
        ray.remote(kind).options(num_cpus=0.1, max_concurrency=8).remote()
        for kind in (Rollout, Environment)
    )
    try:
        ray.get(environment.leave.remote(rollout), timeout=180)
    finally:
        for handle in (rollout, environment):
            ray.kill(handle)
