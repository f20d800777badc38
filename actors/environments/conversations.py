"""What an agent and the model said in one episode: the calls, and the budgets that bound them.

A request names its whole history, as messages or as token ids. Invariant: a history that goes on
from an earlier answer is that answer's own ids and what is new, never text tokenised again; any
other one is rendered anew, and is a row of its own unless it comes to the same ids. Budgets are
kept whatever calls run beside each other. Knows no HTTP and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.environments.base import EpisodeFigures, EpisodeLimits, ModelCall, Sampler
from actors.environments.chat_messages import canonical, may_follow, said
from actors.environments.record import paths_of
from actors.environments.tokens import ChatTokens
from actors.messages import FinishReason, Messages

Tools = Sequence[dict[str, Any]]


COUNTED = ("tool_calls", "malformed_calls", "extended", "realigned", "forked")


class Refused(Exception):
    """A request that gets no answer; `reason` where a limit of the episode is the cause."""

    def __init__(self, message: str, code: str, reason: FinishReason | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason


class ConversationClosed(Exception):
    """The episode has ended."""


@dataclass(frozen=True)
class Answer:
    """One answer of the model, as the agent gets it."""

    id: str
    call: ModelCall
    asked: Messages
    message: dict[str, Any]
    history: tuple[str, ...]  # canonical messages, the answer's included; none for token ids
    tools: str


class Conversation:
    """The calls of one episode."""

    def __init__(self, tokens: ChatTokens, sample: Sampler, limits: EpisodeLimits) -> None:
        self._tokens = tokens
        self._sample = sample
        self.limits = limits
        self._begun = time.monotonic()
        self._answers: dict[int, Answer] = {}  # by their number; those that have ended
        self._started = 0
        self._sampled = 0  # tokens
        self._reserved: dict[int, int] = {}  # tokens that a call in flight may sample yet
        self._ended = asyncio.Condition()  # a call has
        self._sampling_since = 0.0
        self._sampling_seconds = 0.0
        self._closed = False
        self._cut: FinishReason | None = None  # by which limit requests are refused, since a call
        self._last_cut: FinishReason | None = None  # by which limit the last answer was
        self._counts = dict.fromkeys(COUNTED, 0)
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Raises what the sampler did, once it did."""

    async def chat(
        self,
        messages: Messages,
        tools: Tools,
        max_tokens: int | None = None,
        parallel_tool_calls: bool = True,
    ) -> Answer:
        """The model's answer to messages that `normalised` has made.

        Raises:
            Refused: a budget is used up, or the chat template refuses the messages.
            ConversationClosed: the episode has ended.
        """
        self._require_turn()
        offered = canonical(tools)
        history = tuple(said(message) for message in messages)
        try:
            ids, how = self._prompt(messages, history, tools, offered)
        except ValueError as error:
            raise Refused(str(error), "invalid_messages") from error
        number, call = await self._call(ids, max_tokens, how)
        message = self._read(number, call, tools, parallel_tool_calls)
        return self._keep(number, call, messages, message, (*history, said(message)), offered)

    async def complete(self, prompt_ids: Sequence[int], max_tokens: int | None = None) -> Answer:
        """What the model writes after `prompt_ids`. Raises as `chat`; Refused too where an id is
        none of the model's."""
        self._require_turn()
        # The model may have more rows than its tokenizer has tokens, and sample one of them.
        sampled = (answer.call.sampled.token_ids for answer in self._answers.values())
        known = max(
            self._tokens.vocabulary, 1 + max((int(i) for s in sampled for i in s), default=0)
        )
        unknown = next((token for token in prompt_ids if not 0 <= token < known), None)
        if unknown is not None:
            # An engine without a tokenizer looks up whatever it is given.
            raise Refused(
                f"the prompt has token {unknown}, and the model knows 0 to {known - 1}; give ids "
                "of its own tokenizer",
                "invalid_request",
            )
        how = self._place(prompt_ids, "extended")
        number, call = await self._call(prompt_ids, max_tokens, how)
        asked = [{"role": "user", "content": self._tokens.text(prompt_ids)}]
        return self._keep(number, call, asked, self._read(number, call), (), "")

    def close(self) -> None:
        """Answer no more."""
        self._closed = True

    @property
    def answers(self) -> tuple[Answer, ...]:
        """Those that have ended, in the order in which they began."""
        return tuple(self._answers[number] for number in sorted(self._answers))

    @property
    def finish_reason(self) -> FinishReason:
        """Which limit cut the episode, or STOP. A refusal cuts it where no call has begun since."""
        return self._cut or self._last_cut or FinishReason.STOP

    @property
    def refused(self) -> bool:
        """Whether a limit keeps the agent from an answer: no call has begun since."""
        return self._cut is not None

    @property
    def agent_seconds(self) -> float:
        """Since the beginning, the time while the model was asked left out."""
        now = time.monotonic()
        sampling = self._sampling_seconds
        if self._reserved:
            sampling += now - self._sampling_since
        return now - self._begun - sampling

    def figures(self) -> EpisodeFigures:
        """Counts and times up to now."""
        return EpisodeFigures(tool_seconds=self.agent_seconds, **self._counts)

    def messages(self) -> tuple[Messages, int]:
        """The conversation of the last call, which is the episode's last row too, and how many of
        its messages stood before the model's first answer."""
        answers = self.answers
        *_, path = paths_of([answer.call for answer in answers])
        last = answers[path[-1]]
        return [*last.asked, last.message], len(answers[path[0]].asked)

    def _require_turn(self) -> None:
        """Raises Refused, ConversationClosed."""
        if self._closed:
            raise ConversationClosed
        if self._started >= self.limits.max_turns:
            raise self._refuse(
                f"the episode has had its {self.limits.max_turns} turns (episodes.max_turns)",
                FinishReason.TURNS,
            )
        if self._counts["tool_calls"] > self.limits.max_tool_calls:
            raise self._refuse(
                f"the episode has had its {self.limits.max_tool_calls} calls of tools "
                "(episodes.max_tool_calls)",
                FinishReason.TURNS,
            )

    def _refuse(self, message: str, reason: FinishReason) -> Refused:
        self._cut = self._cut or reason
        code = "context_length_exceeded" if reason == FinishReason.CONTEXT else "episode_limit"
        return Refused(message, code, reason)

    def _prompt(
        self, messages: Messages, history: tuple[str, ...], tools: Tools, offered: str
    ) -> tuple[list[int], str | None]:
        """The ids that stand for a history, and how it was come by. Raises ValueError."""
        begun = [
            (len(answer.history), number)
            for number, answer in self._answers.items()
            if answer.history and answer.tools == offered
            if history[: len(answer.history)] == answer.history
        ]
        if begun:
            length, number = max(begun)
            new, call = messages[length:], self._answers[number].call
            if may_follow(new):
                cut = call.finish_reason != FinishReason.STOP
                last = _ints(call.prompt_ids), _ints(call.sampled.token_ids)
                with contextlib.suppress(ValueError):  # a template that does not append
                    return self._tokens.after(*last, new, tools, cut), "extended"
        ids = self._tokens.prompt(messages, tools)
        return ids, self._place(ids, "realigned")

    def _place(self, ids: Sequence[int], agrees: str) -> str | None:
        """`agrees` where `ids` begin with what an earlier call ended with, else that they fork."""
        if not self._answers:
            return None
        given = np.asarray(ids, dtype=np.int32)
        wholes = (np.asarray(_whole(answer.call)) for answer in self._answers.values())
        begins = any(np.array_equal(given[: len(whole)], whole) for whole in wholes)
        return agrees if begins else "forked"

    async def _call(
        self, ids: Sequence[int], max_tokens: int | None, how: str | None
    ) -> tuple[int, ModelCall]:
        """Sample within the budgets. Raises Refused, ConversationClosed."""
        room = self.limits.max_tokens - len(ids)
        if room < 1:
            raise self._refuse(
                f"the conversation is {len(ids)} tokens and {self.limits.max_tokens} is the most "
                "it may be with an answer (episodes.max_tokens)",
                FinishReason.CONTEXT,
            )
        async with self._ended:
            await self._ended.wait_for(lambda: self._free > 0 or not self._reserved)
            self._require_turn()
            if self._free < 1:
                raise self._refuse(
                    f"the episode has sampled its {self.limits.max_sampled_tokens} tokens "
                    "(rollout.max_completion_length)",
                    FinishReason.LENGTH,
                )
            number = self._started
            self._started += 1
            self._cut = None  # the agent has found a way on
            free = self._free
            allowed = min(room, free, max_tokens or room)
            if not self._reserved:
                self._sampling_since = time.monotonic()
            self._reserved[number] = allowed
        if how is not None:
            self._counts[how] += 1
        prompt_ids = np.asarray(ids, dtype=np.int32)
        spent = 0
        try:
            segment, reason = await self._sample(prompt_ids, allowed, number)
            spent = len(segment.token_ids)
        except Exception as error:
            if not self.broken.done():
                self.broken.set_exception(error)
                self.broken.exception()  # it may be that nobody waits for it any more
            raise
        finally:
            async with self._ended:
                del self._reserved[number]
                self._sampled += spent
                if not self._reserved:
                    self._sampling_seconds += time.monotonic() - self._sampling_since
                self._ended.notify_all()
        self._last_cut = None
        if reason.truncated and allowed == min(room, free):
            self._last_cut = FinishReason.CONTEXT if room < free else FinishReason.LENGTH
        return number, ModelCall(prompt_ids, segment, reason)

    @property
    def _free(self) -> int:
        """Tokens that the episode may yet sample, beside calls in flight."""
        return self.limits.max_sampled_tokens - self._sampled - sum(self._reserved.values())

    def _read(
        self, number: int, call: ModelCall, tools: Tools = (), parallel: bool = True
    ) -> dict[str, Any]:
        """What the model said, its calls named and counted; the first alone without `parallel`."""
        read = self._tokens.read(_ints(call.prompt_ids), _ints(call.sampled.token_ids), tools)
        self._counts["malformed_calls"] += read.malformed
        calls = read.message.get("tool_calls") or ()
        if not calls:
            return read.message
        # Nine letters and digits, as some chat templates want them; alike in runs alike.
        named = [
            {"id": f"call{number:03d}{i:02d}", **c}
            for i, c in enumerate(calls if parallel else calls[:1])
        ]
        self._counts["tool_calls"] += len(named)
        return {**read.message, "tool_calls": named}

    def _keep(
        self,
        number: int,
        call: ModelCall,
        asked: Messages,
        message: dict[str, Any],
        history: tuple[str, ...],
        tools: str,
    ) -> Answer:
        answer = Answer(f"chatcmpl-{number}", call, list(asked), message, history, tools)
        self._answers[number] = answer
        return answer


def _ints(ids: Sequence[int] | np.ndarray) -> list[int]:
    return [int(token) for token in ids]


def _whole(call: ModelCall) -> list[int]:
    return _ints(call.prompt_ids) + _ints(call.sampled.token_ids)
