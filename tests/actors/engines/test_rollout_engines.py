"""Both rollout engines against plain transformers: log-probs, updates, labels, repeatability.

The transformers replica runs in this process; the vLLM one is a Ray actor. It starts once, for this
file: all that asks it stands here, its death last.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import pickle
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.exceptions import TaskCancelledError

from actors.answers import drop
from actors.engines.base import Turn, WeightMismatch
from actors.engines.specs import EngineSpec, TransformersSpec, VLLMSpec
from actors.groups import pack_group
from actors.messages import FinishReason, Sampling
from actors.models.checkpoint_names import checkpoint_weights
from actors.models.loading import load_causal_lm
from actors.rollout import RolloutActor
from actors.specs import LoRASpec
from actors.transfer.base import Refused
from actors.transfer.bundle import WeightBundle
from actors.transfer.delta import Exports
from actors.transfer.specs import AdapterSpec
from tests.actors.engines.replicas import (
    EOS,
    TOLERANCE,
    WAIT_S,
    Replica,
    greedy,
    labels_of,
    model_spec,
    prompt_of,
    rollout_spec,
    sampling_of,
    tokenizer_of_characters,
    turn_of,
    until,
    worst_error,
)
from tests.actors.policy_cases import causal_lm


class Overwritten(RolloutActor):
    """A rollout actor of vLLM whose memory file can be written to outside an update, and which
    says what its engine's process is."""

    async def engine_process(self) -> int:
        engine: Any = self._engine
        (process,) = engine._llm.engine_core.resources.engine_manager.processes
        return int(process.pid)

    async def unfinished(self) -> int:
        engine: Any = self._engine
        return int(engine._llm.output_processor.get_num_unfinished_requests())

    async def write_over(self, bundle: WeightBundle) -> None:
        engine: Any = self._engine
        engine._weights.write(bundle)


@pytest.fixture(scope="module")
def vllm_replica(folder: Path, ray_session: None) -> Iterator[Replica]:
    pytest.importorskip("vllm")
    with vllm_actor(folder) as replica:
        yield replica


SMALL_CACHE = VLLMSpec(kv_cache_gib=0.25)


@contextlib.contextmanager
def vllm_actor(
    folder: Path, engine: EngineSpec = SMALL_CACHE, **variables: str
) -> Iterator[Replica]:
    handle = (
        ray.remote(Overwritten)
        .options(num_cpus=1, max_concurrency=64, runtime_env={"env_vars": variables})
        .remote(model_spec(folder), rollout_spec(engine), "v0", 0, 8, 11)
    )
    replica = Replica("vllm", lambda method, *args: getattr(handle, method).remote(*args).future())
    replica.handle = handle
    yield replica
    ray.kill(handle)


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.slow)])
def replica(request: pytest.FixtureRequest) -> Replica:
    found: Replica = request.getfixturevalue(f"{request.param}_replica")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_a_plain_forward_before_and_after_an_update(
    replica, policies, bundles, temperature
):
    for version in (0, 1):
        replica.get("load_weights", bundles[version])
        group = replica.group(prompt_of(0), sampling_of(temperature=temperature, group_id=version))
        assert labels_of(group) == {version}
        assert worst_error(group, policies, temperature) < TOLERANCE


@pytest.mark.slow
def test_greedy_output_after_an_update_is_the_new_models(replica, policies, bundles):
    for version in (0, 1):
        replica.get("load_weights", bundles[version])
        group = replica.group(
            prompt_of(3), sampling_of(completions=2, temperature=0.0, max_tokens=24)
        )
        expected = greedy(policies[version], prompt_of(3), 24)
        for index in range(2):
            assert group[1].token_ids[group[1].completion(index)].tolist() == expected
        assert worst_error(group, policies, temperature=1.0) < TOLERANCE


@pytest.mark.slow
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
    group = replica.group(prompt_of(0), sampling_of(group_id=3))
    assert labels_of(group) == {3}
    model = copy.deepcopy(policies[1])
    model.load_state_dict(moved, strict=False)
    assert worst_error(group, {3: model}, 1.0) < TOLERANCE
    refused = replica.get("load_weights", _changes_that_nobody_can_take(policies))
    assert isinstance(refused, Refused)
    assert "and 3 is held" in refused.reason
    assert labels_of(replica.group(prompt_of(0), sampling_of(group_id=4))) == {3}


