"""Both rollout engines against plain transformers: log-probs, updates, labels, repeatability.

The transformers replica runs in this process; the vLLM one is a Ray actor, started once.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
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

from actors.engines import base
from actors.engines.base import Turn, WeightMismatch, resolve_engine
from actors.engines.specs import AutoEngineSpec, EngineSpec, TransformersSpec, VLLMSpec
from actors.engines.transformers import draw, uniforms
from actors.groups import Group, pack_group
from actors.messages import FinishReason, GroupSampling, Prompt, Sampling
from actors.models.loading import load_causal_lm
from actors.rollout import RolloutActor
from actors.specs import LoRASpec, ModelSpec, RolloutSpec
from actors.transfer.base import Refused
from actors.transfer.bundle import WeightBundle
from actors.transfer.delta import Exports
from actors.transfer.specs import AdapterSpec

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


class Overwritten(RolloutActor):
    """A rollout actor of vLLM whose memory file can be written to outside an update, and which
    says what its engine's process is."""

    async def engine_process(self) -> int:
        engine: Any = self._engine
        (process,) = engine._llm.engine_core.resources.engine_manager.processes
        return int(process.pid)

    async def write_over(self, bundle: WeightBundle) -> None:
        engine: Any = self._engine
        engine._weights.write(bundle)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As an actor with one CPU; more threads only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 model of 0.3M random parameters with tied embeddings, and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    _tiny(seed=0).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def policies(folder: Path) -> dict[int, PreTrainedModel]:
    """The model at three policy versions; 0 is what the folder holds."""
    first = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {0: first.eval(), 1: _tiny(seed=1).eval(), 2: _tiny(seed=2).eval()}


@pytest.fixture(scope="module")
def bundles(policies: dict[int, PreTrainedModel]) -> dict[int, WeightBundle]:
    return {
        version: WeightBundle.pack(version, model.named_parameters())
        for version, model in policies.items()
    }


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread, as an async Ray actor has one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)


