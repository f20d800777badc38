"""THE loop: admit -> roll out -> reward -> filter -> reference -> update -> sync.

                 +--------------------- free slots ----------------------+
                 v                                                       |
    prompts -> admit -> Pipeline (many groups at once) -> ready -> choose_batch -> update -> sync
                 ^         roll out, score, filter,                      |            |
                 |         reference log-probs                           v            v
                 +------ undone groups <-- restore <-- policy lost   TRAINED     rollout actors

One loop for every staleness: with `max_staleness` 0 a step's groups are admitted when the step
before has ended, with more they are rolled out while the policy trains. `version` is the number of
steps trained; weights of version v come from step v.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from actors.messages import Prompt
from aligntune.config.online import RunConfig
from aligntune.data.prompts import PromptSource
from aligntune.errors import Interrupted, RunFailed, UserError
from aligntune.online.evaluation import evaluate
from aligntune.online.figures import (
    completion_metrics,
    group_metrics,
    rollout_metrics,
    score_metrics,
    time_metrics,
)
from aligntune.online.keeper import Keeper
from aligntune.online.learner import Learner, PolicyLost
from aligntune.online.ledger import Books, Ledger, LedgerLog, State, at_end_of_tick
from aligntune.online.pipeline import BusyClock, Pipeline, ReadyGroup, group_works
from aligntune.online.roles import Roles
from aligntune.online.serving import Serving
from aligntune.online.staleness import choose_batch, free_slots
from aligntune.runs.checkpoint import Checkpoint, Checkpoints
from aligntune.runs.mirror import Mirror
from aligntune.runs.recorder import Recorder
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind

T = TypeVar("T")


class Controller:
    """Runs one job to its last step."""

    def __init__(
        self,
        config: RunConfig,
        roles: Roles,
        total_steps: int,
        prompts: PromptSource,
        eval_prompts: list[Prompt],
        rundir: RunDir,
        checkpoints: Checkpoints,
        recorder: Recorder,
        mirror: Mirror | None = None,
    ) -> None:
        self.config = config
        self.algorithm = config.algorithm
        self.total_steps = total_steps
        self.version = 0
        self._prompts = prompts
        self._eval_prompts = eval_prompts
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._rundir = rundir
        self._log = LedgerLog(rundir.file("ledger.jsonl"), at_end_of_tick)
        self.ledger = Ledger(self._log)
        self._stop = asyncio.Event()
        self._signal = 0
        self._policy_restarts = 0
        self._seen = self.ledger.books  # at the last figures
        self._unwritten: dict[str, float] | None = None  # figures that wait for their evaluation
        self._prepare_clock, self._update_clock = BusyClock(), BusyClock()
        self._sync_clock = BusyClock()
        self._learner = Learner(config, roles.policy, roles.critic)
        self._keeper = Keeper(
            config, self._learner, self._log, prompts.fingerprint, checkpoints, mirror, recorder
        )
        self._serving = Serving(
            config, roles, recorder.event, recorder.role, wake=lambda: self._pipeline.changed.set()
        )
        self._pipeline = Pipeline(
            config,
            self.ledger,
            prompts.prompt_at,
            self._serving.rollouts,
            self._serving.rewards,
            self._serving.references,
            recorder.event,
            freed=self._admit,
        )

    def stop(self, signal: int) -> None:
        """Ask the loop to checkpoint and end; safe from a signal handler of the event loop."""
        self._signal = signal
        self._stop.set()
        self._pipeline.changed.set()

    # Starting and going back

    async def _restore(self, checkpoint: Checkpoint | None) -> None:
        """Make policy, rollout weights and ledger what they were at a checkpoint.

        None is the beginning. Open groups start last: nothing is rolled out under other weights.
        """
        self.version = checkpoint.step if checkpoint else 0
        self.algorithm, snapshot = self.config.algorithm, Ledger.beginning()
        if checkpoint:
            await self._learner.load(checkpoint.path)
            self.algorithm = self.algorithm.carried_on(checkpoint.state["algorithm"])
            snapshot = checkpoint.state["ledger"]
        if checkpoint or self._serving.synced:
            await self._sync()
        open_groups = self.ledger.restore(snapshot, step=self.version, version=self.version)
        seen = checkpoint.state["seen"] if checkpoint else {"filtered": 0, "quarantined": 0}
        self._seen = replace(self.ledger.books, **seen)
        for group_id in open_groups:
            self._pipeline.start(group_id)

    async def _rebuild_policy(self, reason: str) -> None:
        """A policy rank is lost: new ranks from the last checkpoint, groups since then again."""
        limit = self.config.policy.max_restarts
        while True:
            self._policy_restarts += 1
            self._learner.kill()
            await self._pipeline.cancel()
            if self._policy_restarts > limit:
                raise RunFailed(
                    f"the policy was lost {self._policy_restarts} times, more than "
                    f"policy.max_restarts={limit} allows; the last: {reason}"
                )
            checkpoint = self._checkpoints.latest()
            step = checkpoint.step if checkpoint else 0
            self._recorder.event(
                EventKind.POLICY_REBUILT,
                reason=reason,
                from_version=self.version,
                to_version=step,
            )
            try:
                for name, info in await self._learner.start():
                    self._recorder.role(name, info)
                await self._restore(checkpoint)
            except PolicyLost as again:
                reason = str(again)
                continue
            self._recorder.truncate_after(step)
            return

    # The loop

    async def run(self, checkpoint: Checkpoint | None) -> dict[str, float]:
        """Train to the last step; returns the last metrics. Raises Interrupted, RunFailed, ..."""
        metrics: dict[str, float] = {}
        started = False
        try:
            await self._unless_stopped(self._start_roles())
            await self._restore(checkpoint)
            self._recorder.truncate_after(checkpoint.step if checkpoint else -1)
            started = True
            if checkpoint:
                self._recorder.event(EventKind.RESUMED, step=checkpoint.step)
                metrics = self._recorder.last
                if self._recorder.last_step < checkpoint.step:  # else they were written since
                    self._unwritten = checkpoint.state["unwritten"]
            elif self.config.eval.at_start:
                self._unwritten = {}
            while True:
                try:
                    if self._unwritten is not None:
                        metrics = await self._write(self._unwritten)
                    while self.version < self.total_steps:
                        metrics = await self._step()
                    await self._finish()
                    return metrics
                except PolicyLost as lost:
                    await self._rebuild_policy(str(lost))
        except Interrupted:
            await self._pipeline.cancel()
            if started:
                await self._checkpoint()
            raise
        finally:
            await self._close()

    async def _start_roles(self) -> None:
        ranks, _ = await asyncio.gather(self._learner.start(), self._serving.start())
        for name, info in ranks:
            self._recorder.role(name, info)
        if blind := await self._learner.blind(self._rundir.path):
            raise UserError(
                f"output_dir {self._rundir.path} is not seen by {', '.join(blind)}, which could "
                "write no checkpoint to it; put it on storage that every policy node shares, or "
                "keep the policy on one node (policy.resources.strategy=STRICT_PACK)"
            )

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
        raise Interrupted(self._signal)

    async def _finish(self) -> None:
        await self._pipeline.cancel()
        if self.config.checkpoint.at_end:
            await self._checkpoint()
        await self._keeper.finish()

    async def _close(self) -> None:
        await self._pipeline.cancel()
        self._learner.kill()
        await self._serving.close()
        self._log.close()

    def _admit(self) -> None:
        """Start as many groups as may be: before every batch, and where one ends untrained."""
        if self._stop.is_set():
            return
        free = free_slots(
            self.version,
            self.config.train.max_staleness,
            self.config.train.groups_per_step,
            self.ledger.books.trained,
            self.ledger.in_flight,
        )
        last = self.total_steps * self.config.train.groups_per_step
        books = self.ledger.books
        for _ in range(min(free, last - books.trained - books.open)):
            self._pipeline.start(self.ledger.admit(self.version))

    async def _next_batch(self) -> list[int]:
        """Ids of the next step's groups. Raises RunFailed when they do not come in time."""
        train = self.config.train
        deadline = time.monotonic() + train.step_timeout_s
        while True:
            self._pipeline.changed.clear()
            if self._stop.is_set():
                raise Interrupted(self._signal)
            self._pipeline.raise_failure()
            if self._serving.lost is not None:
                raise PolicyLost(self._serving.lost)
            self._admit()
            batch = choose_batch(
                self.ledger.cohorts(), self.version, train.max_staleness, train.groups_per_step
            )
            if batch is not None:
                return batch
            self._check_sampling()
            try:
                await asyncio.wait_for(self._pipeline.changed.wait(), deadline - time.monotonic())
            except TimeoutError as error:
                states = self.ledger.states().items()
                waiting = ", ".join(f"{count} {state}" for state, count in states)
                raise RunFailed(
                    f"step {self.version + 1} had no batch within train.step_timeout_s="
                    f"{train.step_timeout_s:g} s; open groups: {waiting}"
                ) from error

    def _check_age(self, groups: Sequence[ReadyGroup]) -> None:
        """The invariant itself, looked at before every update. RunFailed: aligntune is wrong."""
        for group in groups:
            age = self.version - group.record.oldest_version
            if not 0 <= age <= self.config.train.max_staleness:
                raise RunFailed(
                    f"group {group.record.group_id} has tokens of policy version "
                    f"{group.record.oldest_version}, {age} versions behind version {self.version}; "
                    f"train.max_staleness={self.config.train.max_staleness} allows no training on "
                    "it. This is a defect of aligntune: please report it with events.jsonl"
                )

    def _check_sampling(self) -> None:
        """Dynamic sampling that keeps finding nothing to train on ends the run, with the scores."""
        rounds, per_step = self.algorithm.sampling_rounds, self.config.train.groups_per_step
        filtered = self.ledger.books.filtered - self._seen.filtered
        if rounds is None or filtered < rounds * per_step:
            return
        scores = self._pipeline.filtered_scores
        shown = ", ".join(f"{score:g} x {count}" for score, count in scores.most_common(8))
        raise RunFailed(
            f"step {self.version + 1}: {filtered} groups were drawn and filtered in {rounds} "
            f"rounds and {len(self._pipeline.ready)} of {per_step} kept; "
            f"{self.algorithm.sampling_metric} of those filtered: {shown}. The completions of a "
            "group score the same: the task is too hard, too easy, or the reward does not tell "
            "completions apart"
        )

    async def _step(self) -> dict[str, float]:
        started = time.monotonic()
        batch = await self._next_batch()
        step, trained_from = self.version + 1, self.version
        groups = [self._pipeline.ready[group_id] for group_id in batch]
        self._check_age(groups)
        self.ledger.move(batch, State.TRAINING, step=step)
        works, prepared = group_works(self.config, self.algorithm, groups), dict[str, float]()
        if self.algorithm.prepares:
            with self._prepare_clock:
                works, prepared = await self._learner.prepare(step, self.algorithm, works)
        with self._update_clock:
            result = await self._learner.update(step, self.algorithm, works)
        self.version = step
        await self._sync()
        self.ledger.move(batch, State.TRAINED, step=step)
        for group_id in batch:
            del self._pipeline.ready[group_id]
        self._admit()  # the next rollouts do not wait for what follows
        seconds = time.monotonic() - started
        ended = self._ended_since()
        metrics = {
            **score_metrics(self.config, groups),
            **completion_metrics(groups),
            **rollout_metrics(groups),
            **group_metrics(self.config, groups, trained_from, ended),
            **prepared,
            **result.metrics,
            **time_metrics(seconds, self._busy(), groups),
        }
        if self.algorithm.sampling_rounds is not None:
            self._pipeline.filtered_scores.clear()
        completions = sum(len(group.record.finish_reasons) for group in groups)
        self.algorithm = self.algorithm.after_step(metrics, completions)
        await self._recorder.samples(step, batch, groups)
        metrics = await self._write(metrics)
        if step % self.config.checkpoint.every_steps == 0:
            await self._checkpoint()
        return metrics

    async def _write(self, metrics: dict[str, float]) -> dict[str, float]:
        """Write the figures of the current step, its evaluation among them where one is due.

        Where the run is stopped meanwhile, a checkpoint keeps them, and the evaluation comes when
        the run goes on. Step 0 has an evaluation alone.
        """
        self._unwritten = metrics
        step, spec = self.version, self.config.eval
        due = bool(spec.every_steps and step % spec.every_steps == 0)
        if step == 0 or due or (step == self.total_steps and spec.at_end):
            metrics = {**metrics, **await self._evaluate(step)}
        if metrics:
            self._recorder.step(step, metrics)
        self._unwritten = None
        return metrics

    async def _sync(self) -> None:
        """Bring the weights of the current version to every rollout replica."""
        with self._sync_clock:
            await self._serving.sync(await self._learner.export(self.version))

    async def _evaluate(self, step: int) -> dict[str, float]:
        if not self._eval_prompts:
            return {}
        metrics = await self._unless_stopped(
            evaluate(
                self.config,
                self._eval_prompts,
                self._serving.rollouts,
                self._serving.rewards,
                self._recorder.event,
            )
        )
        self._recorder.evaluation(step, metrics)
        return metrics

    async def _checkpoint(self) -> None:
        """Save the state after the last trained step, once per step."""
        seen = {"filtered": self._seen.filtered, "quarantined": self._seen.quarantined}
        state = {"seen": seen, "unwritten": self._unwritten}
        await self._keeper.checkpoint(self.version, self.ledger, self.algorithm, state)

    # Figures

    def _busy(self) -> dict[str, float]:
        clocks = {
            "rollout": self._pipeline.rollout_clock,
            "reward": self._pipeline.reward_clock,
            "reference": self._pipeline.reference_clock,
            "prepare": self._prepare_clock,
            "update": self._update_clock,
            "weight_sync": self._sync_clock,
        }
        return {name: clock.take() for name, clock in clocks.items()}

    def _ended_since(self) -> dict[str, int]:
        now, before = self.ledger.books, self._seen
        self._seen = now
        return {
            "filtered": now.filtered - before.filtered,
            "quarantined": now.quarantined - before.quarantined,
        }

    @property
    def books(self) -> Books:
        """The ledger's balance."""
        return self.ledger.books
