"""THE loop: take a batch, train on it, serve the new weights.

                 +------------------- room for more ---------------------+
                 v                                                       |
    prompts -> Pipeline (many groups at once) -> ready -> a batch -> the ranks train -> serve
                 ^   roll out, score, filter,                            |                |
                 |   reference log-probs                                 v                v
                 +------ undone groups <-- restore <-- policy lost   TRAINED       Evaluation

    part            waits for                                      is woken by
    Pipeline.fill   room: staleness, and steps still to come       a step that ends, a group that
                                                                   ends untrained
    a group's life  a free replica of each role in turn            the replica set
    _next_batch     enough READY groups                            `changed`: a group's end, a stop,
                                                                   weights lost with their node
    _train          policy and critic ranks                        their answers, a deadline
    _serve          the evaluation of the version before, then     its end, or a stop; the replicas'
                    the rollout replicas                           answers, a deadline
    Evaluation      free replicas, beside the next step            the replica set

One loop for every staleness: with `max_staleness` 0 a step's groups are admitted when the step
before has ended, with more they are rolled out while the policy trains. `version` is the number of
steps trained; weights of version v come from step v.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from actors import timeline as timelines
from actors.timeline import Timeline, spanned
from actors.waiting import all_of
from aligntune.config.online import RunConfig
from aligntune.errors import Interrupted, RunFailed
from aligntune.online.evaluation import Evaluation
from aligntune.online.figures import ACTIVITIES, StepFigures
from aligntune.online.groups import ReadyGroup, check_age, group_works
from aligntune.online.keeper import Boundary, Keeper
from aligntune.online.learner import Learner, PolicyLost
from aligntune.online.ledger import Books, Ledger, State
from aligntune.online.pipeline import Pipeline
from aligntune.online.recorder import OnlineRecorder
from aligntune.online.samples import sample_rows, texts_of
from aligntune.online.serving import Serving
from aligntune.online.staleness import choose_batch
from aligntune.online.state import RunState
from aligntune.online.weights import WeightSync
from aligntune.runs.checkpoint import Checkpoint
from aligntune.tracking.metrics import EventKind

T = TypeVar("T")


class Controller:
    """Runs one job to its last step. `assemble` makes one with all its parts."""

    def __init__(
        self,
        config: RunConfig,
        state: RunState,
        total_steps: int,
        *,
        ledger: Ledger,
        learner: Learner,
        serving: Serving,
        weights: WeightSync,
        pipeline: Pipeline,
        evaluation: Evaluation,
        keeper: Keeper,
        recorder: OnlineRecorder,
        timeline: Timeline,
        changed: asyncio.Event,
    ) -> None:
        self.config = config
        self.state = state
        self.total_steps = total_steps
        self.ledger = ledger
        self._learner = learner
        self._serving = serving
        self._weights = weights
        self._pipeline = pipeline
        self._evaluation = evaluation
        self._keeper = keeper
        self._recorder = recorder
        self._timeline = timeline
        self._changed = changed
        self._stop = asyncio.Event()
        self._policy_restarts = 0
        self._seen = ledger.books  # at the last step's end
        self._boundary = Boundary(0, Ledger.beginning(), config.algorithm)

    def stop(self, signal: int) -> None:
        """Ask the loop to checkpoint and end; safe from a signal handler of the event loop."""
        self.state.signal = signal
        self._stop.set()
        self._changed.set()

    @property
    def books(self) -> Books:
        """The ledger's balance."""
        return self.ledger.books

    async def run(self, checkpoint: Checkpoint | None) -> dict[str, float]:
        """Train to the last step; returns its figures, those of its evaluation included.

        Raises Interrupted, RunFailed, ...
        """
        started = False
        timelines.current.set(self._timeline)
        try:
            await self._unless_stopped(self._start_roles())
            await self._restore(checkpoint, forget_after=checkpoint.step if checkpoint else -1)
            started = True
            if checkpoint:
                self._recorder.event(EventKind.RESUMED, step=checkpoint.step)
            while True:
                try:
                    while self.state.version < self.total_steps:
                        await self._step()
                    await self._finish()
                    return self._recorder.last
                except PolicyLost as lost:
                    await self._rebuild_policy(str(lost))
        except Interrupted:
            await self._pipeline.cancel()
            if started:
                await self._keeper.checkpoint(self._boundary)
                await self._evaluation.stop(self.state.version)
                await self._keeper.settled()
            raise
        finally:
            await self._close()

    # A step

    async def _step(self) -> None:
        timelines.about.set(f"step {self.state.version + 1}")
        figures = StepFigures(self.config, self.state.version)
        with spanned("controller", "wait for a batch"):
            groups = await self._next_batch()
        shown = groups[: self.config.tracking.samples_per_step]
        texts = asyncio.create_task(texts_of(shown))  # beside the update
        with spanned("controller", "train"):
            advantages = await self._train(groups, figures)
        with spanned("controller", "serve"):
            await self._serve()
        self._mark(groups, figures)
        rows = sample_rows(self.config, shown, await texts, advantages)
        self._recorder.samples(self.state.version, rows)
        if self.state.version % self.config.checkpoint.every_steps == 0:
            with spanned("controller", "checkpoint"):
                await self._keeper.checkpoint(self._boundary)

    async def _next_batch(self) -> list[ReadyGroup]:
        """The next step's groups. Raises RunFailed when they do not come in time."""
        train, version = self.config.train, self.state.version
        deadline = time.monotonic() + train.step_timeout_s
        while True:
            self._changed.clear()
            if self._stop.is_set():
                raise Interrupted(self.state.signal)
            self._pipeline.raise_failure()
            if self._weights.lost is not None:
                raise PolicyLost(self._weights.lost)
            self._pipeline.fill()
            batch = choose_batch(
                self.ledger.cohorts(), version, train.max_staleness, train.groups_per_step
            )
            if batch is not None:
                return [self._pipeline.ready[group_id] for group_id in batch]
            self._pipeline.check_sampling(self._seen.filtered)
            try:
                await asyncio.wait_for(self._changed.wait(), deadline - time.monotonic())
            except TimeoutError as error:
                states = self.ledger.states().items()
                waiting = ", ".join(f"{count} {state}" for state, count in states)
                raise RunFailed(
                    f"step {version + 1} had no batch within train.step_timeout_s="
                    f"{train.step_timeout_s:g} s; open groups: {waiting}"
                ) from error

    async def _train(
        self, groups: Sequence[ReadyGroup], figures: StepFigures
    ) -> list[tuple[float, ...]]:
        """One step of policy and critic; the advantages of each group's completions."""
        step, algorithm = self.state.version + 1, self.state.algorithm
        check_age(groups, self.state.version, self.config.train.max_staleness)
        batch = [group.record.group_id for group in groups]
        self.ledger.move(batch, State.TRAINING, step=step)
        works = group_works(self.config, algorithm, groups)
        advantages = [work.advantages for work in works]
        if algorithm.prepares:
            works, figures.prepared = await self._learner.prepare(step, algorithm, works)
        result = await self._learner.update(step, algorithm, works)
        figures.updated = result.metrics
        self.state.version = step
        self._pipeline.trained(batch, step)
        return advantages

    async def _serve(self) -> None:
        """Have all rollout replicas serve the current version, once that before it is evaluated.

        Where the run is stopped meanwhile, no replica needs new weights any more.
        """
        try:
            await self._unless_stopped(self._evaluation.ended())
        except Interrupted:
            return
        await self._weights.bring(self.state.version, self._serving.rollouts)
        self.state.served = self.state.version
        self._serving.grow()
        self._pipeline.fill()
        self._evaluation.begin(self.state.version)

    def _mark(self, groups: Sequence[ReadyGroup], figures: StepFigures) -> None:
        """The end of a step: its figures, the algorithm of the next one, and what a checkpoint of
        it keeps. Nothing may happen in between, so nothing here waits."""
        step, now, before = self.state.version, self.ledger.books, self._seen
        figures.filtered = now.filtered - before.filtered
        figures.quarantined = now.quarantined - before.quarantined
        row = figures.row(groups, self._timeline.take(ACTIVITIES))
        completions = sum(len(group.record.finish_reasons) for group in groups)
        self.state.algorithm = self.state.algorithm.after_step(row, completions)
        self._recorder.step(step, row)
        self._seen = now
        self._boundary = Boundary(step, self.ledger.snapshot(step), self.state.algorithm)

    # Starting, going back and ending

    async def _start_roles(self) -> None:
        ranks, _ = await all_of(self._learner.start(), self._serving.start())
        for name, info in ranks:
            self._recorder.role(name, info)
        await self._keeper.check_sight()

    async def _restore(self, checkpoint: Checkpoint | None, forget_after: int) -> None:
        """Make policy, rollout weights, ledger and files what they were at a checkpoint.

        None is the beginning. Open groups start last: nothing is rolled out under other weights.
        """
        self.state.version = checkpoint.step if checkpoint else 0
        self.state.algorithm, snapshot = self.config.algorithm, Ledger.beginning()
        if checkpoint:
            await self._learner.load(checkpoint.path)
            self.state.algorithm = self.config.algorithm.carried_on(checkpoint.state["algorithm"])
            snapshot = checkpoint.state["ledger"]
        version = self.state.version
        if checkpoint or self._weights.synced:
            await self._weights.bring(version, self._serving.rollouts)
        self.state.served = version
        self._recorder.truncate_after(forget_after)
        open_groups = self.ledger.restore(snapshot, step=version, version=version)
        self._seen = self.ledger.books
        self._boundary = Boundary(version, snapshot, self.state.algorithm)
        for group_id in open_groups:
            self._pipeline.start(group_id)
        self._pipeline.fill()
        self._evaluation.begin(version)

    async def _rebuild_policy(self, reason: str) -> None:
        """A policy rank is lost: new ranks from the last checkpoint, groups since then again."""
        limit = self.config.policy.max_restarts
        while True:
            self._policy_restarts += 1
            self._learner.kill()
            await self._evaluation.cancel()
            await self._pipeline.cancel()
            if self._policy_restarts > limit:
                raise RunFailed(
                    f"the policy was lost {self._policy_restarts} times, more than "
                    f"policy.max_restarts={limit} allows; the last: {reason}"
                )
            checkpoint = await self._keeper.latest()
            step = checkpoint.step if checkpoint else 0
            self._recorder.event(
                EventKind.POLICY_REBUILT,
                reason=reason,
                from_version=self.state.version,
                to_version=step,
            )
            try:
                for name, info in await self._learner.start():
                    self._recorder.role(name, info)
                await self._restore(checkpoint, forget_after=step)
            except PolicyLost as again:
                reason = str(again)
                continue
            return

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, or drop it and raise Interrupted as soon as the run is asked to stop."""
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise Interrupted(self.state.signal)

    async def _finish(self) -> None:
        """Keep what was trained, while the last version is evaluated."""
        await self._pipeline.cancel()
        if self.config.checkpoint.at_end:
            await self._keeper.checkpoint(self._boundary)
        await self._keeper.export()
        await self._unless_stopped(self._evaluation.ended())
        await self._keeper.finish()

    async def _close(self) -> None:
        await self._evaluation.cancel()
        await self._pipeline.cancel()
        self._learner.kill()
        await self._serving.close()
        await self._keeper.close()