@pytest.fixture(scope="module")
def transformers_replica(folder: Path, loop: asyncio.AbstractEventLoop) -> Iterator[Replica]:
    spec = _rollout_spec(TransformersSpec())
    actor = RolloutActor(_model_spec(folder), spec, "t0", 0, 8, 11)

    def call(method: str, *args: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(getattr(actor, method)(*args), loop)

    yield Replica("transformers", call, actor)
    call("close").result(WAIT_S)


@pytest.fixture(scope="module")
def vllm_replica(folder: Path, ray_session: None) -> Iterator[Replica]:
    pytest.importorskip("vllm")
    with _vllm_actor(folder) as replica:
        yield replica


@contextlib.contextmanager
def _vllm_actor(folder: Path, **variables: str) -> Iterator[Replica]:
    handle = (
        ray.remote(Overwritten)
        .options(num_cpus=1, max_concurrency=64, runtime_env={"env_vars": variables})
        .remote(_model_spec(folder), _rollout_spec(VLLMSpec(kv_cache_gib=0.25)), "v0", 0, 8, 11)
    )
    yield Replica("vllm", lambda method, *args: getattr(handle, method).remote(*args).future())
    ray.kill(handle)


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def replica(request: pytest.FixtureRequest) -> Replica:
    found: Replica = request.getfixturevalue(f"{request.param}_replica")
    return found


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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_before_and_after_an_update(
    replica, policies, bundles, temperature
):
    for version in (0, 1):
        replica.get("load_weights", bundles[version])
        group = replica.group(_prompt(0), _sampling(temperature=temperature, group_id=version))
        assert _labels(group) == {version}
        assert _worst_error(group, policies, temperature) < TOLERANCE


def test_greedy_output_after_an_update_is_the_new_models(replica, policies, bundles):
    for version in (0, 1):
        replica.get("load_weights", bundles[version])
        group = replica.group(_prompt(3), _sampling(completions=2, temperature=0.0, max_tokens=24))
        expected = _greedy(policies[version], _prompt(3), 24)
        for index in range(2):
            assert group[1].token_ids[group[1].completion(index)].tolist() == expected
        assert _worst_error(group, policies, temperature=1.0) < TOLERANCE


def test_changed_weights_alone_make_the_new_model_and_are_refused_on_any_other(
    replica, policies, bundles
):
    exports = Exports()
    whole = exports.take(1, policies[1].named_parameters(), None)
    replica.get("load_weights", whole)
    replica.get("load_weights", bundles[0])  # what is held for changes is not what is served
    same = exports.take(2, policies[1].named_parameters(), 1)
    assert same.nbytes == 0
    assert replica.get("load_weights", same) > 0
    moved = {name: p.detach().clone() for name, p in policies[1].named_parameters()}
    for name, parameter in policies[2].named_parameters():
        moved[name].view(-1)[::7] = parameter.detach().view(-1)[::7]
    delta = pickle.loads(pickle.dumps(exports.take(3, moved.items(), 2)))
    assert delta.nbytes < 0.4 * whole.nbytes
    replica.get("load_weights", delta)
    group = replica.group(_prompt(0), _sampling(group_id=3))
    assert _labels(group) == {3}
    model = copy.deepcopy(policies[1])
    model.load_state_dict(moved, strict=False)
    assert _worst_error(group, {3: model}, 1.0) < TOLERANCE
    refused = replica.get("load_weights", _changes_that_nobody_can_take(policies))
    assert isinstance(refused, Refused)
    assert "and 3 is held" in refused.reason
    assert _labels(replica.group(_prompt(0), _sampling(group_id=4))) == {3}


LORA = LoRASpec(r=4, alpha=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [TransformersSpec(), pytest.param(VLLMSpec(kv_cache_gib=0.25), marks=pytest.mark.long)],
)
def test_an_adapter_alone_makes_the_policy_under_requests_in_flight_and_from_a_fresh_cache(
    folder: Path, loop: asyncio.AbstractEventLoop, engine: EngineSpec
) -> None:
    if engine.name == "vllm":
        pytest.importorskip("vllm")
    spec = _model_spec(folder).model_copy(update={"lora": LORA})
    policies = {version: load_causal_lm(spec, lora=True).eval() for version in (0, 1, 2)}
    adapters = {}
    for version in (1, 2):
        ours = {n: p for n, p in policies[version].named_parameters() if "lora_" in n}
        draw = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in ours.values():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
        adapters[version] = WeightBundle.pack(version, ours.items())
    rollout = _rollout_spec(engine).model_copy(update={"weight_sync": AdapterSpec()})
    actor = RolloutActor(spec, rollout, "a0", 0, 8, 11)

    def call(method: str, *args: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(getattr(actor, method)(*args), loop)

    replica = Replica(engine.name, call, actor)
    try:
        groups = [replica.group(_prompt(0, tokens=300), _sampling())]
        long = [
            call("generate", _prompt(row, tokens=300), _sampling(max_tokens=300, group_id=row))
            for row in (0, 1)
        ]
        if engine.name == "vllm":
            replica.group(_prompt(5), _sampling(max_tokens=16, temperature=0.0))
        else:
            _until(lambda: replica.in_flight() == 2)
        assert replica.get("load_weights", adapters[1]) > 0
        groups += [each.result(WAIT_S) for each in long]
        groups.append(replica.group(_prompt(0, tokens=300), _sampling(group_id=3)))
        replica.get("load_weights", adapters[2])
        groups.append(replica.group(_prompt(0, tokens=300), _sampling(group_id=4)))
        errors = [_worst_error(group, policies, 1.0) for group in groups]
        assert max(errors) < TOLERANCE, errors
        labels = [_labels(group) for group in groups]
        assert (labels[0], labels[-2], labels[-1]) == ({0}, {1}, {2})
        assert 1 in set().union(*labels[1:3])
        apart = [_worst_error(groups[-1], {2: policies[other]}, 1.0) for other in (0, 1)]
        assert min(apart) > 100 * TOLERANCE  # or the test could not see a stale adapter
        with pytest.raises(WeightMismatch, match="policy and rollout must load the same model"):
            replica.get("load_weights", WeightBundle.pack(3, [("other", torch.ones(1))]))
    finally:
        call("close").result(WAIT_S)


def _changes_that_nobody_can_take(policies):
    exports = Exports()
    exports.take(4, policies[0].named_parameters(), None)
    name, parameter = next(iter(policies[0].named_parameters()))
    moved = dict(policies[0].named_parameters()) | {name: parameter.detach().clone()}
    moved[name].view(-1)[0] += 1
    return exports.take(5, moved.items(), 4)


def test_a_cached_prefix_does_not_outlive_an_update(replica, policies, bundles):
    replica.get("load_weights", bundles[0])
    long = _prompt(0, tokens=300)  # more than two of vLLM's blocks of 128 on CPU
    shared = replace(long, row=1, token_ids=np.append(long.token_ids[:-5], long.token_ids[:3]))
    for prompt in (long, shared):
        replica.group(prompt, _sampling(completions=2))
    replica.get("load_weights", bundles[1])
    for prompt in (shared, long):
        group = replica.group(prompt, _sampling(completions=2))
        assert _worst_error(group, policies, 1.0) < TOLERANCE


def test_lengths_finish_reasons_and_masks_agree_with_the_tokens(replica, bundles):
    replica.get("load_weights", bundles[0])
    sampling = _sampling(completions=32, max_tokens=150)
    record, tensors = replica.group(_prompt(2), sampling)
    assert record.group_id == tensors.group_id == sampling.group_id
    assert record.lengths == tensors.lengths
    assert record.prompt_tokens == len(_prompt(2).token_ids)
    assert (
        len(tensors.token_ids) == len(tensors.logprobs) == len(tensors.mask) == sum(record.lengths)
    )
    assert tensors.token_ids.dtype == tensors.prompt_ids.dtype == np.int32
    assert tensors.logprobs.dtype == np.float32
    assert tensors.mask.all()
    assert record.sampled == record.lengths
    assert record.turns == (1,) * 32
    assert record.rollouts == tuple(range(32))
    both = {FinishReason.STOP, FinishReason.LENGTH}
    assert set(record.finish_reasons) == both, "the seed should show both"
    for index, (length, reason) in enumerate(
        zip(record.lengths, record.finish_reasons, strict=True)
    ):
        tokens = tensors.token_ids[tensors.completion(index)]
        assert EOS not in tokens[:-1]
        assert (tokens[-1] == EOS) == (reason is FinishReason.STOP)
        assert length == 150 or reason is FinishReason.STOP
    for length, spans in zip(record.lengths, record.version_spans, strict=True):
        assert [(span.version, span.tokens) for span in spans] == [(0, length)]


def test_completions_of_a_group_differ_and_so_do_groups(replica, bundles):
    replica.get("load_weights", bundles[0])
    seen = set()
    for group_id in range(2):
        _, tensors = replica.group(_prompt(0), _sampling(completions=4, group_id=group_id))
        seen |= {tuple(tensors.token_ids[tensors.completion(i)]) for i in range(4)}
    assert len(seen) == 8


@pytest.mark.slow
def test_tokens_made_while_an_update_arrives_carry_the_label_of_their_weights(
    replica, policies, bundles
):
    replica.get("load_weights", bundles[0])
    long = [
        replica.call("generate", _prompt(row), _sampling(max_tokens=400, group_id=row))
        for row in range(3)
    ]
    # Done only when the long groups, which came first, have been running for a while.
    if replica.name == "vllm":
        replica.group(_prompt(5), _sampling(max_tokens=16, temperature=0.0))
    else:
        _until(lambda: replica.in_flight() == 3)
    for version in (1, 2):
        replica.get("load_weights", bundles[version])
    groups = [call.result(WAIT_S) for call in long]
    labels = set().union(*(_labels(group) for group in groups))
    assert {0, 2} <= labels
    for group in groups:
        assert _worst_error(group, policies, 1.0) < TOLERANCE
    spans = [spans for record, _ in groups for spans in record.version_spans]
    assert [sum(s.tokens for s in each) for each in spans] == [
        length for record, _ in groups for length in record.lengths
    ]
    # vLLM updates under its running requests, the transformers engine between groups.
    assert (max(len(each) for each in spans) > 1) == (replica.name == "vllm")
    assert _labels(replica.group(_prompt(0), _sampling())) == {2}


@pytest.mark.slow
def test_vllm_keeps_nothing_of_the_file_that_the_next_version_is_written_over(
    vllm_replica, policies, bundles
):
    vllm_replica.get("load_weights", bundles[0])
    vllm_replica.get("write_over", bundles[1])
    group = vllm_replica.group(_prompt(4), _sampling())
    assert _labels(group) == {0}
    assert _worst_error(group, policies, 1.0) < TOLERANCE


@pytest.mark.slow
def test_vllm_survives_more_prompts_than_a_step_takes_and_an_update_with_all_in_flight(
    vllm_replica, policies, bundles
):
    """16 groups x 8 of 40 tokens: their prefill is cut, before the update and again after it."""
    vllm_replica.get("load_weights", bundles[0])
    calls = [
        vllm_replica.call(
            "generate", _prompt(row, tokens=40), _sampling(max_tokens=200, group_id=row)
        )
        for row in range(16)
    ]
    # Done only when the others, which came first, have been running for a while.
    vllm_replica.group(_prompt(20), _sampling(max_tokens=8, completions=1))
    vllm_replica.get("load_weights", bundles[1])
    groups = [call.result(WAIT_S) for call in calls]
    assert [_labels(group) for group in groups] == [{0, 1}] * 16
    for group in groups:
        assert _worst_error(group, policies, 1.0) < TOLERANCE


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
    group = transformers_replica.group(_prompt(0), _sampling())
    assert _labels(group) == {0}
    assert _worst_error(group, policies, 1.0) < TOLERANCE


def test_turns_of_other_lengths_and_limits_have_the_logprobs_of_a_plain_forward(
    replica, policies, bundles
):
    replica.get("load_weights", bundles[0])
    turns = [_turn(row, tokens) for row, tokens in enumerate((3, 40, 11))]
    answers = replica.get("sample", turns)
    for turn, answer in zip(turns, answers, strict=True):
        (segment,) = answer.segments
        most = turn.sampling.max_tokens
        assert len(segment.token_ids) == most or answer.finish_reason is FinishReason.STOP
        assert len(segment.token_ids) <= most
        prompt = replace(_prompt(0), token_ids=turn.token_ids)
        group = pack_group(0, prompt.token_ids, [[answer]], 0.1, "r")
        assert _labels(group) == {0}
        assert _worst_error(group, policies, 1.0) < TOLERANCE


def test_turns_are_bit_identical_whatever_else_is_in_flight(transformers_replica, bundles):
    transformers_replica.get("load_weights", bundles[0])
    turns = [_turn(row, tokens) for row, tokens in enumerate((3, 40, 11))]
    alone = transformers_replica.get("sample", turns)
    crowd = [transformers_replica.call("sample", [_turn(row, 7)]) for row in range(3)]
    again = transformers_replica.get("sample", turns)
    for call in crowd:
        call.result(WAIT_S)
    for one, other in zip(alone, again, strict=True):
        assert one.segments[0].token_ids.tolist() == other.segments[0].token_ids.tolist()
        assert one.segments[0].logprobs.tobytes() == other.segments[0].logprobs.tobytes()


def _turn(row: int, tokens: int) -> Turn:
    token_ids = _prompt(row, tokens=tokens).token_ids
    return Turn(token_ids, Sampling(max_tokens=8 + 20 * row, temperature=1.0), f"11/0/{row}/0")


def test_a_redundant_tied_head_is_ignored(transformers_replica, policies):
    tied = WeightBundle.pack(1, policies[1].named_parameters(remove_duplicate=False))
    assert "lm_head.weight" in tied.arrays
    transformers_replica.get("load_weights", tied)
    group = transformers_replica.group(_prompt(0), _sampling())
    assert _worst_error(group, policies, 1.0) < TOLERANCE


def test_a_group_is_bit_identical_whatever_else_is_in_flight(transformers_replica, bundles):
    transformers_replica.get("load_weights", bundles[0])
    alone = transformers_replica.group(_prompt(0), _sampling())
    crowd = [
        transformers_replica.call("generate", _prompt(row), _sampling(group_id=row + 10))
        for row in range(4)
    ]
    again = transformers_replica.group(_prompt(0), _sampling())
    for call in crowd:
        call.result(WAIT_S)
    assert alone[0].lengths == again[0].lengths
    assert np.array_equal(alone[1].token_ids, again[1].token_ids)
    assert alone[1].logprobs.tobytes() == again[1].logprobs.tobytes()


def test_a_completions_draws_are_its_own(transformers_replica, bundles):
    """Not its siblings', whose number they do not see: only rounding in a batch may differ."""
    transformers_replica.get("load_weights", bundles[0])
    groups = [
        transformers_replica.group(_prompt(0), _sampling(completions=n, max_tokens=12))[1]
        for n in (1, 2, 8)
    ]
    first = [group.token_ids[group.completion(0)].tolist() for group in groups]
    assert first[0] == first[1] == first[2]


def test_a_replica_counts_the_tokens_that_are_kept(transformers_replica, bundles):
    """Rows that have ended and are still computed count for nothing."""
    transformers_replica.get("load_weights", bundles[0])
    record, _ = transformers_replica.group(_prompt(0), _sampling(max_tokens=80))
    assert len(set(record.lengths)) > 1
    assert round(record.load.tokens_per_s * record.seconds) == sum(record.sampled)


def test_a_group_says_what_its_replica_did_meanwhile(replica, bundles):
    replica.get("load_weights", bundles[0])
    calls = [
        replica.call("generate", _prompt(row), _sampling(max_tokens=60, group_id=row))
        for row in range(3)
    ]
    records = [call.result(WAIT_S)[0] for call in calls]
    for record in records:
        assert record.seconds > 0
        assert record.load.tokens_per_s > 0
        assert 1 <= record.load.running <= 24
    if replica.name == "vllm":
        assert max(record.load.running for record in records) > 8, "they are batched"
        assert all(0 < record.load.kv_cache_used < 1 for record in records)
    else:
        assert max(record.load.queue for record in records) >= 8, "they take turns"
        assert {record.load.kv_cache_used for record in records} == {None}


def test_a_call_repeated_while_it_runs_joins_the_first(transformers_replica, sampled):
    calls = [
        transformers_replica.call("generate", _prompt(0), _sampling(max_tokens=200))
        for _ in range(2)
    ]
    first, second = (call.result(WAIT_S) for call in calls)
    assert first[1] is second[1]
    assert sampled == ["11/0"]


def test_prompts_of_two_data_sets_do_not_join_by_their_row_numbers(transformers_replica):
    """As of the held-out data and the training data, whose rows are numbered alike."""
    prompts = (_prompt(0), replace(_prompt(1), row=_prompt(0).row))
    assert len(prompts[0].token_ids) != len(prompts[1].token_ids) or not np.array_equal(
        prompts[0].token_ids, prompts[1].token_ids
    )
    calls = [
        transformers_replica.call("generate", prompt, _sampling(max_tokens=100))
        for prompt in prompts
    ]
    for call, prompt in zip(calls, prompts, strict=True):
        assert np.array_equal(call.result(WAIT_S)[1].prompt_ids, prompt.token_ids)


def test_a_replica_answers_while_it_generates_and_stops_what_nobody_waits_for(
    transformers_replica, sampled
):
    endless = transformers_replica.call(
        "generate", _prompt(0), _sampling(completions=64, max_tokens=400)
    )
    _until(lambda: transformers_replica.in_flight() == 1)
    endless.cancel()
    with contextlib.suppress(CancelledError):
        endless.result(WAIT_S)
    _until(lambda: transformers_replica.in_flight() == 0)
    transformers_replica.group(_prompt(0), _sampling(max_tokens=4))
    assert sampled == ["11/0"], "the first was given up"


def test_an_untied_head_is_loaded_too(tmp_path, loop):
    _tiny(seed=0, untied_qwen3=True).save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    spec = _rollout_spec(TransformersSpec())
    actor = RolloutActor(_model_spec(tmp_path), spec, "t1", 0, 8, 11)
    new = _tiny(seed=1, untied_qwen3=True).eval()

    async def update_and_generate() -> Group:
        await actor.start()
        await actor.load_weights(WeightBundle.pack(1, new.named_parameters()))
        group = await actor.generate(_prompt(0), _sampling())
        await actor.close()
        return group

    group = asyncio.run_coroutine_threadsafe(update_and_generate(), loop).result(WAIT_S)
    assert _worst_error(group, {1: new}, 1.0) < TOLERANCE


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([0.0, 1.0, -float("inf"), 2.0]).repeat(40_000, 1)
    uniform = uniforms([1], 40_000)[0]
    tokens, logprobs = draw(logits, 0.5, uniform)
    expected = torch.softmax(logits[0] / 0.5, dim=-1)
    seen = torch.bincount(tokens, minlength=4) / len(tokens)
    assert torch.allclose(seen, expected, atol=0.01)
    assert seen[2] == 0
    assert torch.allclose(logprobs, expected.log()[tokens])


def test_auto_is_vllm_where_it_is_installed_and_transformers_elsewhere(monkeypatch):
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: object())
    assert resolve_engine(AutoEngineSpec()) == VLLMSpec()
    assert resolve_engine(TransformersSpec()) == TransformersSpec()
    monkeypatch.setattr(base.importlib.util, "find_spec", lambda name: None)
    assert resolve_engine(AutoEngineSpec()) == TransformersSpec()
    with pytest.raises(ValueError, match="not installed"):
        resolve_engine(VLLMSpec())


def test_an_engine_option_that_is_unknown_or_ours_is_refused():
    from actors.engines.vllm import check_engine_options

    known = {"enforce_eager", "max_num_seqs", "logprobs_mode", "max_model_len"}
    with pytest.raises(ValueError, match=r"no option 'max_num_seq'; did you mean 'max_num_seqs'\?"):
        check_engine_options({"max_num_seq": 4}, known)
    with pytest.raises(ValueError, match="'logprobs_mode' is set by aligntune; remove it"):
        check_engine_options({"logprobs_mode": "raw_logprobs"}, known)
    with pytest.raises(ValueError, match=r"set rollout\.max_prompt_length"):
        check_engine_options({"max_model_len": 4}, known)
    check_engine_options({"enforce_eager": True}, known)


def test_vllms_batches_follow_from_the_groups_that_a_replica_is_given():
    from actors.engines.vllm import batch_limits

    def limits(sequences: int, *, prompt: int = 512, **options: int) -> tuple[int, int]:
        spec = _rollout_spec(VLLMSpec()).model_copy(update={"max_prompt_length": prompt})
        found = batch_limits(spec, sequences, 1024, 16384, options)
        return found["max_num_seqs"], found["max_num_batched_tokens"]

    assert limits(256) == (256, 16384)
    assert limits(256, prompt=8) == (256, 2048)
    assert limits(1, prompt=8) == (1, 408)  # one sequence, prompt and completion
    assert limits(9999) == (1024, 16384)
    assert limits(256, max_num_seqs=3) == (3, 1536)
    assert limits(256, max_num_batched_tokens=100) == (100, 100)
    assert limits(256, max_num_seqs=20000) == (20000, 20000)
    assert limits(256, max_num_seqs=7, max_num_batched_tokens=9) == (7, 9)


def test_replicas_draw_apart():
    seeds = {base.engine_seed(seed, f"rollout-{index}") for seed in (0, 1) for index in (0, 1)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_process_tied_to_another_ends_when_that_one_is_killed():
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tied = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, threading; from actors.engines.lifeline import end_with;"
            "end_with(int(sys.argv[1])); print('tied', flush=True); threading.Event().wait()",
            str(owner.pid),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert tied.stdout is not None
    assert tied.stdout.readline() == "tied\n"
    assert tied.poll() is None
    owner.kill()
    assert tied.wait(WAIT_S) == 1
    owner.wait(WAIT_S)


@pytest.mark.long
def test_an_engine_that_is_forked_computes_what_another_does_bit_for_bit(
    vllm_replica, folder, bundles
):
    found = []
    with _vllm_actor(folder, ALIGNTUNE_FORKS="off") as other:
        for replica in (vllm_replica, other):
            parent = psutil.Process(replica.get("engine_process")).parent()
            replica.get("load_weights", bundles[0])
            sampling = _sampling(completions=1, max_tokens=64, temperature=0.0)
            tensors = replica.group(_prompt(0), sampling)[1]
            found.append((tensors.token_ids.tolist(), tensors.logprobs.tobytes()))
            assert (parent.pid == replica.pid) == (replica is other)
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_dead_engine_takes_its_actor_with_it(vllm_replica):
    """Last of the module: it ends the shared vLLM replica."""
    pid = vllm_replica.pid
    os.kill(vllm_replica.get("engine_process"), signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        vllm_replica.group(_prompt(0), _sampling())
    _until(lambda: not psutil.pid_exists(pid))


def _tiny(seed: int, untied_qwen3: bool = False) -> PreTrainedModel:
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


def _tokenizer() -> PreTrainedTokenizerFast:
    characters = ["<pad>", "<eos>", *(chr(code) for code in range(32, 127))]
    backend = Tokenizer(
        models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def _model_spec(folder: Path) -> ModelSpec:
    return ModelSpec(name=str(folder))


def _rollout_spec(engine: EngineSpec) -> RolloutSpec:
    return RolloutSpec(engine=engine, max_prompt_length=512, max_completion_length=400)


def _prompt(row: int, tokens: int = 20) -> Prompt:
    ids = (np.arange(tokens, dtype=np.int32) * (row + 3)) % 90 + 5
    return Prompt(row=row, source="", text="", token_ids=ids)


def _sampling(**changes: Any) -> GroupSampling:
    plain = GroupSampling(completions=8, max_tokens=48, temperature=1.0, seed=11, group_id=0)
    return replace(plain, **changes)


def _labels(group: Group) -> set[int]:
    return {span.version for spans in group[0].version_spans for span in spans}


@torch.no_grad()
def _worst_error(group: Group, policies: dict[int, PreTrainedModel], temperature: float) -> float:
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
def _greedy(model: PreTrainedModel, prompt: Prompt, max_tokens: int) -> list[int]:
    ids = torch.as_tensor(prompt.token_ids, dtype=torch.long)[None]
    chosen: list[int] = []
    while len(chosen) < max_tokens and (not chosen or chosen[-1] != EOS):
        chosen.append(int(model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[chosen[-1]]])], dim=1)
    return chosen


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
