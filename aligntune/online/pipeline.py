"""The life of a group up to its training: roll out, score, filter, reference log-probs.

Invariant: every admitted group comes out once, as READY, FILTERED or QUARANTINED, or stays open in
the ledger when the run stops. Token arrays never pass through here, only references to them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.messages import GroupRecord, GroupSampling, GroupWork, Prompt, Scores
from actors.reward import RewardFailed
from actors.supervise import ObjectsLost, ReplicaLost, ReplicaSet
from aligntune.algorithms.base import Algorithm
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed
from aligntune.online.ledger import Ledger, State
from aligntune.tracking.metrics import EventKind

QUEUE_SECONDS = 24 * 3600.0  # groups queue behind busy replicas, whose calls have deadlines


@dataclass(frozen=True)
class ReadyGroup:
    """A scored group waiting for its step."""

    prompt: Prompt
    record: GroupRecord
    scores: Scores
    texts: Any  # reference to the decoded completions, tuple[str, ...] [G]
    tensors: Any  # reference to GroupTensors
    reference: Any | None  # reference to the reference log-probs [N]


class BusyClock:
    """Wall time during which at least one of several overlapping activities ran, in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._active = 0
        self._since = 0.0
        self._total = 0.0

    def __enter__(self) -> None:
        if self._active == 0:
            self._since = self._now()
        self._active += 1

    def __exit__(self, *exc: object) -> None:
        self._active -= 1
        if self._active == 0:
            self._total += self._now() - self._since

    def take(self) -> float:
        """Seconds since the last call, what is still running included."""
        if self._active:
            now = self._now()
            self._total += now - self._since
            self._since = now
        total, self._total = self._total, 0.0
        return total


