"""Answers as clients read them."""

from __future__ import annotations

import itertools

import numpy as np

from actors.environments.base import ModelCall
from actors.environments.conversations import Answer
from actors.environments.openai_api import CompletionRequest, completion_answer
from actors.messages import FinishReason, Segment, VersionSpan


class Token(str):
    """A token's text that counts how often its length is asked for."""

    asked = 0

    def __len__(self) -> int:
        Token.asked += 1
        return super().__len__()


def answer_of(tokens: int) -> Answer:
    ids = np.arange(tokens, dtype=np.int32)
    sampled = Segment(ids, np.zeros(tokens, np.float32), (VersionSpan(0, tokens),))
    call = ModelCall(np.array([1], dtype=np.int32), sampled, FinishReason.STOP)
    return Answer("a", call, [], {"role": "assistant", "content": ""}, (), "")


def test_offsets_of_a_long_answer_are_where_its_tokens_begin_and_cost_a_pass() -> None:
    tokens = [Token("x" * (index % 4)) for index in range(3000)]
    asked = CompletionRequest(prompt=[1], logprobs=1)
    choice = completion_answer(answer_of(len(tokens)), asked, "", tokens, 0)["choices"][0]
    assert Token.asked == len(tokens)
    lengths = [index % 4 for index in range(len(tokens))]
    begins = [0, *itertools.accumulate(lengths)][:-1]
    assert choice["logprobs"]["text_offset"] == begins
