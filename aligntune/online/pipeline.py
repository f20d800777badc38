"""The lives of a run's groups up to their training: admitted, rolled out, scored, filtered, and
given reference log-probs; many at once.

Invariant: every admitted group comes out once, as READY, FILTERED or QUARANTINED, or stays open in
the ledger when the run stops. Token arrays never pass through here, only references to them.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from actors import timeline
from actors.messages import GroupSampling, Prompt
from actors.supervise import ReplicaSet
from aligntune.config.online import RunConfig
from aligntune.errors import RunFailed
from aligntune.online.attempts import GroupFailed, outlive
from aligntune.online.groups import ReadyGroup, compared_scores
from aligntune.online.ledger import Ledger, State
from aligntune.online.rolling import QUEUE_SECONDS, Rolling
from aligntune.online.staleness import free_slots
from aligntune.online.state import RunState
from aligntune.tracking.metrics import EventKind


class Pipeline:
    """Runs the lives of many groups at once; one that ends untrained makes room for another."""

    def __init__(
        self,
        config: RunConfig,
        state: RunState,
        total_steps: int,
        ledger: Ledger,
        prompt_at: Callable[[int], Prompt],
        rolling: Rolling,
        references: ReplicaSet | None,
        event: Callable[..., None],
        changed: asyncio.Event,
    ) -> None:
        """`changed` is set whenever a group has come to an end, well or not."""
        self._config = config
        self._state = state
        self._last = total_steps * config.train.groups_per_step
        self._ledger = ledger
        self._prompt_at = prompt_at
        self._rolling = rolling
        self._references = references
        self._event = event
        self._changed = changed
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._held: deque[int] = deque()  # open, WAITING, and not begun
        self._going = False  # from `go_on` to `cancel`
        self._failure: Exception | None = None
        self.ready: dict[int, ReadyGroup] = {}
        self.filtered_scores: Counter[float] = Counter()  # since the last step

    def fill(self) -> None:
        """Admit and start as many groups as staleness, and the steps still to come, have room for;
        none between `cancel` and `go_on`.

        A group's version, at admission and again at dispatch, is the oldest that a replica may
        still serve.
        """
        if self._state.signal or not self._going:
            return
        train, books = self._config.train, self._ledger.books
        free = free_slots(
            self._state.served,
            train.max_staleness,
            train.groups_per_step,
            books.trained,
            self._ledger.in_flight - len(self._held),
        )
        free = min(free, self._last - books.trained - books.open + len(self._held))
        for _ in range(free):
            held = self._held.popleft() if self._held else None
            self.start(self._ledger.admit(self._state.served) if held is None else held)

    def go_on(self, groups: Iterable[int]) -> None:
        """Go on with the open groups of a checkpoint: those that there is room for now, the others
        later. There are such where the run may take fewer steps or older tokens than before."""
        self._held = deque(groups)
        self._going = True
        self.fill()

    def start(self, group_id: int) -> None:
        """Begin the life of a WAITING group."""
        task = asyncio.create_task(self._live(group_id), name=f"group-{group_id}")
        self._tasks[group_id] = task
        task.add_done_callback(lambda done: self._finished(group_id, done))

    def trained(self, batch: Iterable[int], step: int) -> None:
        """The groups of `step` have done their work."""
        batch = list(batch)
        self._ledger.move(batch, State.TRAINED, step=step)
        for group_id in batch:
            del self.ready[group_id]
        self.filtered_scores.clear()

    def make_again(self, batch: Iterable[int], lost: Iterable[int], reason: str) -> None:
        """A step of `batch` could not begin, as the arrays of the `lost` ones are gone: these start
        anew, the others are READY as they were."""
        anew = [group_id for group_id in batch if group_id in set(lost)]
        self._ledger.move(anew, State.WAITING, reason=reason)
        self._ledger.move([i for i in batch if i not in set(lost)], State.READY)
        for group_id in anew:
            del self.ready[group_id]
            self._retried(group_id, reason)
            self.start(group_id)

    def _finished(self, group_id: int, task: asyncio.Task[None]) -> None:
        self._tasks.pop(group_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error if isinstance(error, Exception) else RunFailed(repr(error))
        self._changed.set()

    def raise_failure(self) -> None:
        """Raise what ended a group's task in a way no retry covers."""
        if self._failure is not None:
            raise self._failure

    def check_sampling(self, filtered_before: int) -> None:
        """End a run whose dynamic sampling keeps finding nothing to train on, with the scores.

        `filtered_before` is the ledger's count at the end of the last step.
        """
        algorithm, per_step = self._state.algorithm, self._config.train.groups_per_step
        rounds, filtered = algorithm.sampling_rounds, self._ledger.books.filtered - filtered_before
        enough = len(self.ready) >= per_step  # the step waits for older groups, not for more
        if rounds is None or filtered < rounds * per_step or enough:
            return
        shown = ", ".join(f"{x:g} x {n}" for x, n in self.filtered_scores.most_common(8))
        raise RunFailed(
            f"step {self._state.version + 1}: {filtered} groups were drawn and filtered in "
            f"{rounds} rounds and {len(self.ready)} of {per_step} kept; "
            f"{algorithm.sampling_metric} of those filtered: {shown}. The completions of a "
            "group score the same: the task is too hard, too easy, or the reward does not tell "
            "completions apart"
        )

    async def cancel(self) -> None:
        """Stop every life where it is; the groups stay open in the ledger. One that comes to its
        end all the same starts no other, which would outlive this."""
        self._going = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.ready.clear()
        self._held.clear()

    async def _live(self, group_id: int) -> None:
        timeline.about.set(f"group {group_id}")
        prompt = self._prompt_at(group_id)

        def lost(reason: str) -> None:
            self._retried(group_id, reason)
            self._ledger.move([group_id], State.WAITING, reason=reason)

        try:
            group = await self._rolling.again(
                lambda company: self._make(group_id, prompt, company), lost
            )
        except GroupFailed as failed:
            self._quarantine(group_id, failed)
            return
        if group is None:
            self._ledger.move([group_id], State.FILTERED)
            self.fill()
            return
        self.ready[group_id] = group
        self._ledger.move([group_id], State.READY)

    async def _make(self, group_id: int, prompt: Prompt, company: int | None) -> ReadyGroup | None:
        """The group, or None where the algorithm does not keep it."""
        train, rollout = self._config.train, self._config.rollout

        def moved(state: State, **why: Any) -> None:
            if state is State.ROLLING:
                why["version"] = self._state.served
            self._ledger.move([group_id], state, **why)

        group = await self._rolling.roll_and_score(
            prompt,
            GroupSampling(
                completions=train.completions_per_group or 1,
                max_tokens=rollout.max_completion_length,
                temperature=rollout.temperature,
                seed=train.seed,
                group_id=group_id,
            ),
            company,
            retried=lambda reason: self._retried(group_id, reason),
            moved=moved,
        )
        table, algorithm = compared_scores(self._config, group.scores), self._state.algorithm
        if not algorithm.keep(table):
            seen = table[algorithm.sampling_metric]
            self.filtered_scores.update(round(score, 4) for score in seen)
            return None
        return replace(group, reference=await self._reference(group_id, group.tensors))

    async def _reference(self, group_id: int, tensors: Any) -> Any | None:
        if (references := self._references) is None:
            return None
        _, logprobs = await outlive(
            lambda company: references.call(
                "logprobs",
                tensors,
                self._config.rollout.temperature,
                deadline_s=self._config.reference.timeout_s,
                limit="reference.timeout_s",
                queue_s=QUEUE_SECONDS,
                returns=2,
                company=company,
            ),
            self._config.rollout.max_attempts,
            lambda reason: self._retried(group_id, reason),
        )
        return logprobs

    def _retried(self, group_id: int, reason: str) -> None:
        self._event(EventKind.GROUP_RETRIED, group=group_id, reason=reason)

    def _quarantine(self, group_id: int, failed: GroupFailed) -> None:
        """Give a group up. Raises RunFailed where too many were given up for what they are; deaths
        of replicas have a budget of their own."""
        lost = {"lost": True} if failed.lost else {}
        self._ledger.move([group_id], State.QUARANTINED, reason=str(failed), **lost)
        self._event(EventKind.GROUP_QUARANTINED, group=group_id, reason=str(failed), **lost)
        bad, books = self._ledger.bad, self._ledger.books
        limit = self._config.train.max_quarantined_fraction
        floor = 1 / limit if limit else 0  # one bad prompt among the first few is no verdict
        if not lost and bad > limit * max(books.admitted, floor):
            raise RunFailed(
                f"{bad} of {books.admitted} groups were quarantined, more than "
                f"train.max_quarantined_fraction={limit:g} allows; the last: {failed}"
            )
        self.fill()