class Pipeline:
    """Runs the lives of many groups at once."""

    def __init__(
        self,
        config: RunConfig,
        ledger: Ledger,
        prompt_at: Callable[[int], Prompt],
        rollouts: ReplicaSet,
        rewards: ReplicaSet,
        references: ReplicaSet | None,
        event: Callable[..., None],
        freed: Callable[[], None],
    ) -> None:
        """`freed()` is called when a group has ended untrained, so that another may be admitted."""
        self._config = config
        self._algorithm: Algorithm = config.algorithm
        self._ledger = ledger
        self._prompt_at = prompt_at
        self._rollouts = rollouts
        self._rewards = rewards
        self._references = references
        self._event = event
        self._freed = freed
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._failure: Exception | None = None
        self.ready: dict[int, ReadyGroup] = {}
        self.filtered_scores: Counter[float] = Counter()  # since it was last cleared
        self.changed = asyncio.Event()
        self.rollout_clock, self.reward_clock, self.reference_clock = (
            BusyClock(),
            BusyClock(),
            BusyClock(),
        )

    def start(self, group_id: int) -> None:
        """Begin the life of a WAITING group."""
        task = asyncio.create_task(self._live(group_id), name=f"group-{group_id}")
        self._tasks[group_id] = task
        task.add_done_callback(lambda done: self._finished(group_id, done))

    def _finished(self, group_id: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(group_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error if isinstance(error, Exception) else RunFailed(repr(error))
        self.changed.set()

    def raise_failure(self) -> None:
        """Raise what ended a group's task in a way no retry covers."""
        if self._failure is not None:
            raise self._failure

    async def cancel(self) -> None:
        """Stop every life where it is; the groups stay open in the ledger."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.ready.clear()

    async def _live(self, group_id: int) -> None:
        prompt = self._prompt_at(group_id)
        attempts = 0
        while True:
            try:
                record, tensors = await self._roll_out(group_id, prompt)
                scored = await self._score(group_id, prompt, tensors)
                if scored is None:
                    return
                scores, texts = scored
                table = raw_scores(self._config, scores)
                if not self._algorithm.keep(table):
                    seen = table[self._algorithm.sampling_metric]
                    self.filtered_scores.update(round(score, 4) for score in seen)
                    self._ledger.move([group_id], State.FILTERED)
                    self._freed()
                    return
                reference = await self._reference(tensors)
            except (ReplicaLost, ObjectsLost) as lost:
                attempts += 1
                if attempts >= self._config.rollout.max_attempts:
                    self._quarantine(group_id, f"lost {attempts} times, last: {lost}")
                    return
                self._event(EventKind.GROUP_RETRIED, group=group_id, reason=str(lost))
                self._ledger.move([group_id], State.WAITING, reason=str(lost))
                continue
            self.ready[group_id] = ReadyGroup(prompt, record, scores, texts, tensors, reference)
            self._ledger.move([group_id], State.READY)
            return

    async def _roll_out(self, group_id: int, prompt: Prompt) -> tuple[GroupRecord, Any]:
        train, rollout = self._config.train, self._config.rollout
        sampling = GroupSampling(
            completions=train.completions_per_group or 1,
            max_tokens=rollout.max_completion_length,
            temperature=rollout.temperature,
            seed=train.seed,
            group_id=group_id,
        )
        with self.rollout_clock:
            record, tensors = await self._rollouts.call(
                "generate",
                prompt,
                sampling,
                deadline_s=rollout.generation_timeout_s,
                queue_s=QUEUE_SECONDS,
                returns=2,
                on_dispatch=lambda replica: self._ledger.move(
                    [group_id], State.ROLLING, replica=replica
                ),
            )
        self._ledger.move([group_id], State.SCORING)
        return record, tensors

    async def _score(
        self, group_id: int, prompt: Prompt, tensors: Any
    ) -> tuple[Scores, Any] | None:
        """The group's scores and the reference to its texts, or None when it was quarantined."""
        limit, deadline = self._config.reward.max_attempts, scoring_deadline(self._config)
        for attempt in range(1, limit + 1):
            try:
                with self.reward_clock:
                    scores, texts = await self._rewards.call(
                        "score",
                        prompt,
                        tensors,
                        deadline_s=deadline,
                        queue_s=QUEUE_SECONDS,
                        returns=2,
                    )
            except (RewardFailed, ReplicaLost) as failure:
                if attempt == limit:
                    self._quarantine(group_id, str(failure))
                    return None
                self._event(EventKind.GROUP_RETRIED, group=group_id, reason=str(failure))
            else:
                return scores, texts
        raise AssertionError("unreachable: the loop returns")

    async def _reference(self, tensors: Any) -> Any | None:
        if self._references is None:
            return None
        with self.reference_clock:
            _, logprobs = await self._references.call(
                "logprobs",
                tensors,
                self._config.rollout.temperature,
                deadline_s=self._config.reference.timeout_s,
                queue_s=QUEUE_SECONDS,
                returns=2,
            )
        return logprobs

    def _quarantine(self, group_id: int, reason: str) -> None:
        self._ledger.move([group_id], State.QUARANTINED, reason=reason)
        self._event(EventKind.GROUP_QUARANTINED, group=group_id, reason=reason)
        books, limit = self._ledger.books, self._config.train.max_quarantined_fraction
        floor = 1 / limit if limit else 0  # one bad prompt among the first few is no verdict
        if books.quarantined > limit * max(books.admitted, floor):
            raise RunFailed(
                f"{books.quarantined} of {books.admitted} groups were quarantined, more than "
                f"train.max_quarantined_fraction={limit:g} allows; the last: {reason}"
            )
        self._freed()


def scoring_deadline(config: RunConfig) -> float:
    """Seconds a reward actor has for a group: calls of one criterion are served in turn, so the
    last of a full actor may wait for all the others' limits; criteria run side by side."""
    longest = max(reward.timeout_s for reward in config.rewards)
    return 300.0 + longest * config.reward.max_concurrent_groups


def total_reward(config: RunConfig, values: tuple[float, ...]) -> float:
    """The weighted sum of one completion's criteria."""
    return sum(spec.weight * value for spec, value in zip(config.rewards, values, strict=True))


def raw_scores(config: RunConfig, scores: Scores) -> dict[str, list[float]]:
    """A group's scores per criterion and, as 'score', their weighted sum: [G] each."""
    table = {name: [row[k] for row in scores.values] for k, name in enumerate(scores.criteria)}
    return {**table, "score": [total_reward(config, row) for row in scores.values]}


def truncated(record: GroupRecord) -> tuple[bool, ...]:
    """[G] which rollouts were cut by a limit."""
    return tuple(reason.truncated for reason in record.finish_reasons)


def group_works(
    config: RunConfig, algorithm: Algorithm, groups: Sequence[ReadyGroup]
) -> list[GroupWork]:
    """Sequence advantages of a step's groups, and what the policy ranks need with them.

    Raises ValueError where a group does not have one score per rollout.
    """
    for group in groups:
        scored, made = len(group.scores.values), len(group.record.finish_reasons)
        if scored != made:
            raise ValueError(f"group {group.record.group_id}: {scored} scores for {made} rollouts")
    scores, advantages = algorithm.scores_and_advantages(
        [torch.tensor(group.scores.values, dtype=torch.float64) for group in groups],
        torch.tensor([spec.weight for spec in config.rewards], dtype=torch.float64),
        [torch.tensor(group.record.sampled_lengths) for group in groups],
        config.rollout.max_completion_length,
    )
    return [
        GroupWork(
            group_id=group.record.group_id,
            prompt_tokens=group.record.prompt_tokens,
            lengths=group.record.lengths,
            trained=tuple(algorithm.trains_on(cut) for cut in truncated(group.record)),
            truncated=truncated(group.record),
            advantages=tuple(advantages[index].tolist()),
            scores=tuple(scores[index].tolist()),
            tensors=group.tensors,
            reference=group.reference,
            rollouts=group.record.rollouts,
        )
        for index, group in enumerate(groups)
    ]
