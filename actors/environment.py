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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actors.answers import ObjectsLost, ReplicaLost, answer, drop
from actors.engines.base import Turn, Work, engine_seed
from actors.environments.base import Episode, EpisodeFailed, EpisodeLimits, Episodes
from actors.environments.groups import EpisodesGroup, made_group
from actors.environments.processes import FORK_SECONDS, IMPORT_SECONDS
from actors.environments.specs import EpisodeCode, EpisodesSpec
from actors.environments.turns import Turns
from actors.liveness import Alive
from actors.messages import Completion, GroupSampling, Prompt
from actors.specs import ModelSpec
from actors.waiting import all_of
from actors.whereabouts import whereabouts

LOOKS = 10  # at whether anything has moved, in the time after which nothing counts as stuck


class RolloutGone(RuntimeError):
    """The rollout replica is lost; the episodes go on as soon as they have another one. `limit` is
    the setting of the deadline that it missed, if that is why."""

    def __init__(self, replica: str, reason: str, limit: str = "") -> None:
        super().__init__(f"{replica}: {reason}")
        self.replica = replica
        self.reason = reason
        self.limit = limit

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.replica, self.reason, self.limit)


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
        self._leaving: set[asyncio.Task[None]] = set()  # calls of `end` under way

    async def start(self) -> dict[str, Any]:
        """Get the user's code ready; returns where this runs. Raises EpisodeFailed."""
        started = time.monotonic()
        sandbox = await self._episodes.start()
        return {
            "replica": self._replica,
            "sandbox": sandbox,
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
        raise RolloutGone(name, found.turns.why, found.turns.limit)

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
            leaving = asyncio.create_task(self._leave(found))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await leaving

    async def _leave(self, life: _Life) -> None:
        life.task.cancel()
        await asyncio.gather(life.task, return_exceptions=True)
        await life.turns.close()

    async def ping(self) -> int:  # type: ignore[override]
        """As every actor's, while its event loop turns."""
        return self.done

    async def close(self) -> None:
        """End every episode and what they started; environments have their time to go."""
        await all_of(*(self.end(life) for life in list(self._lives)), *self._leaving)
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
        losses: list[EpisodeFailed] = []
        episodes: list[Episode] = await all_of(
            *(
                self._episode(prompt, sampling, turns, i, losses)
                for i in range(sampling.completions)
            )
        )
        if len(losses) == len(episodes):  # none of them is left to be compared
            raise EpisodeFailed(
                f"each episode failed twice at the same turn, the last: {losses[-1].reason}", True
            ) from losses[-1]
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
        self,
        prompt: Prompt,
        sampling: GroupSampling,
        turns: Turns,
        rollout: int,
        losses: list[EpisodeFailed],
    ) -> Episode:
        """One episode, begun anew while its failures are within their budgets: those of processes
        and machines have one of their own.

        One that is lost twice by the same turn would be time and again: it ends there, without a
        score, and why is added to `losses`.
        """
        # Rollouts of a group begin alike: what they are compared by is what the policy does.
        seed = engine_seed(sampling.seed, f"group {sampling.group_id}")
        failures: Counter[bool] = Counter()
        before: Episode | None = None
        retried = 0
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
                    if failed.so_far is not None and _alike(before, failed.so_far):
                        losses.append(failed)
                        episode = failed.so_far
                        break
                    before = failed.so_far
                    if failures[failed.infrastructure] == self._spec.max_attempts:
                        raise EpisodeFailed(
                            f"an episode failed {failures.total()} times, the last: "
                            f"{failed.reason}",
                            failed.infrastructure,
                        ) from failed
                    retried += 1
                    turns.begin(rollout)
        finally:
            self.done += 1
            turns.end(rollout)
        return replace(episode, figures=replace(episode.figures, retried=retried))


def _alike(one: Episode | None, other: Episode) -> bool:
    """Whether two tries came to the same turn, and the policy said the same in it."""
    if one is None or len(one.calls) != len(other.calls):
        return False
    said, again = one.calls[-1].sampled.token_ids, other.calls[-1].sampled.token_ids
    return np.array_equal(said, again)


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
    """The real path of `log`, where this node sees the run directory; else None: the actor's own
    output. In a sandbox links may lead into what is hidden there."""
    if log is None:
        return None
    folder = os.path.dirname(log)
    if not os.path.isdir(os.path.dirname(folder)):
        return None
    os.makedirs(folder, exist_ok=True)
    return os.path.realpath(log)
