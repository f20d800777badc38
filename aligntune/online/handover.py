"""Hands each new version of the weights to the rollouts, beside the next update where it may.

Invariant: one version is on its way at a time, and `served` follows when every replica has it. An
evaluation ends before newer weights come, and one that is due begins before the policy goes on.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from actors.supervise import RoleExhausted
from aligntune.config.online import RunConfig
from aligntune.errors import Interrupted, RunFailed
from aligntune.online.evaluation import Evaluation
from aligntune.online.learner import PolicyLost
from aligntune.online.pipeline import Pipeline
from aligntune.online.serving import Serving
from aligntune.online.state import RunState
from aligntune.online.stopping import Stopping
from aligntune.online.weights import WeightSync


class Handover:
    """Of one run; `changed` is set when it has come to an end, well or not."""

    def __init__(
        self,
        config: RunConfig,
        state: RunState,
        weights: WeightSync,
        serving: Serving,
        evaluation: Evaluation,
        pipeline: Pipeline,
        stopping: Stopping,
        changed: asyncio.Event,
    ) -> None:
        self._ahead = config.train.max_staleness > 0
        self._state = state
        self._weights = weights
        self._serving = serving
        self._evaluation = evaluation
        self._pipeline = pipeline
        self._stopping = stopping
        self._changed = changed
        self._task: asyncio.Task[None] | None = None
        self._loading = False  # replicas may be taking the weights

    async def give(self, version: int) -> None:
        """Have the rollouts serve the policy's weights, which are of `version`.

        Returns once the next update may begin: when the weights have left the policy, or when all
        replicas have them, where the next step takes no older tokens or `version` is to be
        evaluated. Raises PolicyLost, or what an evaluation raised, of the version before too.
        """
        await self.ended()
        left = asyncio.Event()
        if self._evaluation.due(version) or not self._ahead:
            await self._bring(version, left)
            return
        self._task = asyncio.create_task(self._bring(version, left), name=f"weights-{version}")
        self._task.add_done_callback(lambda _: left.set())
        self._task.add_done_callback(lambda _: self._changed.set())
        await left.wait()

    async def _bring(self, version: int, left: asyncio.Event) -> None:
        """Nothing may happen between the end of the load and what follows from it, up to the end
        of the step where the policy waited: so nothing there waits."""

        async def clear() -> None:
            await self.evaluated()
            self._loading = True

        try:
            await self._weights.bring(version, self._serving.rollouts, clear, left.set)
        except Interrupted:  # no replica needs new weights any more
            return
        finally:
            self._loading = False
        self._state.served = version
        self._serving.grow()
        self._pipeline.fill()
        self._evaluation.begin(version)

    async def evaluated(self) -> None:
        """Wait for the evaluation that runs, if any. Raises Interrupted, PolicyLost where its
        weights are gone, or what it raised."""
        if not self._evaluation.runs:  # a run that is to stop, and has no need to wait, goes on
            await self._evaluation.ended()
            return
        await self._stopping.unless(self._weights.unless_gone(self._evaluation.ended()))

    async def stands(self, version: int) -> bool:
        """Whether a checkpoint of `version` may stand: see `Evaluation.written`. A run that is to
        stop saves at once and finishes the evaluation after that: see `stop`."""
        if not self._evaluation.runs:
            return await self._evaluation.written(version)
        written = self._weights.unless_gone(self._evaluation.written(version))
        try:
            return await self._stopping.unless(written)
        except Interrupted:
            return True
        except PolicyLost:
            return False

    async def stop(self, version: int) -> None:
        """Before a run ends at `version`: see `Evaluation.stop`. Raises as `evaluated`."""
        await self._weights.unless_gone(self._evaluation.stop(version))

    def check(self) -> None:
        """Raises what the one that is over raised."""
        if self._task is not None and self._task.done():
            self._task.result()

    async def ended(self) -> None:
        """Wait for the one on its way, if any. Raises what it raised."""
        if self._task is not None:
            await asyncio.wait((self._task,))
            task, self._task = self._task, None
            task.result()

    async def over(self) -> None:
        """Wait for the one on its way, of a run that stops: that it failed is no matter any more,
        and `stop` tells it where it was an evaluation that did. Raises PolicyLost."""
        with suppress(RunFailed, RoleExhausted):
            await self.ended()

    async def drop(self) -> None:
        """Give up the one on its way. A load that has begun comes to its end, within its deadline,
        so that no replica takes it after others."""
        if self._task is not None:
            if not self._loading:
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