@pytest.mark.slow
def test_two_forked_processes_take_the_weights_of_a_mixture_whose_checkpoint_has_other_names(
    tmp_path: Path, ray_session: None
) -> None:
    pytest.importorskip("vllm")
    sizes = {"vocab_size": 97, "max_position_embeddings": 1024, "head_dim": 32}
    sizes |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    first, second = (causal_lm("Mixtral", seed, **sizes) for seed in (0, 1))
    first.save_pretrained(tmp_path)
    tokenizer_of_characters().save_pretrained(tmp_path)
    bundle = WeightBundle.pack(1, checkpoint_weights(second, second.named_parameters()))
    with vllm_actor(tmp_path, VLLMSpec(kv_cache_gib=0.25, tensor_parallel_size=2)) as replica:
        sampling = sampling_of(max_tokens=16)
        groups = [replica.group(prompt_of(0), sampling)]
        replica.get("load_weights", bundle)
        groups.append(replica.group(prompt_of(0), replace(sampling, group_id=1)))
        assert psutil.Process(replica.get("engine_process")).children() == []
    assert [labels_of(group) for group in groups] == [{0}, {1}]
    assert max(worst_error(group, {0: first, 1: second}, 1.0) for group in groups) < TOLERANCE


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
    spec = model_spec(folder).model_copy(update={"lora": LORA})
    policies = {version: load_causal_lm(spec, lora=True).eval() for version in (0, 1, 2)}
    adapters = {}
    for version in (1, 2):
        ours = {n: p for n, p in policies[version].named_parameters() if "lora_" in n}
        draw = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for parameter in ours.values():
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
        adapters[version] = WeightBundle.pack(version, ours.items())
    rollout = rollout_spec(engine).model_copy(update={"weight_sync": AdapterSpec()})
    actor = RolloutActor(spec, rollout, "a0", 0, 8, 11)

    def call(method: str, *args: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(getattr(actor, method)(*args), loop)

    replica = Replica(engine.name, call, actor)
    try:
        groups = [replica.group(prompt_of(0, tokens=300), sampling_of())]
        long = [
            call("generate", prompt_of(row, tokens=300), sampling_of(max_tokens=300, group_id=row))
            for row in (0, 1)
        ]
        if engine.name == "vllm":
            replica.group(prompt_of(5), sampling_of(max_tokens=16, temperature=0.0))
        else:
            until(lambda: replica.in_flight() == 2)
        assert replica.get("load_weights", adapters[1]) > 0
        groups += [each.result(WAIT_S) for each in long]
        groups.append(replica.group(prompt_of(0, tokens=300), sampling_of(group_id=3)))
        replica.get("load_weights", adapters[2])
        groups.append(replica.group(prompt_of(0, tokens=300), sampling_of(group_id=4)))
        errors = [worst_error(group, policies, 1.0) for group in groups]
        assert max(errors) < TOLERANCE, errors
        labels = [labels_of(group) for group in groups]
        assert (labels[0], labels[-2], labels[-1]) == ({0}, {1}, {2})
        assert 1 in set().union(*labels[1:3])
        apart = [worst_error(groups[-1], {2: policies[other]}, 1.0) for other in (0, 1)]
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


@pytest.mark.slow
def test_a_cached_prefix_does_not_outlive_an_update(replica, policies, bundles):
    replica.get("load_weights", bundles[0])
    long = prompt_of(0, tokens=300)  # more than two of vLLM's blocks of 128 on CPU
    shared = replace(long, row=1, token_ids=np.append(long.token_ids[:-5], long.token_ids[:3]))
    for prompt in (long, shared):
        replica.group(prompt, sampling_of(completions=2))
    replica.get("load_weights", bundles[1])
    for prompt in (shared, long):
        group = replica.group(prompt, sampling_of(completions=2))
        assert worst_error(group, policies, 1.0) < TOLERANCE


@pytest.mark.slow
def test_lengths_finish_reasons_and_masks_agree_with_the_tokens(replica, bundles):
    replica.get("load_weights", bundles[0])
    sampling = sampling_of(completions=32, max_tokens=150)
    record, tensors = replica.group(prompt_of(2), sampling)
    assert record.group_id == tensors.group_id == sampling.group_id
    assert record.lengths == tensors.lengths
    assert record.prompt_tokens == len(prompt_of(2).token_ids)
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


@pytest.mark.slow
def test_completions_of_a_group_differ_and_so_do_groups(replica, bundles):
    replica.get("load_weights", bundles[0])
    seen = set()
    for group_id in range(2):
        _, tensors = replica.group(prompt_of(0), sampling_of(completions=4, group_id=group_id))
        seen |= {tuple(tensors.token_ids[tensors.completion(i)]) for i in range(4)}
    assert len(seen) == 8


@pytest.mark.slow
def test_tokens_made_while_an_update_arrives_carry_the_label_of_their_weights(
    replica, policies, bundles
):
    replica.get("load_weights", bundles[0])
    long = [
        replica.call("generate", prompt_of(row), sampling_of(max_tokens=400, group_id=row))
        for row in range(3)
    ]
    # Done only when the long groups, which came first, have been running for a while.
    if replica.name == "vllm":
        replica.group(prompt_of(5), sampling_of(max_tokens=16, temperature=0.0))
    else:
        until(lambda: replica.in_flight() == 3)
    for version in (1, 2):
        replica.get("load_weights", bundles[version])
    groups = [call.result(WAIT_S) for call in long]
    labels = set().union(*(labels_of(group) for group in groups))
    assert {0, 2} <= labels
    for group in groups:
        assert worst_error(group, policies, 1.0) < TOLERANCE
    spans = [spans for record, _ in groups for spans in record.version_spans]
    assert [sum(s.tokens for s in each) for each in spans] == [
        length for record, _ in groups for length in record.lengths
    ]
    # vLLM updates under its running requests, the transformers engine between groups.
    assert (max(len(each) for each in spans) > 1) == (replica.name == "vllm")
    assert labels_of(replica.group(prompt_of(0), sampling_of())) == {2}


@pytest.mark.slow
def test_vllm_keeps_nothing_of_the_file_that_the_next_version_is_written_over(
    vllm_replica, policies, bundles
):
    vllm_replica.get("load_weights", bundles[0])
    vllm_replica.get("write_over", bundles[1])
    group = vllm_replica.group(prompt_of(4), sampling_of())
    assert labels_of(group) == {0}
    assert worst_error(group, policies, 1.0) < TOLERANCE


@pytest.mark.slow
def test_vllm_survives_more_prompts_than_a_step_takes_and_an_update_with_all_in_flight(
    vllm_replica, policies, bundles
):
    """16 groups x 8 of 40 tokens: their prefill is cut, before the update and again after it."""
    vllm_replica.get("load_weights", bundles[0])
    calls = [
        vllm_replica.call(
            "generate", prompt_of(row, tokens=40), sampling_of(max_tokens=200, group_id=row)
        )
        for row in range(16)
    ]
    # Done only when the others, which came first, have been running for a while.
    vllm_replica.group(prompt_of(20), sampling_of(max_tokens=8, completions=1))
    vllm_replica.get("load_weights", bundles[1])
    groups = [call.result(WAIT_S) for call in calls]
    assert [labels_of(group) for group in groups] == [{0, 1}] * 16
    for group in groups:
        assert worst_error(group, policies, 1.0) < TOLERANCE


@pytest.mark.slow
def test_turns_of_other_lengths_and_limits_have_the_logprobs_of_a_plain_forward(
    replica, policies, bundles
):
    replica.get("load_weights", bundles[0])
    turns = [turn_of(row, tokens) for row, tokens in enumerate((3, 40, 11))]
    answers = replica.get("sample", turns)
    for turn, answer in zip(turns, answers, strict=True):
        (segment,) = answer.segments
        most = turn.sampling.max_tokens
        assert len(segment.token_ids) == most or answer.finish_reason is FinishReason.STOP
        assert len(segment.token_ids) <= most
        prompt = replace(prompt_of(0), token_ids=turn.token_ids)
        group = pack_group(0, prompt.token_ids, [[answer]], 0.1, "r")
        assert labels_of(group) == {0}
        assert worst_error(group, policies, 1.0) < TOLERANCE


@pytest.mark.slow
def test_a_group_says_what_its_replica_did_meanwhile(replica, bundles):
    replica.get("load_weights", bundles[0])
    calls = [
        replica.call("generate", prompt_of(row), sampling_of(max_tokens=60, group_id=row))
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


@pytest.mark.long
def test_an_engine_that_is_forked_computes_what_another_does_bit_for_bit(
    vllm_replica, folder, bundles
):
    found = []
    with vllm_actor(folder, ALIGNTUNE_FORKS="off") as other:
        for replica in (vllm_replica, other):
            parent = psutil.Process(replica.get("engine_process")).parent()
            replica.get("load_weights", bundles[0])
            sampling = sampling_of(completions=1, max_tokens=64, temperature=0.0)
            tensors = replica.group(prompt_of(0), sampling)[1]
            found.append((tensors.token_ids.tolist(), tensors.logprobs.tobytes()))
            assert (parent.pid == replica.pid) == (replica is other)
    assert found[0] == found[1]


@pytest.mark.long
def test_an_engine_that_compiles_keeps_the_same_promises(folder, ray_session, policies, bundles):
    pytest.importorskip("vllm")
    compiling = VLLMSpec(kv_cache_gib=0.25, compiles=True)
    with vllm_actor(folder, compiling) as replica:
        for temperature in (1.0, 0.7):
            test_logprobs_are_those_of_a_plain_forward_before_and_after_an_update(
                replica, policies, bundles, temperature
            )
        test_greedy_output_after_an_update_is_the_new_models(replica, policies, bundles)
        test_tokens_made_while_an_update_arrives_carry_the_label_of_their_weights(
            replica, policies, bundles
        )
        test_a_cached_prefix_does_not_outlive_an_update(replica, policies, bundles)


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_what_its_process_said(folder, ray_session):
    pytest.importorskip("vllm")
    spec = VLLMSpec(kv_cache_gib=1e-6, tensor_parallel_size=2)
    why = "vLLM's engine did not start: ValueError: No available memory for the cache"
    with pytest.raises(RuntimeError, match=why), vllm_actor(folder, spec):
        pass


@pytest.mark.slow
def test_turns_that_an_environment_actor_drops_leave_the_engine(vllm_replica):
    turn = Turn(prompt_of(0).token_ids, Sampling(max_tokens=400, temperature=1.0), "11/0/0/0")
    ref = vllm_replica.handle.sample.remote([turn] * 64)
    until(lambda: vllm_replica.get("unfinished") > 0)
    drop(ref)
    until(lambda: vllm_replica.get("unfinished") == 0)
    with pytest.raises(TaskCancelledError):
        ray.get(ref)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process maps")
def test_an_engine_has_no_semaphore_that_it_would_leave_if_it_were_killed(vllm_replica):
    for pid in (vllm_replica.pid, vllm_replica.get("engine_process")):
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "vllm" in maps
        assert "/sem." not in maps


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process maps")
def test_an_engine_that_does_not_compile_its_model_compiles_nothing_else(vllm_replica):
    vllm_replica.group(prompt_of(0), sampling_of(max_tokens=2))
    maps = Path(f"/proc/{vllm_replica.get('engine_process')}/maps").read_text()
    assert "libtorch" in maps
    assert "torchinductor" not in maps


@pytest.mark.slow
def test_an_engine_that_is_stopped_answers_no_ping_though_it_takes_new_weights(
    vllm_replica, bundles
):
    vllm_replica.get("load_weights", bundles[0])
    assert vllm_replica.get("ping") >= 0
    engine = vllm_replica.get("engine_process")
    os.kill(engine, signal.SIGSTOP)
    try:
        load = vllm_replica.call("load_weights", bundles[1])
        ping = vllm_replica.call("ping")
        with pytest.raises(TimeoutError):
            ping.result(5)
        assert not load.done()
    finally:
        os.kill(engine, signal.SIGCONT)
    assert load.result(WAIT_S) > 0
    assert ping.result(WAIT_S) >= 0


@pytest.mark.slow
def test_a_dead_engine_takes_its_actor_with_it(vllm_replica):
    """Last of the module: it ends the shared vLLM replica."""
    pid = vllm_replica.pid
    os.kill(vllm_replica.get("engine_process"), signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayActorError):
        vllm_replica.group(prompt_of(0), sampling_of())
    until(lambda: not psutil.pid_exists(pid))
