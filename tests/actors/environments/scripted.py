"""A policy that says what a test wants, when it wants it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.environments.tokens import ChatTokens
from actors.messages import FinishReason, Segment, VersionSpan


@dataclass(frozen=True)
class Chat:
    tokens: ChatTokens
    tokenizer: Any


Text = str | Callable[[str], str]


class Script:
    """A sampler that says one text after the other, each with its end of turn.

    A text may be a function of the prompt's text. Budgets cut it as an engine would.
    """

    def __init__(self, tokenizer: Any, said: Sequence[Text], version: int = 3) -> None:
        self._tokenizer = tokenizer
        self._said = list(said)
        self._version = version
        self.prompts: list[str] = []
        self._begun = asyncio.Condition()
        self.go_on = asyncio.Event()  # cleared: answers wait
        self.go_on.set()

    async def __call__(
        self, token_ids: Sequence[int] | np.ndarray, max_tokens: int, turn: int
    ) -> tuple[Segment, FinishReason]:
        prompt = self._tokenizer.decode(token_ids)
        self.prompts.append(prompt)
        text = self._said.pop(0)
        async with self._begun:
            self._begun.notify_all()
        await self.go_on.wait()
        text = text if isinstance(text, str) else text(prompt)
        ids = [*self._tokenizer.encode(text), self._tokenizer.eos_token_id]
        cut = ids[:max_tokens]
        logprobs = np.array([-(turn + 1) - i / 1000 for i in range(len(cut))], dtype=np.float32)
        segment = Segment(
            np.array(cut, dtype=np.int32), logprobs, (VersionSpan(self._version, len(cut)),)
        )
        return segment, FinishReason.STOP if len(cut) == len(ids) else FinishReason.LENGTH

    async def asked(self, times: int) -> None:
        """Wait until it was asked so often."""
        async with asyncio.timeout(20), self._begun:
            await self._begun.wait_for(lambda: len(self.prompts) >= times)
