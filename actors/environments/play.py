"""The turns of one episode with tools: the policy's, and the answers between them.

They follow each other until the policy calls no tool, or a limit cuts the episode; what was said
after its last turn is left out then, for it never saw it. What TRL does otherwise: a call that
cannot be read is answered there, and so are calls after a limit, in a turn of their own; answers of
async tools come last; and one budget holds the tokens of policy and tools together.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actors.environments.base import (
    Episode,
    EpisodeFailed,
    EpisodeFigures,
    EpisodeLimits,
    ModelCall,
    Sampler,
)
from actors.environments.processes import EnvironmentProcess, Outcome, ToolCall, ToolProcesses
from actors.environments.tokens import ChatTokens
from actors.environments.tools import error_text
from actors.messages import FinishReason, Messages
from actors.models.templates import without_nulls
from actors.waiting import all_of

UNKNOWN = "unknown"  # the name in an answer to what names no tool


@dataclass(frozen=True)
class Toolbox:
    """The tools of one environment, or of none."""

    schemas: tuple[dict[str, Any], ...]
    functions: frozenset[str]  # names of those that belong to no environment
    methods: dict[str, bool]  # those of the environment, and whether they are async

    @classmethod
    def of(cls, tools: Sequence[dict[str, Any]], functions: frozenset[str]) -> Toolbox:
        """From a description by `actors.environments.child`."""
        methods = {tool["name"]: tool["async"] for tool in tools if tool["name"] not in functions}
        return cls(tuple(tool["schema"] for tool in tools), functions, methods)


class Clock:
    """The time that an episode has spent on tools and its environment, in `with` blocks."""

    def __init__(self, limits: EpisodeLimits) -> None:
        self.seconds = 0.0  # of blocks that have ended
        self._limits = limits
        self._since: float | None = None  # when the block that is open began

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        assert self._since is not None, "the block was entered"
        self.seconds += time.monotonic() - self._since
        self._since = None

    @property
    def call_limit(self) -> float:
        """Seconds that the next call may take; 0: the episode's time is over."""
        spent = self.seconds + (0.0 if self._since is None else time.monotonic() - self._since)
        left = self._limits.episode_timeout_s - spent
        return max(0.0, min(self._limits.call_timeout_s, left))


