"""The transformers engine: what it repeats bit for bit, joins, gives up and refuses."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engines.base import Turn, WeightMismatch
from actors.engines.specs import TransformersSpec
from actors.engines.transformers import TransformersEngine, draw, uniforms
from actors.groups import Group
from actors.messages import Completion, Sampling
from actors.rollout import RolloutActor
from actors.transfer.bundle import WeightBundle
from actors.transfer.specs import AdapterSpec
from tests.actors.engines.replicas import (
    TOLERANCE,
    WAIT_S,
    Replica,
    labels_of,
    model_spec,
    prompt_of,
    rollout_spec,
    sampling_of,
    tiny_policy,
    tokenizer_of_characters,
    turn_of,
    until,
    worst_error,
)
from tests.actors.policy_cases import causal_lm


@pytest.fixture
def sampled(transformers_replica: Replica, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the calls that the transformers engine finishes in a test."""
    assert transformers_replica.here is not None
    engine = transformers_replica.here._engine
    keys: list[str] = []
    sample = engine.sample

    async def noted(token_ids: np.ndarray, sampling: Sampling, n: int, key: str) -> Any:
        completions = await sample(token_ids, sampling, n, key)
        keys.append(key)
        return completions

    monkeypatch.setattr(engine, "sample", noted)
    return keys


@pytest.mark.slow
def test_a_bundle_that_does_not_fit_is_refused_by_name_and_changes_nothing(
    transformers_replica, policies, bundles
):
    transformers_replica.get("load_weights", bundles[0])
    whole = dict(policies[1].named_parameters())
    name = "model.layers.1.mlp.up_proj.weight"
    lacking = {key: value for key, value in whole.items() if key != name}
    for tensors, message in (
        (lacking, f"lacks '{name}'"),
        (whole | {"model.extra": torch.ones(1)}, "does not, 'model.extra'"),
        (whole | {name: torch.ones(2, 2)}, rf"'{name}' is \(2, 2\)"),
    ):
        with pytest.raises(WeightMismatch, match=message):
            transformers_replica.get("load_weights", WeightBundle.pack(9, tensors.items()))
    group = transformers_replica.group(prompt_of(0), sampling_of())
    assert labels_of(group) == {0}
    assert worst_error(group, policies, 1.0) < TOLERANCE


@pytest.mark.slow
def test_turns_are_bit_identical_whatever_else_is_in_flight(transformers_replica, bundles):
    transformers_replica.get("load_weights", bundles[0])
    turns = [turn_of(row, tokens) for row, tokens in enumerate((3, 40, 11))]
    alone = transformers_replica.get("sample", turns)
    crowd = [transformers_replica.call("sample", [turn_of(row, 7)]) for row in range(3)]
    again = transformers_replica.get("sample", turns)
    for call in crowd:
        call.result(WAIT_S)
    for one, other in zip(alone, again, strict=True):
        assert one.segments[0].token_ids.tolist() == other.segments[0].token_ids.tolist()
        assert one.segments[0].logprobs.tobytes() == other.segments[0].logprobs.tobytes()


@pytest.mark.slow
def test_a_mixture_whose_config_asks_for_a_loss_of_its_routers_answers_turns_of_any_length(
    tmp_path: Path, loop: asyncio.AbstractEventLoop
) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    mixture = causal_lm("Qwen3Moe", vocab_size=97, output_router_logits=True, **experts)
    mixture.save_pretrained(tmp_path)
    tokenizer_of_characters().save_pretrained(tmp_path)
    engine = TransformersEngine(model_spec(tmp_path), rollout_spec(TransformersSpec()), 0, 8, 11)

    async def answered(turns: list[Turn]) -> list[Completion]:
        await engine.start()
        try:
            return await engine.sample_turns(turns)
        finally:
            await engine.close()

    turns = [turn_of(row, tokens) for row, tokens in enumerate((3, 40))]
    answers = asyncio.run_coroutine_threadsafe(answered(turns), loop).result(WAIT_S)
    for turn, answer in zip(turns, answers, strict=True):
        (segment,) = answer.segments
        ids = torch.tensor(np.concatenate([turn.token_ids, segment.token_ids]))[None].long()
        start = len(turn.token_ids)
        with torch.no_grad():
            logits = mixture(ids, output_router_logits=False).logits[0, start - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]
        np.testing.assert_allclose(segment.logprobs, wanted.numpy(), atol=TOLERANCE)


def test_a_redundant_tied_head_is_ignored(transformers_replica, policies):
    tied = WeightBundle.pack(1, policies[1].named_parameters(remove_duplicate=False))
    assert "lm_head.weight" in tied.arrays
    transformers_replica.get("load_weights", tied)
    group = transformers_replica.group(prompt_of(0), sampling_of())
    assert worst_error(group, policies, 1.0) < TOLERANCE


