"""Starts the ranks of policy and critic, and starts them again where one is lost.

Invariant: a run that gets no further ends, however long each try takes.
"""

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
        self._failures = 0  # since the run got further than ever
        self._furthest = 0  # the step that it got to

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

        Raises RunFailed where that was too often, within an hour or at the same place, Interrupted
        where the run is asked to stop.
        """
        self._learner.kill()
        self._recorder.event(EventKind.POLICY_LOST, reason=reason)
        limit = self._restarts.limit
        if self._failures >= limit:
            raise RunFailed(
                f"the policy was lost {self._failures + 1} times and the run got no further than "
                f"step {self._furthest}: policy.max_restarts={limit} allows no more; the last: "
                f"{reason}"
            )
        if not self._restarts.take():
            raise RunFailed(
                f"the policy was lost {limit + 1} times, more than policy.max_restarts={limit} "
                f"allows an hour; the last: {reason}"
            )
        await self._stopping.unless(asyncio.sleep(pause(self._failures)))
        self._failures += 1

    def reached(self, step: int) -> None:
        """The run is at `step`: where it has never been as far, the next loss is the first one."""
        if step > self._furthest:
            self._furthest, self._failures = step, 0
