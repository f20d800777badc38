"""Has a group of episodes played: an environment actor holds them, a rollout replica answers turns.

Invariant: a rollout replica that dies costs a turn, not an episode; an environment actor that dies
costs the group, which is made again. A group fails for rollout replicas only where it was alone on
those that died, as any group.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from actors.answers import ReplicaLost
from actors.environment import EnvironmentStuck, RolloutGone
from actors.environments.base import EpisodeFailed
from actors.messages import FinishReason, GroupRecord, GroupSampling, Prompt, Scores
from actors.reward import Criterion
from actors.scoring.criteria import EpisodeCriterion
from actors.supervise import Lent, ReplicaSet
from aligntune.config.online import RunConfig
from aligntune.online.attempts import GroupFailed, Retried, Suspicion


class Playing:
    """Calls the environment replicas of one run, and lends them its rollout replicas."""

    def __init__(
        self,
        config: RunConfig,
        environments: ReplicaSet,
        rollouts: ReplicaSet,
        criteria: Sequence[Criterion],
        queue_s: float,
    ) -> None:
        """`criteria` are all of the run, `queue_s` is the longest wait for a replica."""
        self._config = config
        self._environments = environments
        self._rollouts = rollouts
        self._criteria = criteria
        self._queue_s = queue_s

    async def play(
        self,
        prompt: Prompt,
        sampling: GroupSampling,
        company: int | None,
        retried: Retried,
        dispatched: Callable[[str], None],
    ) -> tuple[Any, ...]:
        """The group's record, and the references to its tensors and conversations.

        `dispatched(replica)` hears of the first rollout replica. Raises ReplicaLost where the
        environment actor is lost, GroupFailed.
        """
        life = uuid.uuid4().hex
        async with self._environments.lend(self._queue_s, company) as environment:
            try:
                return await self._until_played(
                    environment, life, prompt, sampling, retried, dispatched
                )
            except EpisodeFailed as failed:
                raise GroupFailed(str(failed)) from failed
            finally:
                environment.tell("end", life)

    async def _until_played(
        self,
        environment: Lent,
        life: str,
        prompt: Prompt,
        sampling: GroupSampling,
        retried: Retried,
        dispatched: Callable[[str], None],
    ) -> tuple[Any, ...]:
        """The life of one group's episodes, over as many rollout replicas as it takes."""
        limit, deadline = self._config.rollout.max_attempts, playing_deadline(self._config)
        suspicion, first = Suspicion(limit), True
        while True:
            try:
                async with self._rollouts.lend(self._queue_s, suspicion.company) as rollout:
                    if first:
                        dispatched(rollout.name)
                        first = False
                    given = (prompt, sampling, rollout.handle, rollout.name)
                    try:
                        return await environment.call(
                            "generate",
                            life,
                            *given,
                            deadline_s=deadline,
                            limit="episodes.episode_timeout_s",
                            returns=3,
                        )
                    except RolloutGone as gone:
                        raise ReplicaLost(gone.replica, gone.reason, limit=gone.limit) from gone
                    except EnvironmentStuck as stuck:
                        raise ReplicaLost(environment.name, str(stuck)) from stuck
            except ReplicaLost as lost:
                if lost.replica == environment.name:
                    raise
                if suspicion.heard(lost):
                    raise GroupFailed(
                        f"lost {limit} times, alone on its replica: {lost}", lost=True
                    ) from lost
                retried(f"{lost}; its episodes go on")

    def with_episodes(self, scores: Scores, record: GroupRecord) -> Scores:
        """The scores in the order of the criteria, with those that the episodes brought. All
        criteria abstain from an episode whose environment could not go on."""
        episodes = record.episodes
        assert episodes is not None, "it is of episodes"
        lost = [reason is FinishReason.ERROR for reason in record.finish_reasons]
        columns: list[Sequence[float | None]] = []
        for criterion in self._criteria:
            if isinstance(criterion, EpisodeCriterion):
                absent = (None,) * len(scores.values)  # no episode says anything: it abstains
                columns.append(episodes.rewards.get(criterion.key, absent))
            else:
                place = scores.criteria.index(criterion.name)
                columns.append([values[place] for values in scores.values])
        return replace(
            scores,
            criteria=tuple(criterion.name for criterion in self._criteria),
            values=tuple(
                (None,) * len(row) if gone else row
                for row, gone in zip(zip(*columns, strict=True), lost, strict=True)
            ),
        )


def playing_deadline(config: RunConfig) -> float:
    """Seconds after which an environment actor that still plays a group is lost.

    One that hangs is found long before: by its signs of life, or by itself where nothing moves in
    it any more (`longest_silence`). This bounds one that goes on and on, by its own limits: of an
    episode, without its sampling, of each turn, and of each reward that may want its environment.
    Turns of all episodes may wait for each other, and each episode may be begun as often as it may
    fail.
    """
    spec = config.episodes
    turns = spec.max_turns * config.rollout.generation_timeout_s
    rewards = sum(reward.timeout_s for reward in config.rewards)
    return 2 * spec.max_attempts * (spec.episode_timeout_s + turns + rewards)
