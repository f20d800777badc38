"""A tokenizer of bytes with Qwen's chat format, and a policy that says what a test wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.messages import FinishReason, Segment, VersionSpan

Text = str | Callable[[str], str]


def make_tokenizer() -> Any:
    """Every byte is a token, and Qwen's special ones are one each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl.chat_template_utils import qwen3_instruct_2507_chat_template

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    core.add_tokens([AddedToken(t) for t in ("<tool_call>", "</tool_call>", "<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = qwen3_instruct_2507_chat_template
    return tokenizer


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


@dataclass
class Said:
    message: dict[str, Any]
    malformed: bool = False


class Chat:
    """Messages to ids and back with the tokenizer's own chat template."""

    def __init__(self, tokenizer: Any) -> None:
        from trl.chat_template_utils import add_response_schema

        self.tokenizer = add_response_schema(tokenizer)

    def _ids(self, messages: list[dict[str, Any]], tools: Any, more: bool) -> list[int]:
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=False, add_generation_prompt=more
        )

    def prompt(self, messages: list[dict[str, Any]], tools: Any) -> list[int]:
        return self._ids(messages, tools or None, True)

    def between(self, new: list[dict[str, Any]], cut: bool = False) -> list[int]:
        dummy = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        end = self.tokenizer.eos_token_id
        before = self._ids(dummy, None, False)
        before = before[: len(before) - before[::-1].index(end) - cut]
        after = self._ids([*dummy, *new], None, True)
        assert after[: len(before)] == before
        return after[len(before) :]

    def read(self, prompt_ids: Sequence[int], sampled: Sequence[int]) -> Said:
        from trl.chat_template_utils import parse_response

        return Said(parse_response(self.tokenizer, list(sampled), prefix=list(prompt_ids)))

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
