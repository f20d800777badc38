"""The transformers rollout engine: one call at a time through the model's own forward pass.

What a call samples depends on the weights, its prompts and its keys alone, never on what else is in
flight: this is what makes runs bit-reproducible. A call is of one policy version, because weights
change only between calls.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from actors.engines.base import (
    Turn,
    WeightMismatch,
    Work,
    completion,
    draw_seed,
    stop_token_ids,
)
from actors.messages import Completion, FinishReason, Sampling, VersionSpan
from actors.models.adapters import is_adapter
from actors.models.loading import load_causal_lm
from actors.specs import ModelSpec, RolloutSpec
from actors.transfer.bundle import WeightBundle

T = TypeVar("T")


class _Cancelled(Exception):
    """The caller of a generation has gone."""


class TransformersEngine:
    """A `RolloutEngine` that needs nothing but transformers.

    All work on the model is done by one thread; that thread is the lock. Calls wait their turn
    outside of it, so an update of the weights comes right after the call that is running.
    """

    max_concurrent_groups = 2  # one that runs and one that waits, so that it is never idle

    def __init__(
        self, model: ModelSpec, spec: RolloutSpec, version: int, sequences: int, seed: int
    ) -> None:
        """Nothing is loaded yet; `version` is the policy version of the weights in `model.name`.

        Its batch is a call's, and each call's draws have a key, so neither of the last two counts.
        """
        self._spec = model.model_copy(update={"gradient_checkpointing": False})
        # A model that has taken its adapter in, as one that is evaluated, is sent none.
        self._adapts = spec.weight_sync.name == "adapter" and model.lora is not None
        self._version = version
        self._work = Work()
        self._waiting = 0  # completions of calls whose turn has not come
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        self._queue = asyncio.Lock()
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = None
        self._stops = torch.empty(0, dtype=torch.long)

    @property
    def version(self) -> int:
        """The policy version of the loaded weights."""
        return self._version

    async def start(self) -> None:
        """Load the model onto the GPU where there is one."""
        await self._run(self._load)

    @property
    def work(self) -> Work:
        """What it has done since its start; it has no cache of a fixed size."""
        return self._work

    async def sample(
        self, token_ids: np.ndarray, sampling: Sampling, n: int, key: str
    ) -> list[Completion]:
        """`n` completions of `token_ids`, bit for bit those of the key; other calls wait."""
        draws = uniforms([draw_seed(key, row) for row in range(n)], sampling.max_tokens)
        limits = [sampling.max_tokens] * n
        return await self._in_turn([token_ids], limits, sampling.temperature, draws)

    async def sample_turns(self, turns: Sequence[Turn]) -> list[Completion]:
        """A completion of each of `turns`, bit for bit those of these turns together; other calls
        wait."""
        limits = [turn.sampling.max_tokens for turn in turns]
        draws = uniforms([draw_seed(turn.key, 0) for turn in turns], max(limits))
        prompts = [turn.token_ids for turn in turns]
        if all(np.array_equal(prompt, prompts[0]) for prompt in prompts):
            prompts = prompts[:1]
        return await self._in_turn(prompts, limits, turns[0].sampling.temperature, draws)

    async def _in_turn(
        self,
        prompts: Sequence[np.ndarray],
        limits: Sequence[int],
        temperature: float,
        draws: torch.Tensor,
    ) -> list[Completion]:
        """One batch, when its turn has come."""
        stop = threading.Event()
        rows = len(limits)
        self._waiting += rows
        try:
            await self._queue.acquire()
        finally:
            self._waiting -= rows
        try:
            return await self._run(lambda: self._sample(prompts, limits, temperature, draws, stop))
        finally:
            stop.set()  # a cancelled call's thread ends at the next token
            self._queue.release()

    async def load_weights(self, bundle: WeightBundle) -> float:
        """Copy `bundle` into the model, all of it or nothing; there is no cache to reset.

        Raises:
            WeightMismatch: names or shapes are not those of the model.
        """
        return await self._run(lambda: self._load_weights(bundle))

    async def check(self) -> None:
        """This engine lives as long as its process."""

    async def answers(self) -> None:
        """Its one thread is this process's: who hears this has its answer."""

    async def close(self) -> None:
        """Wait for the running call and let the model go."""
        await asyncio.to_thread(self._thread.shutdown)
        self._model = None

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _load(self) -> None:
        model = load_causal_lm(self._spec, lora=self._adapts)
        config = model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            # They are for a loss, which takes no mask that is longer than what is read now.
            config.output_router_logits = False
        self._model = model.to(self._device).eval()
        self._stops = torch.tensor(stop_token_ids(self._spec), device=self._device)

    @torch.no_grad()
    def _load_weights(self, bundle: WeightBundle) -> float:
        """Seconds that it takes."""
        began = time.monotonic()
        for parameter, tensor in matched_parameters(self._model, bundle, self._adapts):
            parameter.copy_(tensor)
        self._version = bundle.version
        return time.monotonic() - began

    def _sample(
        self,
        prompts: Sequence[np.ndarray],
        limits: Sequence[int],
        temperature: float,
        draws: torch.Tensor,
        stop: threading.Event,
    ) -> list[Completion]:
        tokens, logprobs, lengths, ended = self._decode(prompts, limits, temperature, draws, stop)
        return [
            completion(
                tokens[row, :length],
                logprobs[row, :length],
                FinishReason.STOP if ended[row] else FinishReason.LENGTH,
                (VersionSpan(self._version, length),),
            )
            for row, length in enumerate(lengths)
        ]

    @torch.inference_mode()
    def _decode(
        self,
        prompts: Sequence[np.ndarray],
        limits: Sequence[int],
        temperature: float,
        draws: torch.Tensor,
        stop: threading.Event,
    ) -> tuple[Any, Any, list[int], list[bool]]:
        """Token ids [n, T], their log-probs [n, T], lengths [n], and which rows [n] ended by EOS.

        Row i samples `limits[i]` tokens at most, by its numbers in `draws` [n, T]. One prompt is
        run once, and its cache repeated for the n rows; else each row has its own, padded on the
        left. Rows that have ended leave the batch when they are half of it, so that ragged lengths
        cost what their tokens cost.
        """
        rows, longest = draws.shape
        uniform = draws.to(self._device)
        tokens = torch.zeros(rows, longest, dtype=torch.long, device=self._device)
        logprobs = torch.zeros(rows, longest, device=self._device)
        most = torch.tensor(limits, device=self._device)
        lengths = most.clone()
        ended = torch.zeros(rows, dtype=torch.bool, device=self._device)
        active, alive = torch.arange(rows, device=self._device), rows

        cache = DynamicCache(config=self._model.config)
        ids, seen = padded_left(prompts)
        seen = None if seen is None else seen.to(self._device)
        logits = self._forward(ids.to(self._device), cache, seen)
        if len(prompts) == 1:
            logits = logits.expand(rows, -1)
            cache.batch_repeat_interleave(rows)
        for step in range(longest):
            if stop.is_set():
                raise _Cancelled
            drawn, drawn_logprobs = draw(logits, temperature, uniform[active, step])
            self._work = self._work.after(alive, alive, self._waiting)
            # Rows that have ended are still computed until they leave; what they say is not kept.
            tokens[active, step] = drawn
            logprobs[active, step] = drawn_logprobs
            running = ~ended[active] & (step < most[active])
            stops = torch.isin(drawn, self._stops) & running
            lengths[active[stops]] = step + 1
            ended[active[stops]] = True
            kept = (running & ~stops & (step + 1 < most[active])).nonzero()[:, 0]
            alive = len(kept)
            if alive == 0:
                break
            if 2 * alive <= len(active):
                active, drawn = active[kept], drawn[kept]
                cache.batch_select_indices(kept)
                seen = None if seen is None else seen[kept]
            if seen is not None:
                seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
            logits = self._forward(drawn[:, None], cache, seen)
        return tokens.cpu().numpy(), logprobs.cpu().numpy(), lengths.tolist(), ended.tolist()

    def _forward(
        self, ids: torch.Tensor, cache: DynamicCache, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits [rows, V] after the last of `ids` [rows, tokens], float32. `seen` [rows, all
        tokens so far] is 0 where a row is padded; None: nowhere."""
        places: dict[str, torch.Tensor] = {}
        if seen is not None:
            positions = (seen.cumsum(-1) - 1).clamp(min=0)
            places = {
                "attention_mask": seen,
                "position_ids": positions[:, -ids.shape[1] :],
            }
        output = self._model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **places
        )
        return output.logits[:, -1].float()


def padded_left(prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids [n, P] of prompts that end together, and [n, P] 1 where they are not padding; None where
    none is."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    seen = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(np.asarray(prompt, dtype=np.int64))
        seen[row, width - len(prompt) :] = 1
    return ids, None if bool(seen.all()) else seen


def uniforms(seeds: Sequence[int], tokens: int) -> torch.Tensor:
    """Uniform numbers [rows, tokens] float64, each row by a generator of its own, on any device."""
    return torch.stack(
        [
            torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
    )


def draw(
    logits: torch.Tensor, temperature: float, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row of `logits` [rows, V] and its log-prob at `temperature`: [rows], [rows].

    Temperature 0 takes the likeliest token, with its log-prob at temperature 1. Otherwise the
    cumulative distribution is inverted at `uniform` [rows], in float64, so that no token of
    probability zero can be drawn by rounding.
    """
    logprobs = torch.log_softmax(logits / temperature if temperature > 0 else logits, dim=-1)
    if temperature > 0:
        cumulative = logprobs.exp().cumsum(dim=-1, dtype=torch.float64)
        wanted = uniform[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, wanted, right=True)
        tokens = tokens.clamp_(max=logits.shape[-1] - 1)
    else:
        tokens = logprobs.argmax(dim=-1, keepdim=True)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


def matched_parameters(
    model: nn.Module, bundle: WeightBundle, adapter: bool = False
) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """(parameter, its new value) for every parameter of `model`, or of its `adapter` alone; nothing
    is written.

    Raises:
        WeightMismatch: a parameter that the bundle lacks, a name that the model lacks (but for a
            redundant tied `lm_head.weight`), or a shape that differs.
    """
    every = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - set(every)
    parameters = {name: p for name, p in every.items() if not adapter or is_adapter(name)}
    new = {name: tensor for name, tensor in bundle.items() if name not in tied}
    for kind, names in (
        ("lacks", sorted(parameters.keys() - new.keys())),
        ("has, and the model does not,", sorted(new.keys() - parameters.keys())),
    ):
        if names:
            raise WeightMismatch(
                f"weights of version {bundle.version}: the bundle {kind} {names[0]!r} "
                f"({len(names)} such names); policy and rollout must load the same model"
            )
    for name, parameter in parameters.items():
        if parameter.shape != new[name].shape:
            raise WeightMismatch(
                f"weights of version {bundle.version}: {name!r} is {tuple(new[name].shape)} in the "
                f"bundle and {tuple(parameter.shape)} in the rollout model"
            )
    return [(parameter, new[name]) for name, parameter in parameters.items()]
