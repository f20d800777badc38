"""What tests of rollout engines share: a replica whose methods return futures, tiny models,
prompts, and log-probs that are computed once more."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from actors.engines.base import Turn
from actors.engines.specs import EngineSpec
from actors.groups import Group
from actors.messages import GroupSampling, Prompt, Sampling
from actors.rollout import RolloutActor
from actors.specs import ModelSpec, RolloutSpec

EOS = 1
TOLERANCE = 1e-4
WAIT_S = 240.0  # for a shared machine; an idle one needs a fraction


class Replica:
    """A rollout replica whose methods return futures, in this process or in a Ray actor."""

    def __init__(
        self, name: str, call: Callable[..., Future[Any]], here: RolloutActor | None = None
    ) -> None:
        self.name = name
        self.here = here
        self.call = call
        self.handle: Any = None  # where it is a Ray actor
        self.pid: int = self.get("start")["pid"]

    def get(self, method: str, *args: Any) -> Any:
        return self.call(method, *args).result(WAIT_S)

    def in_flight(self) -> int:
        """Groups in flight in a replica of this process."""
        assert self.here is not None
        return len(self.here._calls)

    def group(self, prompt: Prompt, sampling: GroupSampling) -> Group:
        group: Group = self.get("generate", prompt, sampling)
        return group


def tiny_policy(seed: int, untied_qwen3: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    kind, config = (
        (Qwen3ForCausalLM, Qwen3Config) if untied_qwen3 else (Qwen2ForCausalLM, Qwen2Config)
    )
    return kind(
        config(
            vocab_size=97,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=not untied_qwen3,
            initializer_range=0.08,  # random, but far from uniform
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    )


def policies_of(folder: Path) -> dict[int, PreTrainedModel]:
    """The model at three policy versions; 0 is what the folder holds."""
    first = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {0: first.eval(), 1: tiny_policy(seed=1).eval(), 2: tiny_policy(seed=2).eval()}


def tokenizer_of_characters() -> PreTrainedTokenizerFast:
    characters = ["<pad>", "<eos>", *(chr(code) for code in range(32, 127))]
    backend = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def model_spec(folder: Path) -> ModelSpec:
    return ModelSpec(name=str(folder))


def rollout_spec(engine: EngineSpec) -> RolloutSpec:
    return RolloutSpec(engine=engine, max_prompt_length=512, max_completion_length=400)


def prompt_of(row: int, tokens: int = 20) -> Prompt:
    ids = (np.arange(tokens, dtype=np.int32) * (row + 3)) % 90 + 5
    return Prompt(row=row, source="", text="", token_ids=ids)


def sampling_of(**changes: Any) -> GroupSampling:
    plain = GroupSampling(completions=8, max_tokens=48, temperature=1.0, seed=11, group_id=0)
    return replace(plain, **changes)


def labels_of(group: Group) -> set[int]:
    return {span.version for spans in group[0].version_spans for span in spans}


@torch.no_grad()
def worst_error(group: Group, policies: dict[int, PreTrainedModel], temperature: float) -> float:
    """The largest |reported - recomputed| log-prob, each token under the version of its label."""
    record, tensors = group
    worst = 0.0
    for index, spans in enumerate(record.version_spans):
        where = tensors.completion(index)
        ids = np.concatenate([tensors.prompt_ids, tensors.token_ids[where]]).astype(np.int64)
        sequence = torch.from_numpy(ids)[None]
        start = len(tensors.prompt_ids)
        for span in spans:
            logits = policies[span.version](sequence).logits[0, start - 1 : start - 1 + span.tokens]
            logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
            expected = logprobs.gather(-1, sequence[0, start : start + span.tokens, None])[:, 0]
            offset = where.start + start - len(tensors.prompt_ids)
            reported = tensors.logprobs[offset : offset + span.tokens]
            worst = max(worst, float(np.abs(reported - expected.numpy()).max()))
            start += span.tokens
    return worst


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Prompt, max_tokens: int) -> list[int]:
    ids = torch.as_tensor(prompt.token_ids, dtype=torch.long)[None]
    chosen: list[int] = []
    while len(chosen) < max_tokens and (not chosen or chosen[-1] != EOS):
        chosen.append(int(model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[chosen[-1]]])], dim=1)
    return chosen


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def turn_of(row: int, tokens: int) -> Turn:
    token_ids = prompt_of(row, tokens=tokens).token_ids
    return Turn(token_ids, Sampling(max_tokens=8 + 20 * row, temperature=1.0), f"11/0/{row}/0")
