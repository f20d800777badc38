"""Episodes without a user's code, and a policy without a model: both functions of what they see."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.exceptions import ActorDiedError

from actors.engines.base import Turn, Work, completion
from actors.environments.base import Episode, EpisodeFailed, EpisodeFigures, ModelCall, Sampler
from actors.messages import Completion, FinishReason, Prompt, VersionSpan

PROMPT = Prompt(0, "a", "a", np.array([1, 2, 3], dtype=np.int32))

Hook = Callable[..., Any]


async def _called(hook: Hook | None, *args: Any) -> None:
    if hook is not None:
        answer = hook(*args)
        if asyncio.iscoroutine(answer):
            await answer


@dataclass
class ToyEpisodes:
    """An episode has 1 to 3 turns by its place; in between its environment writes 1 or 2 tokens."""

    before_turn: Hook | None = None  # (rollout, turn): called first
    loses: Hook = lambda rollout, turn: False  # (rollout, turn): whether it loses its process then
    closed: int = 0  # times that it came to its end
    begun: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    seeds: set[int] = field(default_factory=set)
    turns: Callable[[int], int] = lambda rollout: 1 + rollout % 3
    per_turn: bool = True

    async def start(self) -> str:
        """It is ready."""
        return "off"

    async def run(self, prompt: Prompt, rollout: int, seed: int, sample: Sampler) -> Episode:
        """See `Episodes`."""
        self.begun.append(rollout)
        self.seeds.add(seed)
        ids = prompt.token_ids.tolist() or [1]
        calls = []
        try:
            for turn in range(self.turns(rollout)):
                await _called(self.before_turn, rollout, turn)
                segment, reason = await sample(ids, 4, turn)
                calls.append(ModelCall(np.asarray(ids, dtype=np.int32), segment, reason))
                if self.loses(rollout, turn):
                    raise EpisodeFailed(
                        "its process died", True, self._episode(rollout, calls).lost()
                    )
                ids = [*ids, *np.asarray(segment.token_ids).tolist(), *range(90, 91 + rollout % 2)]
        finally:
            self.ended.append(rollout)
        return self._episode(rollout, calls)

    def _episode(self, rollout: int, calls: list[ModelCall]) -> Episode:
        return Episode(
            calls=tuple(calls),
            finish_reason=FinishReason.STOP,
            messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            prompt_messages=1,
            rewards={} if self.per_turn else {"environment": float(rollout)},
            turn_rewards=tuple(1.0 + turn for turn in range(len(calls))) if self.per_turn else None,
            figures=EpisodeFigures(tool_calls=len(calls) - 1, extended=len(calls) - 1),
        )

    async def close(self) -> None:
        """Take its time."""
        for _ in range(5):
            await asyncio.sleep(0)
        self.closed += 1


@dataclass
class ToyRollout:
    """A rollout replica: what it answers is a function of the turn. `lost`: it is dead."""

    name: str = "rollout-0"
    version: int = 0
    lost: bool = False
    during: Hook | None = None  # (turns): called first
    asked: list[list[str]] = field(default_factory=list)  # the keys of each call

    @property
    def handle(self) -> Any:
        """As an actor's."""
        return SimpleNamespace(
            sample=SimpleNamespace(remote=lambda turns: Later(self._sample(turns))),
            work=SimpleNamespace(remote=lambda: Later(self._work())),
        )

    async def _work(self) -> Work:
        if self.lost:
            raise died()
        return Work(steps=len(self.asked), tokens=len(self.asked))

    async def _sample(self, turns: Sequence[Turn]) -> list[Completion]:
        self.asked.append([turn.key for turn in turns])
        await _called(self.during, turns)
        if self.lost:
            raise died()
        return [said(turn, self.version) for turn in turns]


def said(turn: Turn, version: int) -> Completion:
    """What the toy policy answers: 1 to 3 tokens by what it sees and its key."""
    word = zlib.crc32(turn.token_ids.tobytes() + turn.key.encode())
    tokens = [10 + word % 7, 20 + word % 5, 30 + word % 3][: 1 + word % 3]
    logprobs = [-0.5 - (word % 11) / 10] * len(tokens)
    return completion(tokens, logprobs, FinishReason.STOP, (VersionSpan(version, len(tokens)),))


def died() -> ActorDiedError:
    """As Ray says it."""
    return ActorDiedError()


class Later:
    """A reference to what a coroutine makes in this loop."""

    def __init__(self, work: Any) -> None:
        self._task = asyncio.ensure_future(work)

    def drop(self) -> None:
        """End the call, as `ray.cancel` does."""
        self._task.cancel()

    def future(self) -> Future[Any]:
        """As Ray's."""
        future: Future[Any] = Future()

        def settle(task: asyncio.Task[Any]) -> None:
            if not future.set_running_or_notify_cancel() or task.cancelled():
                return
            if (error := task.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(task.result())

        self._task.add_done_callback(settle)
        return future


def failing(times: int, at: tuple[int, int], infrastructure: bool = True) -> Hook:
    """A hook by which an episode fails so often at (rollout, turn)."""
    left = [times]

    def hook(rollout: int, turn: int) -> None:
        if (rollout, turn) == at and left[0]:
            left[0] -= 1
            raise EpisodeFailed("its process died", infrastructure)

    return hook
