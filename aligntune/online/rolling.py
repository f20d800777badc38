"""Rolls a group out and has it scored, the same way for training and for evaluation.

Invariant: a failure is never a score. What was lost with a replica or a node is made again; a group
that was alone on `rollout.max_attempts` replicas that died, or has no scores after
`reward.max_attempts`, is `GroupFailed`.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from actors.messages import GroupSampling, Prompt, Scores
from actors.reward import Criterion
from actors.scoring.children import IMPORT_SECONDS
from actors.scoring.criteria import RewardFailed, RewardFailure
from actors.specs import RewardFunctionSpec, RewardModelSpec, RewardUrlSpec
from actors.supervise import ReplicaSet
from aligntune.config.online import RunConfig
from aligntune.online.attempts import LONGEST_PAUSE_S, GroupFailed, Retried, again, outlive
from aligntune.online.groups import ReadyGroup, out_of_range
from aligntune.online.ledger import State
from aligntune.online.playing import Playing

QUEUE_SECONDS = 24 * 3600.0  # groups queue behind busy replicas, whose calls have deadlines
FIRST_PAUSE_S = 1.0
UNREACHED_SECONDS = 600.0  # a service that is away is waited for: it may load a model anew

T = TypeVar("T")
Moved = Callable[..., None]  # (State, **why): where a group is now


def unseen(state: State, **why: Any) -> None:
    """`Moved` of a group that no ledger knows."""


class Rolling:
    """Calls the rollout and the reward replicas of one run."""

    def __init__(
        self,
        config: RunConfig,
        rollouts: ReplicaSet,
        rewards: ReplicaSet,
        environments: ReplicaSet | None = None,
        criteria: Sequence[Criterion] = (),
    ) -> None:
        """`environments` where rollouts are episodes; then `criteria` are all of the run."""
        self._playing = (
            Playing(config, environments, rollouts, criteria, QUEUE_SECONDS)
            if environments is not None
            else None
        )
        self._config = config
        self._rollouts = rollouts
        self._rewards = rewards

    async def roll_and_score(
        self,
        prompt: Prompt,
        sampling: GroupSampling,
        company: int | None,
        retried: Retried,
        moved: Moved = unseen,
    ) -> ReadyGroup:
        """One group, scored. Raises ReplicaLost or ObjectsLost where it has to be made again from
        its start (see `again`), GroupFailed where it has no score."""

        def dispatched(replica: str) -> None:
            moved(State.ROLLING, replica=replica)

        if self._playing is None:
            record, *made = await self._roll_out(prompt, sampling, company, dispatched)
        else:
            record, *made = await self._playing.play(prompt, sampling, company, retried, dispatched)
        moved(State.SCORING)
        scores, texts = await self._score(prompt, made, retried)
        if self._playing is not None:
            scores = self._playing.with_episodes(scores, record)
        if (wrong := out_of_range(self._config, scores)) is not None:
            raise GroupFailed(wrong)
        return ReadyGroup(prompt, record, scores, texts, *made)

    async def again(self, make: Callable[[int | None], Awaitable[T]], retried: Retried) -> T:
        """What `make(company)` gives, made again after each loss. Raises GroupFailed."""
        return await again(make, self._config.rollout.max_attempts, retried)

    async def _roll_out(
        self,
        prompt: Prompt,
        sampling: GroupSampling,
        company: int | None,
        dispatched: Callable[[str], None],
    ) -> tuple[Any, ...]:
        """One turn of text a rollout: the record, and the reference to the tensors."""
        return await self._rollouts.call(
            "generate",
            prompt,
            sampling,
            deadline_s=self._config.rollout.generation_timeout_s,
            limit="rollout.generation_timeout_s",
            queue_s=QUEUE_SECONDS,
            returns=2,
            company=company,
            on_dispatch=dispatched,
        )

    async def _score(
        self, prompt: Prompt, made: Sequence[Any], retried: Retried
    ) -> tuple[Scores, Any]:
        """The scores of what was made of a prompt, and the reference to its texts. Where a service
        is away, that is no attempt: it is asked again, with growing pauses. Raises GroupFailed."""
        most = self._config.reward.max_attempts
        deadline, limit = scoring_deadline(self._config)

        def score(company: int | None) -> Awaitable[tuple[Any, ...]]:
            return self._rewards.call(
                "score",
                prompt,
                *made,
                deadline_s=deadline,
                limit=limit,
                queue_s=QUEUE_SECONDS,
                returns=2,
                company=company,
            )

        attempts = unreached = 0
        away_until = math.inf
        while True:
            try:
                scores, texts = await outlive(score, most, retried)
                return scores, texts
            except RewardFailed as failure:
                away = failure.reason is RewardFailure.UNREACHED
                if away:
                    away_until = min(away_until, time.monotonic() + UNREACHED_SECONDS)
                else:
                    attempts, unreached, away_until = attempts + 1, 0, math.inf
                if attempts == most or time.monotonic() >= away_until:
                    raise GroupFailed(str(failure)) from failure
                retried(str(failure))
            if away:
                await asyncio.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**unreached))
                unreached += 1


def scoring_deadline(config: RunConfig) -> tuple[float, str]:
    """Seconds after which a reward actor that has said nothing of a group is lost, and the setting
    that they come from most.

    The actor has limits of its own, a call of a criterion each. This is what they come to where the
    actor is full and each call takes all its time: the start of a child process, and as many calls
    one after the other as the criterion does not serve at once. Criteria run side by side.
    """
    groups = config.reward.max_concurrent_groups
    seconds = [reward.timeout_s * calls_in_turn(reward, groups) for reward in config.rewards]
    longest = max(range(len(seconds)), key=seconds.__getitem__)
    return IMPORT_SECONDS + seconds[longest], f"rewards.{longest}.timeout_s"


def calls_in_turn(reward: RewardFunctionSpec | RewardModelSpec | RewardUrlSpec, groups: int) -> int:
    """How many calls of a criterion may follow on each other before `groups` groups are scored."""
    if isinstance(reward, RewardModelSpec):
        return groups
    # One more: calls of an async function that were in one process when it ended are made again.
    return math.ceil(groups / (reward.workers or groups)) + 1