@pytest.mark.slow
def test_a_group_is_bit_identical_whatever_else_is_in_flight(transformers_replica, bundles):
    transformers_replica.get("load_weights", bundles[0])
    alone = transformers_replica.group(prompt_of(0), sampling_of())
    crowd = [
        transformers_replica.call("generate", prompt_of(row), sampling_of(group_id=row + 10))
        for row in range(4)
    ]
    again = transformers_replica.group(prompt_of(0), sampling_of())
    for call in crowd:
        call.result(WAIT_S)
    assert alone[0].lengths == again[0].lengths
    assert np.array_equal(alone[1].token_ids, again[1].token_ids)
    assert alone[1].logprobs.tobytes() == again[1].logprobs.tobytes()


def test_a_completions_draws_are_its_own(transformers_replica, bundles):
    """Not its siblings', whose number they do not see: only rounding in a batch may differ."""
    transformers_replica.get("load_weights", bundles[0])
    groups = [
        transformers_replica.group(prompt_of(0), sampling_of(completions=n, max_tokens=12))[1]
        for n in (1, 2, 8)
    ]
    first = [group.token_ids[group.completion(0)].tolist() for group in groups]
    assert first[0] == first[1] == first[2]


def test_a_replica_counts_the_tokens_that_are_kept(transformers_replica, bundles):
    """Rows that have ended and are still computed count for nothing."""
    transformers_replica.get("load_weights", bundles[0])
    record, _ = transformers_replica.group(prompt_of(0), sampling_of(max_tokens=80))
    assert len(set(record.lengths)) > 1
    assert round(record.load.tokens_per_s * record.seconds) == sum(record.sampled)


@pytest.mark.slow
def test_a_call_repeated_while_it_runs_joins_the_first(transformers_replica, sampled):
    calls = [
        transformers_replica.call("generate", prompt_of(0), sampling_of(max_tokens=200))
        for _ in range(2)
    ]
    first, second = (call.result(WAIT_S) for call in calls)
    assert first[1] is second[1]
    assert sampled == ["11/0"]


@pytest.mark.slow
def test_prompts_of_two_data_sets_do_not_join_by_their_row_numbers(transformers_replica):
    """As of the held-out data and the training data, whose rows are numbered alike."""
    prompts = (prompt_of(0), replace(prompt_of(1), row=prompt_of(0).row))
    assert len(prompts[0].token_ids) != len(prompts[1].token_ids) or not np.array_equal(
        prompts[0].token_ids, prompts[1].token_ids
    )
    calls = [
        transformers_replica.call("generate", prompt, sampling_of(max_tokens=100))
        for prompt in prompts
    ]
    for call, prompt in zip(calls, prompts, strict=True):
        assert np.array_equal(call.result(WAIT_S)[1].prompt_ids, prompt.token_ids)


def test_a_replica_answers_while_it_generates_and_stops_what_nobody_waits_for(
    transformers_replica, sampled
):
    endless = transformers_replica.call(
        "generate", prompt_of(0), sampling_of(completions=64, max_tokens=400)
    )
    until(lambda: transformers_replica.in_flight() == 1)
    endless.cancel()
    with contextlib.suppress(CancelledError):
        endless.result(WAIT_S)
    until(lambda: transformers_replica.in_flight() == 0)
    transformers_replica.group(prompt_of(0), sampling_of(max_tokens=4))
    assert sampled == ["11/0"], "the first was given up"


@pytest.mark.slow
def test_an_untied_head_is_loaded_too(tmp_path, loop):
    tiny_policy(seed=0, untied_qwen3=True).save_pretrained(tmp_path)
    tokenizer_of_characters().save_pretrained(tmp_path)
    spec = rollout_spec(TransformersSpec())
    actor = RolloutActor(model_spec(tmp_path), spec, "t1", 0, 8, 11)
    new = tiny_policy(seed=1, untied_qwen3=True).eval()

    async def update_and_generate() -> Group:
        await actor.start()
        await actor.load_weights(WeightBundle.pack(1, new.named_parameters()))
        group = await actor.generate(prompt_of(0), sampling_of())
        await actor.close()
        return group

    group = asyncio.run_coroutine_threadsafe(update_and_generate(), loop).result(WAIT_S)
    assert worst_error(group, {1: new}, 1.0) < TOLERANCE


def test_a_model_without_an_adapter_is_served_where_adapters_would_be_sent(folder, loop, policies):
    """As an evaluation serves it: the adapter is in its weights."""
    spec = rollout_spec(TransformersSpec()).model_copy(update={"weight_sync": AdapterSpec()})
    actor = RolloutActor(model_spec(folder), spec, "t2", 0, 8, 11)

    async def generate() -> Group:
        await actor.start()
        try:
            return await actor.generate(prompt_of(0), sampling_of())
        finally:
            await actor.close()

    group = asyncio.run_coroutine_threadsafe(generate(), loop).result(WAIT_S)
    assert worst_error(group, policies, 1.0) < TOLERANCE


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([0.0, 1.0, -float("inf"), 2.0]).repeat(40_000, 1)
    uniform = uniforms([1], 40_000)[0]
    tokens, logprobs = draw(logits, 0.5, uniform)
    expected = torch.softmax(logits[0] / 0.5, dim=-1)
    seen = torch.bincount(tokens, minlength=4) / len(tokens)
    assert torch.allclose(seen, expected, atol=0.01)
    assert seen[2] == 0
    assert torch.allclose(logprobs, expected.log()[tokens])
