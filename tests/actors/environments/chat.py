"""A tiny model's folder with a tokenizer of the Qwen3 kind, and what it would write."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.environments.base import EpisodeLimits
from actors.messages import FinishReason, Prompt, Segment, VersionSpan

LIMITS = EpisodeLimits(
    max_turns=8,
    max_tool_calls=16,
    max_sampled_tokens=2048,
    max_tokens=32768,
    call_timeout_s=30.0,
    episode_timeout_s=120.0,
    max_output_characters=2000,
)


def make_tokenizer(template: str | None = None) -> Any:
    """Bytes and a few pairs of them as tokens, with Qwen3's special ones and, by default, its chat
    template. What is sampled can so be what no tokenizer would make of its text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl.chat_template_utils import qwen3_chat_template

    pairs = [("\u0120", "\u0120"), ("\u010a", "\u010a"), ("e", "r"), ("{", '"'), (":", "\u0120")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tags = ("think", "tool_call", "tool_response")
    tokenizer.add_tokens(
        [AddedToken(f"<{end}{t}>", normalized=False) for t in tags for end in ("", "/")]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    made.chat_template = template or qwen3_chat_template
    return made


def make_model(folder: Path, tokenizer: Any) -> None:
    """A folder that holds a configuration and the tokenizer; no weights."""
    from transformers import Qwen3Config

    Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=8192,
        architectures=["Qwen3ForCausalLM"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def call_text(name: str, /, **arguments: Any) -> str:
    """A tool call as the model writes it."""
    said = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{said}\n</tool_call>"


def deep_call(levels: int) -> str:
    """A call whose arguments are nested so deep."""
    said = f'{{"name": "tell", "arguments": {{"a": {"[" * (levels - 1)}{"]" * (levels - 1)}}}}}'
    return f"<tool_call>\n{said}\n</tool_call>"


def prompt_of(source: Any, **columns: Any) -> Prompt:
    """A row, whose rendered text plays no part here."""
    import numpy as np

    return Prompt(0, source, "", np.zeros(0, np.int32), columns)


class Script:
    """A policy that writes what it is told to, turn by turn, and keeps what it saw."""

    def __init__(self, tokenizer: Any, turns: Sequence[str | Sequence[int]]) -> None:
        """Each turn as text, which an end-of-turn token follows, or as ids."""
        self.turns = [
            [*tokenizer(turn, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            if isinstance(turn, str)
            else list(turn)
            for turn in turns
        ]
        self.seen: list[list[int]] = []
        self._begun = [asyncio.Event() for _ in turns]
        self._end = tokenizer.eos_token_id

    async def turn(self, turn: int) -> None:
        """Wait until a turn, counted from 0, is asked for."""
        await self._begun[turn].wait()

    async def __call__(
        self, token_ids: Any, max_tokens: int, turn: int
    ) -> tuple[Segment, FinishReason]:
        assert turn == len(self.seen)
        self.seen.append([int(token) for token in token_ids])
        self._begun[turn].set()
        said = self.turns[turn][:max_tokens]
        reason = FinishReason.STOP if said[-1:] == [self._end] else FinishReason.LENGTH
        return Segment(said, [-1.0] * len(said), (VersionSpan(0, len(said)),)), reason
