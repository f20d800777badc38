"""EnvironmentActor: one replica that holds episodes and makes groups of them.

It runs the user's tools, environments or agent, and asks a rollout replica for each turn. It keeps
a group from the first `generate` for its `life` to its `end`: where the rollout replica is lost in
between, the call ends with `RolloutGone`, and the next `generate` for that life brings another one.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from actors.engines.base import Turn, Work, engine_seed
from actors.environments.base import (
    Episode,
    EpisodeFailed,
    EpisodeFigures,
    EpisodeLimits,
    Episodes,
)
from actors.environments.processes import FORK_SECONDS, IMPORT_SECONDS
from actors.environments.record import common_prompt, rows_of, turn_ends
from actors.environments.specs import EpisodeCode, EpisodesSpec
from actors.environments.turns import Turns
from actors.groups import pack_group
from actors.liveness import Alive
from actors.messages import (
    Completion,
    Conversations,
    EpisodesRecord,
    GroupRecord,
    GroupSampling,
    GroupTensors,
    Prompt,
    last_rows,
)
from actors.sandbox import in_force
from actors.specs import ModelSpec
from actors.supervise import ObjectsLost, ReplicaLost, answer, drop
from actors.waiting import all_of
from actors.whereabouts import whereabouts

EpisodesGroup = tuple[GroupRecord, GroupTensors, Conversations]
ENVIRONMENT = "environment"  # the criterion that an environment or agent scores itself by
LOOKS = 10  # at whether anything has moved, in the time after which nothing counts as stuck


class RolloutGone(RuntimeError):
    """The rollout replica is lost; the episodes go on as soon as they have another one."""

    def __init__(self, replica: str, reason: str) -> None:
        super().__init__(f"{replica}: {reason}")
        self.replica = replica
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.replica, self.reason)


class EnvironmentStuck(RuntimeError):
    """Nothing has moved in this actor for longer than all of its limits allow: a defect of ours."""


@dataclass
class _Life:
    """One go at a group."""

    turns: Turns
    task: asyncio.Task[EpisodesGroup]
    replica: str


class EnvironmentActor(Alive):
    """One environment replica; wrapped by `ray.remote` where it is placed."""

    def __init__(
        self,
        model: ModelSpec,
        spec: EpisodesSpec,
        code: EpisodeCode,
        limits: EpisodeLimits,
        replica: str,
        turn_timeout_s: float,
        lockstep: bool,
        log: str | None = None,
        drop: Callable[[Any], None] = drop,
    ) -> None:
        """Nothing is started before `start`.

        Args:
            model: the policy's, for its tokenizer.
            spec: how episodes are run.
            code: the user's.
            limits: of one episode.
            replica: this replica's name, for records and logs.
            turn_timeout_s: after which a rollout replica that has not answered is lost.
            lockstep: the turns of a group's episodes are sampled together.
            log: the file in the run directory for what the user's code prints.
            drop: ends a call of a rollout replica, by its reference.
        """
        self._spec = spec
        self._replica = replica
        self._turn_timeout_s = turn_timeout_s
        self._lockstep = lockstep
        self._drop = drop
        self._silence_s = longest_silence(limits, code.reward_seconds, turn_timeout_s)
        self._episodes = episodes_of(model, spec, code, limits, log_file(log))
        self._lives: dict[str, _Life] = {}

    async def start(self) -> dict[str, Any]:
        """Get the user's code ready; returns where this runs. Raises EpisodeFailed."""
        started = time.monotonic()
        await self._episodes.start()
        return {
            "replica": self._replica,
            "sandbox": await asyncio.to_thread(in_force, self._spec.sandbox, "episodes.sandbox"),
            **whereabouts(),
            "seconds": time.monotonic() - started,
        }

    async def generate(
        self, life: str, prompt: Prompt, sampling: GroupSampling, rollout: Any, name: str
    ) -> EpisodesGroup:
        """One group (call with `num_returns=3`), its turns asked of the rollout replica `name`.

        Idempotent for a `life`: a call that is repeated goes on with the same episodes.

        Raises:
            RolloutGone: that replica is lost, and the episodes wait for another call.
            EpisodeFailed: an episode failed as often as it may.
            EnvironmentStuck: no episode of this actor moves any more.
        """
        found = self._lives.get(life)
        if found is None:
            turns = Turns(sampling, self._lockstep, self._ask)
            task = asyncio.create_task(self._group(prompt, sampling, turns))
            found = self._lives[life] = _Life(turns, task, name)
            turns.use(rollout, name)
        elif found.replica != name:
            found.replica = name
            found.turns.use(rollout, name)
        gone = asyncio.create_task(found.turns.gone())
        try:
            await self._until_either((found.task, gone))
        finally:
            gone.cancel()
        if found.task.done():
            return found.task.result()
        raise RolloutGone(name, found.turns.why)

    async def _until_either(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Wait for the first of `tasks`. Raises EnvironmentStuck."""
        seen, still = self.done, 0
        while still < LOOKS:
            ended, _ = await asyncio.wait(
                tasks, timeout=self._silence_s / LOOKS, return_when=asyncio.FIRST_COMPLETED
            )
            if ended:
                return
            seen, still = self.done, still + 1 if self.done == seen else 0
        raise EnvironmentStuck(
            f"no turn was answered and no episode ended for {self._silence_s:g} s"
        )

    async def end(self, life: str) -> None:
        """Forget a life; episodes that still run are ended."""
        found = self._lives.pop(life, None)
        if found is not None:
            found.task.cancel()
            await asyncio.gather(found.task, return_exceptions=True)
            await found.turns.close()

    async def ping(self) -> int:  # type: ignore[override]
        """As every actor's, while its event loop turns."""
        return self.done

    async def close(self) -> None:
        """End every episode and what they started."""
        await all_of(*(self.end(life) for life in list(self._lives)))
        await self._episodes.close()

    async def _ask(self, handle: Any, name: str, turns: Sequence[Turn]) -> list[Completion]:
        limit = "rollout.generation_timeout_s"
        ref = handle.sample.remote(list(turns))
        try:
            made: list[Completion] = await answer(ref, name, "sample", self._turn_timeout_s, limit)
        except asyncio.CancelledError:
            self._drop(ref)  # or the engine would sample for nobody
            raise
        self.done += 1
        return made

    async def _work(self, handle: Any, name: str) -> Work | None:
        """What a rollout replica has done so far; None where it does not say."""
        try:
            done: Work = await answer(handle.work.remote(), name, "work", self._turn_timeout_s)
        except (ReplicaLost, ObjectsLost):
            return None
        return done

    async def _group(self, prompt: Prompt, sampling: GroupSampling, turns: Turns) -> EpisodesGroup:
        started = time.monotonic()
        handle, name = turns.replica
        before = await self._work(handle, name)
        for rollout in range(sampling.completions):
            turns.begin(rollout)  # all of them, before the first one asks
        episodes: list[Episode] = await all_of(
            *(self._episode(prompt, sampling, turns, i) for i in range(sampling.completions))
        )
        seconds = time.monotonic() - started
        now = turns.replica[1]
        record, tensors, conversations = made_group(
            sampling.group_id, episodes, self._spec.discount, seconds, now
        )
        after = await self._work(handle, name) if before is not None and name == now else None
        if before is not None and after is not None:
            record = replace(record, load=after.since(before, seconds))
        return record, tensors, conversations

    async def _episode(
        self, prompt: Prompt, sampling: GroupSampling, turns: Turns, rollout: int
    ) -> Episode:
        """One episode, begun anew while its failures are within their budgets: those of processes
        and machines have one of their own."""
        # Rollouts of a group begin alike: what they are compared by is what the policy does.
        seed = engine_seed(sampling.seed, f"group {sampling.group_id}")
        failures: Counter[bool] = Counter()
        try:
            while True:
                try:
                    episode = await self._episodes.run(
                        prompt, rollout, seed, turns.sampler(rollout)
                    )
                    if not episode.calls:
                        raise EpisodeFailed("it ended without asking the model for anything")
                    break
                except EpisodeFailed as failed:
                    failures[failed.infrastructure] += 1
                    self.done += 1
                    if failures[failed.infrastructure] == self._spec.max_attempts:
                        raise EpisodeFailed(
                            f"an episode failed {failures.total()} times, the last: "
                            f"{failed.reason}",
                            failed.infrastructure,
                        ) from failed
                    turns.begin(rollout)
        finally:
            self.done += 1
            turns.end(rollout)
        return replace(episode, figures=replace(episode.figures, retried=failures.total()))


def longest_silence(limits: EpisodeLimits, reward_seconds: float, turn_timeout_s: float) -> float:
    """Seconds in which an actor with episodes has something to show, whatever they do: a process is
    started, an episode uses up all of its time, its rewards are asked for, a turn is answered."""
    own = limits.episode_timeout_s + limits.call_timeout_s + reward_seconds
    return IMPORT_SECONDS + FORK_SECONDS + own + turn_timeout_s


def episodes_of(
    model: ModelSpec,
    spec: EpisodesSpec,
    code: EpisodeCode,
    limits: EpisodeLimits,
    log: str | None,
) -> Episodes:
    """What runs the user's code."""
    if code.agent is not None:
        from actors.environments.agents import AgentEpisodes

        return AgentEpisodes(code, limits, model, log, spec.host, spec.port)
    from actors.environments.tool_episodes import ToolEpisodes

    return ToolEpisodes(code, limits, model, log, spec.sandbox)


def log_file(log: str | None) -> str | None:
    """`log`, where this node sees the run directory; else None: the actor's own output."""
    if log is None:
        return None
    folder = os.path.dirname(log)
    if not os.path.isdir(os.path.dirname(folder)):
        return None
    os.makedirs(folder, exist_ok=True)
    return log


def made_group(
    group_id: int, episodes: Sequence[Episode], discount: float, seconds: float, replica: str
) -> EpisodesGroup:
    """A group of episodes: what the controller learns of it, its tokens, its conversations.

    Raises:
        EpisodeFailed: the conversations have no first token in common.
    """
    rows = [rows_of(episode.calls, episode.finish_reason) for episode in episodes]
    try:
        prompt_ids, cut = common_prompt(rows)
    except ValueError as error:
        raise EpisodeFailed(str(error)) from error
    record, tensors = pack_group(group_id, prompt_ids, cut, seconds, replica)
    said = EpisodesRecord(
        rewards=rewards_of(episodes, discount),
        figures={
            field.name: sum(getattr(episode.figures, field.name) for episode in episodes)
            for field in fields(EpisodeFigures)
        },
    )
    if any(episode.turn_rewards is not None for episode in episodes):
        said = replace(said, final=tuple(_final(episode) for episode in episodes))
        ends = turn_ends([episode.calls for episode in episodes], len(prompt_ids))
        tensors = replace(tensors, rewards=turn_rewards(episodes, ends, len(tensors.token_ids)))
    conversations = Conversations(
        messages=tuple(episode.messages for episode in episodes),
        asked=tuple(episode.prompt_messages for episode in episodes),
        last_rows=tuple(last_rows(record.rollouts)),
    )
    return replace(record, episodes=said), tensors, conversations


def rewards_of(episodes: Sequence[Episode], discount: float) -> dict[str, tuple[float | None, ...]]:
    """[G] by criterion. `environment` is what an episode's end was worth and the sum of its turns'
    rewards, each turn's discounted once more than the one before; None: it abstains."""
    names = {name for episode in episodes for name in episode.rewards}
    names |= {ENVIRONMENT for episode in episodes if episode.turn_rewards is not None}
    return {
        name: tuple(
            _whole(episode, discount) if name == ENVIRONMENT else episode.rewards.get(name)
            for episode in episodes
        )
        for name in sorted(names)
    }


def _final(episode: Episode) -> float | None:
    """What an episode's end was worth; 0 where only its turns were worth something."""
    final = episode.rewards.get(ENVIRONMENT)
    return 0.0 if final is None and episode.turn_rewards is not None else final


def _whole(episode: Episode, discount: float) -> float | None:
    if episode.turn_rewards is None:
        return _final(episode)
    turns = (reward * discount**turn for turn, reward in enumerate(episode.turn_rewards))
    return (_final(episode) or 0.0) + sum(turns)


def turn_rewards(
    episodes: Sequence[Episode], ends: Sequence[Sequence[int]], tokens: int
) -> np.ndarray:
    """[N] float32: each turn's reward at its last token, 0 elsewhere.

    Raises ValueError where an episode has not one reward for each of its turns.
    """
    rewards = np.zeros(tokens, dtype=np.float32)
    for episode, own in zip(episodes, ends, strict=True):
        if episode.turn_rewards is not None:
            for end, reward in zip(own, episode.turn_rewards, strict=True):
                rewards[end] += reward
    return rewards