class Play:
    """The turns of one episode."""

    def __init__(
        self,
        tokens: ChatTokens,
        limits: EpisodeLimits,
        box: Toolbox,
        functions: ToolProcesses,
        environment: EnvironmentProcess | None,
        clock: Clock,
    ) -> None:
        self._tokens = tokens
        self._limits = limits
        self._box = box
        self._functions = functions
        self._environment = environment
        self._clock = clock
        self._calls: list[ModelCall] = []
        self._sampled = 0  # tokens
        self._figures = EpisodeFigures()

    async def run(self, messages: Messages, seed: int, sample: Sampler) -> Episode:
        """All turns, from the conversation's first `messages`. Raises EpisodeFailed."""
        try:
            ids = self._tokens.prompt(without_nulls(messages), self._box.schemas)
        except ValueError as error:
            raise EpisodeFailed(str(error)) from error
        if len(ids) >= self._limits.max_tokens:
            raise EpisodeFailed(
                f"the prompt has {len(ids)} tokens with its tools, which leaves no room for an "
                f"answer within episodes.max_tokens, {self._limits.max_tokens}; raise it or "
                "shorten the prompt"
            )
        said = list(messages)
        while (reason := await self._turn(ids, said, sample)) is None:
            answers = await self._answers(said[-1].get("tool_calls") or [], seed)
            if self._clock.call_limit == 0:
                reason = FinishReason.TIME
                break
            ids = self._after(ids, answers)
            if len(ids) >= self._limits.max_tokens:
                reason = FinishReason.CONTEXT
                break
            said += answers
            self._count(extended=1)
        self._count(tool_seconds=self._clock.seconds)
        return Episode(tuple(self._calls), reason, said, len(messages), figures=self._figures)

    async def _turn(self, ids: list[int], said: Messages, sample: Sampler) -> FinishReason | None:
        """One turn of the policy, added to `said`: why the episode ends with it, or None."""
        room = self._limits.max_tokens - len(ids)
        left = self._limits.max_sampled_tokens - self._sampled
        segment, finished = await sample(ids, min(left, room), len(self._calls))
        self._calls.append(ModelCall(np.asarray(ids, np.int32), segment, finished))
        self._sampled += len(segment.token_ids)
        sampled = [int(token) for token in segment.token_ids]
        turn = self._tokens.read(ids, sampled, self._box.schemas)
        said.append(turn.message)
        if finished is not FinishReason.STOP:
            return FinishReason.LENGTH if left <= room else FinishReason.CONTEXT
        calls = turn.message.get("tool_calls") or []
        if not calls and not turn.malformed:
            return FinishReason.STOP
        self._count(malformed_calls=int(turn.malformed))
        if len(self._calls) >= self._limits.max_turns or (
            self._figures.tool_calls + len(calls) > self._limits.max_tool_calls
        ):
            return FinishReason.TURNS
        if self._sampled >= self._limits.max_sampled_tokens:
            return FinishReason.LENGTH
        # A limit of 0 seconds is none for a call, so nothing is called then.
        return FinishReason.TIME if self._clock.call_limit == 0 else None

    def _after(self, ids: list[int], answers: Messages) -> list[int]:
        """The next turn's prompt. Raises EpisodeFailed."""
        sampled = [int(token) for token in self._calls[-1].sampled.token_ids]
        try:
            return self._tokens.after(ids, sampled, answers, self._box.schemas)
        except ValueError as error:
            raise EpisodeFailed(f"the tools' answers cannot follow the turn: {error}") from error

    async def _answers(self, calls: Sequence[dict[str, Any]], seed: int) -> Messages:
        """What the tools say, in the order of the calls; no calls: the policy's could not be read.

        Functions run side by side, and so do, beside them, the async methods of the environment,
        after those that are not.
        """
        if not calls:
            said = "The tool call could not be read."
            return [self._message(UNKNOWN, Outcome(said, failed=True))]
        before = self._figures.tool_calls
        self._count(tool_calls=len(calls))
        wanted = [_wanted(call) for call in calls]
        got: dict[int, Outcome] = {}
        limit = self._clock.call_limit

        async def outside(place: int, call: ToolCall) -> None:
            drawn = draw(seed, before + place)
            got[place] = await self._functions.call(call, drawn, limit)

        async def inside(methods: dict[int, ToolCall]) -> None:
            assert self._environment is not None, "it has the methods"
            turns = [[place] for place, call in methods.items() if not self._box.methods[call.name]]
            turns.append([place for place, call in methods.items() if self._box.methods[call.name]])
            for places in filter(None, turns):
                left = self._clock.call_limit  # those before them have taken of it
                if left == 0:
                    got.update(dict.fromkeys(places, Outcome("no time is left", timed_out=True)))
                    continue
                asked = [methods[place] for place in places]
                drawn = draw(seed, before + places[0])
                answers = await self._environment.call(asked, drawn, left)
                got.update(zip(places, answers, strict=True))

        work = []
        methods: dict[int, ToolCall] = {}
        for place, call in enumerate(wanted):
            if isinstance(call, Outcome):
                got[place] = call
            elif call.name in self._box.functions:
                work.append(outside(place, call))
            elif call.name in self._box.methods:
                methods[place] = call
            else:
                got[place] = Outcome(f"Tool {call.name} not found.", failed=True)
        with self._clock:
            await all_of(*work, *([inside(methods)] if methods else []))
        outcomes = [got[place] for place in range(len(calls))]
        self._count(
            tools_failed=sum(outcome.failed for outcome in outcomes),
            tools_timed_out=sum(outcome.timed_out for outcome in outcomes),
        )
        names = [call.name if isinstance(call, ToolCall) else UNKNOWN for call in wanted]
        return [self._message(*pair) for pair in zip(names, outcomes, strict=True)]

    def _message(self, name: str, outcome: Outcome) -> dict[str, Any]:
        text = outcome.text
        if outcome.failed or outcome.timed_out:
            text = error_text(text[: self._limits.max_output_characters])
        return {"role": "tool", "name": name, "content": text}

    def _count(self, **more: float) -> None:
        now = {name: getattr(self._figures, name) + number for name, number in more.items()}
        self._figures = replace(self._figures, **now)


def _wanted(call: dict[str, Any]) -> ToolCall | Outcome:
    """What a parsed call asks for, or why it is none, in TRL's words."""
    kind = call.get("type")
    if kind != "function":
        return Outcome(f"Unsupported tool call type: {kind}", failed=True)
    return ToolCall(call["function"]["name"], call["function"]["arguments"])


def draw(seed: int, call: int) -> int:
    """The seed of what the episode's tool call number `call` draws. 62 bits."""
    name = f"{seed}/{call}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 2
