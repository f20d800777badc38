"""Starts the ranks of policy and critic, and starts them again where one is lost."""

from __future__ import annotations

import asyncio

from actors.restarts import Restarts, pause
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed
from aligntune.online.keeper import Keeper
from aligntune.online.learner import Learner, PolicyLost
from aligntune.online.recorder import OnlineRecorder
from aligntune.online.stopping import Stopping
from aligntune.tracking.metrics import EventKind


class RankStarts:
    """Of one run; what they load is the caller's."""

    def __init__(
        self,
        config: RunConfig,
        learner: Learner,
        keeper: Keeper,
        recorder: OnlineRecorder,
        stopping: Stopping,
    ) -> None:
        self._learner = learner
        self._keeper = keeper
        self._recorder = recorder
        self._stopping = stopping
        self._restarts = Restarts(config.policy.max_restarts)
        self._failures = 0  # since a step was trained

    async def start(self) -> None:
        """Start all ranks, again where one is lost meanwhile; see `lost` for what it raises."""
        while True:
            try:
                for name, info in await self._learner.start():
                    self._recorder.role(name, info)
                await self._keeper.check_sight()
                return
            except PolicyLost as lost:
                await self.lost(str(lost))

    async def lost(self, reason: str) -> None:
        """A rank is lost: end the others, and wait until they may be started again.

        Raises RunFailed where that was too often, Interrupted where the run is asked to stop.
        """
        self._learner.kill()
        self._recorder.event(EventKind.POLICY_LOST, reason=reason)
        limit = self._restarts.limit
        if not self._restarts.take():
            raise RunFailed(
                f"the policy was lost {limit + 1} times, more than policy.max_restarts={limit} "
                f"allows an hour; the last: {reason}"
            )
        await self._stopping.unless(asyncio.sleep(pause(self._failures)))
        self._failures += 1

    def trained(self) -> None:
        """A step was: the next loss is the first one."""
        self._failures = 0
