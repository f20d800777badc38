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
    Handover.give   the weights of the version before, and the     the replicas' answers, a deadline
                    export of these; the rest where the bound is 0
    Handover        the evaluation of the version before, then     its end, or a stop; the replicas'
                    the rollout replicas                           answers, a deadline
    Evaluation      free replicas, beside the next step            the replica set

One loop for every staleness: with `max_staleness` 0 a step's groups are admitted when the step
before has ended, with more they are rolled out, and weights are loaded, while the policy trains.
`version` is the number of steps trained; weights of version v come from step v.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence

from actors import timeline as timelines
from actors.fetching import ArraysLost
from actors.timeline import Timeline, spanned
from actors.waiting import all_of
from aligntune.config.online import RunConfig
from aligntune.errors import Interrupted, RunFailed
from aligntune.online.evaluation import Evaluation
from aligntune.online.figures import BUSY, StepFigures
from aligntune.online.groups import ReadyGroup, check_age, group_works
from aligntune.online.handover import Handover
from aligntune.online.keeper import Boundary, Keeper
from aligntune.online.learner import Learner, PolicyLost
from aligntune.online.ledger import Books, Ledger, State
from aligntune.online.pipeline import Pipeline
from aligntune.online.rank_starts import RankStarts
from aligntune.online.recorder import OnlineRecorder
from aligntune.online.samples import sample_rows, texts_of
from aligntune.online.serving import Serving
from aligntune.online.staleness import choose_batch
from aligntune.online.state import RunState
from aligntune.online.stopping import Stopping
from aligntune.online.watch import Watch
from aligntune.online.weights import WeightSync
from aligntune.runs.checkpoint import Checkpoint
from aligntune.tracking.metrics import EventKind


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
        watch: Watch,
        stopping: Stopping,
        starts: RankStarts,
        handover: Handover,
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
        self._watch = watch
        self._changed = changed
        self._stopping = stopping
        self._starts = starts
        self._handover = handover
        self._begun = False  # the run has come to where it starts from
        self._sound = False  # the ranks are of the step of `_boundary`
        self._seen = ledger.books  # at the last step's end
        self._boundary = Boundary(0, Ledger.beginning(), config.algorithm)

    def stop(self, signal: int, reason: str | None = None) -> None:
        """Ask the loop to checkpoint and end; safe from a signal handler of the event loop."""
        self._stopping.ask(signal, reason)

    @property
    def books(self) -> Books:
        """The ledger's balance."""
        return self.ledger.books

    async def run(self, checkpoint: Checkpoint | None) -> dict[str, float]:
        """Train to the last step; returns its figures with those of its evaluation. Raises
        Interrupted, RunFailed, ..."""
        return await self._watch.over(self._run(checkpoint), self.stop)

    async def _run(self, checkpoint: Checkpoint | None) -> dict[str, float]:
        timelines.current.set(self._timeline)
        try:
            self._starts.reached(checkpoint.step if checkpoint else 0)
            await self._stopping.unless(all_of(self._starts.start(), self._serving.start()))
            lost: str | None = None
            while True:
                try:
                    if lost is not None:
                        await self._rebuild_policy(lost)
                    elif not self._begun:
                        await self._restore(checkpoint)
                    while self.state.version < self.total_steps:
                        await self._step()
                    await self._finish()
                    return self._recorder.last
                except PolicyLost as error:
                    self._sound = False  # what is left of the ranks may be amid a step
                    self._learner.kill()
                    self._stopping.check()
                    lost = str(error)
        except Interrupted:
            await self._pipeline.cancel()
            await self._keep_last()
            raise
        finally:
            await self._close()

    async def _keep_last(self) -> None:
        """What a run that was stopped may yet keep: its last step, where the ranks are there to
        write it, and the evaluation of a version before, whatever becomes of the ranks."""
        try:
            if self._sound:
                await self._unless_lost(self._keeper.last(self._boundary))
                await self._unless_lost(self._handover.over())
            await self._unless_lost(self._handover.stop(self.state.version))
        finally:
            await self._keeper.settled()

    async def _unless_lost(self, work: Awaitable[None]) -> None:
        """Await `work`; that the policy is lost amid it is told, and that is all."""
        try:
            await work
        except PolicyLost as lost:
            self._recorder.event(EventKind.POLICY_LOST, reason=str(lost))

    # A step

    async def _step(self) -> None:
        timelines.about.set(f"step {self.state.version + 1}")
        figures = StepFigures(self.config, self.state.version)
        self._timeline.take({})  # of what went on before the step it has no figure
        with spanned("controller", "wait for a batch"):
            groups = await self._next_batch()
        shown = groups[: self.config.tracking.samples_per_step]
        texts = asyncio.create_task(texts_of(shown))  # beside the update
        with spanned("controller", "train"):
            try:
                advantages = await self._train(groups, figures)
            except ArraysLost as lost:
                batch = [group.record.group_id for group in groups]
                self._pipeline.make_again(batch, lost.groups, str(lost))
                return
        with spanned("controller", "serve"):
            await self._handover.give(self.state.version)
        self._mark(groups, figures)
        rows = sample_rows(self.config, shown, await texts, advantages)
        self._recorder.samples(self.state.version, rows)
        if self._keeper.due(self.state.version):
            with spanned("controller", "checkpoint"):
                await self._keeper.checkpoint(self._boundary, self._handover.stands)

    async def _next_batch(self) -> list[ReadyGroup]:
        """The next step's groups. Raises RunFailed when they do not come in time."""
        train, version = self.config.train, self.state.version
        deadline = time.monotonic() + train.step_timeout_s
        while True:
            self._changed.clear()
            self._stopping.check()
            self._pipeline.raise_failure()
            self._handover.check()
            if lost := self._weights.lost or self._learner.lost:
                raise PolicyLost(lost)
            self._serving.refill()
            self._pipeline.fill()
            batch = choose_batch(
                self.ledger.cohorts(), version, train.max_staleness, train.groups_per_step
            )
            if batch is not None:
                return [self._pipeline.ready[group_id] for group_id in batch]
            self._pipeline.check_sampling(self._seen.filtered)
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError as error:
                waiting = ", ".join(f"{n} {state}" for state, n in self.ledger.states().items())
                raise RunFailed(
                    f"step {version + 1} had no batch within train.step_timeout_s="
                    f"{train.step_timeout_s:g} s; open groups: {waiting}"
                ) from error

    async def _train(
        self, groups: Sequence[ReadyGroup], figures: StepFigures
    ) -> list[tuple[float, ...]] | None:
        """One step of policy and critic; the advantages of each group's completions, or None where
        the ranks make them of their tokens."""
        step, algorithm = self.state.version + 1, self.state.algorithm
        check_age(groups, self.state.version, self.config.train.max_staleness)
        batch = [group.record.group_id for group in groups]
        self.ledger.move(batch, State.TRAINING, step=step)
        works = group_works(self.config, algorithm, groups)
        advantages = None if algorithm.prepares else [work.advantages for work in works]
        if algorithm.prepares:
            works, figures.prepared = await self._learner.prepare(step, algorithm, works)
        result = await self._learner.update(step, algorithm, works)
        figures.updated = result.metrics
        self.state.version = step
        self._starts.reached(step)
        self._pipeline.trained(batch, step)
        return advantages

    def _mark(self, groups: Sequence[ReadyGroup], figures: StepFigures) -> None:
        """The end of a step: its figures, the algorithm of the next one, and what a checkpoint of
        it keeps. Nothing may happen in between, so nothing here waits."""
        step, now, before = self.state.version, self.ledger.books, self._seen
        figures.filtered = now.filtered - before.filtered
        figures.quarantined = now.quarantined - before.quarantined
        figures.served = self._weights.figures
        row = figures.row(groups, self._timeline.take(BUSY))
        completions = sum(len(group.record.finish_reasons) for group in groups)
        self.state.algorithm = self.state.algorithm.after_step(row, completions)
        self._recorder.step(step, row)
        self._seen = now
        self._boundary = Boundary(step, self.ledger.snapshot(step), self.state.algorithm)

    # Starting, going back and ending

    async def _restore(self, checkpoint: Checkpoint | None) -> None:
        """Make policy, rollout weights, ledger and files what they were at a checkpoint; None is
        the beginning. Open groups start last: nothing is rolled out under other weights."""
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
        self._recorder.truncate_after(version if checkpoint or self._begun else -1)
        open_groups = self.ledger.restore(snapshot, step=version, version=version)
        self._recorder.books = lambda: self.ledger.books  # now it has those of earlier starts
        self._seen = self.ledger.books
        self._boundary = Boundary(version, snapshot, self.state.algorithm)
        self._pipeline.go_on(open_groups)
        self._evaluation.begin(version)
        if checkpoint and not self._begun:
            self._recorder.event(EventKind.RESUMED, step=version)
        self._begun = self._sound = True

    async def _rebuild_policy(self, reason: str) -> None:
        """A policy rank is lost: new ranks from the last checkpoint, groups since then again."""
        await self._handover.drop()
        await self._evaluation.cancel()
        await self._pipeline.cancel()
        await self._starts.lost(reason)
        checkpoint = await self._keeper.latest()
        self._recorder.event(
            EventKind.POLICY_REBUILT,
            reason=reason,
            from_version=self.state.version,
            to_version=checkpoint.step if checkpoint else 0,
        )
        await self._stopping.unless(self._starts.start())
        await self._restore(checkpoint)

    async def _finish(self) -> None:
        """Keep what was trained, while the last version is evaluated."""
        await self._pipeline.cancel()
        if self.config.checkpoint.at_end:
            await self._keeper.last(self._boundary, self._handover.stands)
        await self._keeper.export()
        await self._handover.ended()
        await self._handover.evaluated()
        if self._evaluation.due(self.state.version):  # it was stopped before it could begin
            self._stopping.check()
        await self._keeper.finish(self.state.version)

    async def _close(self) -> None:
        await self._handover.drop()
        await self._evaluation.cancel()
        await self._pipeline.cancel()
        try:
            await self._serving.close()
        finally:
            await self._keeper.close()
