"""What ranks and replicas keep in memory, on GPUs and hosts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actors.strategies.specs import DeepSpeedSpec, FSDPSpec, TorchSpec
from cluster.placement import DoesNotFit
from cluster.plan.memory import frozen_memory, kv_bytes, rollout_memory, trained_memory
from cluster.plan.options import to_fit
from cluster.plan.plan import make_plan
from cluster.plan.shapes import from_table
from cluster.plan.work import Work
from cluster.resources import described
from tests.cluster.plan.works import H100, LARGE, SMALL, keeping, work_of, zero


def test_full_training_in_float32_is_sixteen_bytes_a_parameter() -> None:
    work = replace(work_of().policy, dtype_bytes=4)
    device = trained_memory(work, on_gpu=True).device
    kept = device["weights"] + device["gradients"] + device["optimiser"]
    assert kept == 16 * work.shape.parameters


def test_each_zero_stage_takes_less_and_more_ranks_take_less() -> None:
    def peak(stage: int, ranks: int) -> int:
        policy = work_of(LARGE, ranks=8).policy
        return trained_memory(replace(policy, **zero(stage), ranks=ranks), True).peak

    assert peak(1, 8) > peak(2, 8) > peak(3, 8)
    for stage in (1, 2, 3):
        assert peak(stage, 2) > peak(stage, 8) > peak(stage, 64)


@pytest.mark.parametrize(
    "change", [{"lora_rank": 16}, {"checkpointing": True}, {"tokens": 3072}, {"head_rows": 256}]
)
def test_what_saves_memory_does(change: dict[str, object]) -> None:
    work = replace(work_of(LARGE).policy, checkpointing=False)
    assert trained_memory(replace(work, **change), True).peak < trained_memory(work, True).peak


def test_ranks_of_fsdp_hold_their_share_and_could_be_more() -> None:
    work = work_of(LARGE, ranks=2)
    fsdp = keeping(FSDPSpec())
    two, four, eight = (
        trained_memory(replace(work.policy, ranks=ranks, **fsdp), True).device
        for ranks in (2, 4, 8)
    )
    assert all(two[k] > four[k] > eight[k] for k in ("weights", "gradients", "optimiser"))
    assert two["optimiser"] == 4 * eight["optimiser"]
    sharded = replace(work, policy=replace(work.policy, **fsdp))
    settings = [dict(option.settings) for option in to_fit(sharded, "policy")]
    assert {"policy.ranks": "4"} in settings
    assert not any("strategy" in key for changed in settings for key in changed)


def test_offload_moves_the_optimiser_to_the_host_and_stays_there_without_a_gpu() -> None:
    work = replace(work_of(LARGE, ranks=4).policy, **zero(2))
    away = trained_memory(replace(work, **zero(2, offload=True)), on_gpu=True)
    assert away.peak < trained_memory(work, on_gpu=True).peak
    assert away.device["optimiser"] == 0
    assert away.host["optimiser"] == 12 * work.shape.parameters // 4
    here = trained_memory(replace(work, **zero(2, offload=True)), on_gpu=False)
    assert here.host == {}
    assert here.device["optimiser"] == away.host["optimiser"]


def test_a_checkpoint_is_copied_to_the_host_by_each_rank_its_share() -> None:
    """12 bytes a trained parameter; ZeRO 1 and 2 write the model beside, by rank 0."""
    policy = work_of(ranks=4).policy
    parameters = policy.shape.parameters
    for strategy, share, model in (
        (TorchSpec(), 12 * parameters, 0),
        (FSDPSpec(), 12 * parameters // 4, 0),
        (DeepSpeedSpec(stage=2), 12 * parameters // 4, 2 * parameters),
        (DeepSpeedSpec(stage=3), 12 * parameters // 4, 0),
    ):
        memory = trained_memory(replace(policy, **keeping(strategy)), on_gpu=True)
        assert memory.host["checkpoint"] == share
        assert memory.host.get("model file", 0) == model
        here = trained_memory(replace(policy, **keeping(strategy)), on_gpu=False)
        assert here.device["checkpoint"] == share, "without a GPU it lies beside the rest"
        assert memory.of_rank_0 == here.of_rank_0 == model + 2 * parameters
    for strategy in (FSDPSpec(), DeepSpeedSpec(stage=2)):
        adapter = trained_memory(replace(policy, lora_rank=8, **keeping(strategy)), on_gpu=True)
        assert adapter.host["checkpoint"] < 0.02 * 12 * parameters // 4
        assert adapter.host.get("model file", 0) < 0.02 * 2 * parameters, "nothing that is frozen"


def test_a_replica_keeps_a_whole_version_on_the_host_where_it_takes_them_there() -> None:
    """vLLM's processes read it in a file that is kept; changes are put on it; adapters, and what
    goes from GPU to GPU, need none."""
    work = work_of()
    ways: list[dict[str, Any]] = [
        {"takes_whole": True},
        {"takes_whole": False, "takes_changes": True},
        {"takes_whole": False},
    ]
    for engine, expected in (("vllm", [True, True, False]), ("transformers", [False, True, False])):
        rollouts = [replace(work.rollout, engine=engine, **way) for way in ways]
        hosts = [rollout_memory(one, work.step, H100).host for one in rollouts]
        assert ["last weights" in host for host in hosts] == expected


def test_who_sends_and_takes_changes_keeps_a_whole_version_on_the_host() -> None:
    work = work_of(ranks=2, replicas=2)
    delta = replace(
        work,
        policy=replace(work.policy, sends_changes=True),
        rollout=replace(work.rollout, takes_changes=True, takes_whole=False),
    )
    bundle = 2 * work.policy.shape.parameters
    cluster = described(1, 8, "h100-80gb")

    def host(what: Work) -> int:
        return next(use.bytes for use in make_plan(what, cluster).uses if use.device is None)

    # Rank 0's own, and changes up to as much beside the whole version in the object store.
    assert host(delta) - host(work) == (1 + 1) * bundle
    plans = [make_plan(what, cluster).memory for what in (work, delta)]
    for role in ("policy", "rollout"):
        assert plans[0][role].device == plans[1][role].device, "no GPU holds more"
        assert plans[1][role].host["last weights"] == bundle
    assert plans[0]["rollout"].host["last weights"] == bundle
    tight = host(delta) - bundle
    small = tuple(node._replace(memory_bytes=tight) for node in cluster.nodes)
    with pytest.raises(DoesNotFit, match=r"host .*last weights.*rollout\.weight_sync=full"):
        make_plan(delta, replace(cluster, nodes=small))


def test_hosts_that_do_not_hold_a_version_of_each_replica_are_told_what_does_without() -> None:
    work = work_of(replicas=4)
    work = replace(work, policy=replace(work.policy, lora_rank=8))
    cluster = described(1, 8, "h100-80gb")
    full = next(use.bytes for use in make_plan(work, cluster).uses if use.device is None)
    short = full - work.policy.shape.parameters
    small = replace(cluster, nodes=(cluster.nodes[0]._replace(memory_bytes=short),))
    cures = r"rollout\.weight_sync=adapter, or rollout\.replicas=2"
    with pytest.raises(DoesNotFit, match=rf"host .*last weights.*what would fit: {cures}"):
        make_plan(work, small)
    with pytest.raises(DoesNotFit, match=r"what would fit: rollout\.replicas=2"):
        make_plan(replace(work, policy=replace(work.policy, four_bit=True)), small)


def test_weights_from_gpu_to_gpu_take_buffers_on_both_sides_and_shared_ones_copies() -> None:
    work = work_of(ranks=2)
    policy, rollout, shape = work.policy, work.rollout, work.policy.shape
    largest, version = 2 * shape.vocabulary * shape.hidden, 2 * shape.parameters

    def leaving(**changes: Any) -> int:
        return trained_memory(replace(policy, **changes), on_gpu=True).device["transfer"]

    size = 256 * 2**20
    assert leaving() == largest
    assert leaving(send_buffer=size) == 3 * (size + largest)
    assert leaving(send_buffer=2 * version) == 3 * version  # one takes no more than there is
    for shards in (1, 2):  # each worker is sent whole weights
        sent = replace(rollout, send_buffer=size, tensor_parallel=shards)
        device = rollout_memory(sent, work.step, H100).device
        assert device["transfer"] == 3 * (size + largest)
        assert {"rollout.weight_sync": "full"} in [
            dict(one.settings) for one in to_fit(replace(work, rollout=sent), "rollout")
        ]

    shared: dict[str, Any] = {"shares_weights": True}
    assert leaving(**shared, **keeping(TorchSpec())) == version  # float32 there, sent in bfloat16
    assert leaving(**shared, **zero(2)) == largest  # as they are
    assert leaving(**shared, **zero(3)) == version
    assert leaving(**shared, **zero(2), lora_rank=8) == version
    assert leaving(**shared, **keeping(TorchSpec()), dtype_bytes=4) == 2 * largest

    mixture = from_table("mistralai/Mixtral-8x7B-v0.1")
    both = 2 * 8 * 2 * 4096 * 14336  # of all experts of a layer, in bfloat16
    assert leaving(shape=mixture) == 2 * both
    table = 2 * 32000 * 4096
    assert leaving(shape=mixture, send_buffer=size) == 3 * (size + table) + 2 * both


def test_vllm_takes_its_share_of_a_gpu_and_shards_divide_the_weights() -> None:
    step, work = work_of().step, work_of(LARGE).rollout
    one, two = (rollout_memory(replace(work, tensor_parallel=n), step, H100) for n in (1, 2))
    for memory in (one, two):
        assert memory.peak == pytest.approx(0.85 * H100.memory_bytes, rel=0.02)
    assert two.device["weights"] == one.device["weights"] // 2
    assert two.device["KV cache"] > one.device["KV cache"]


def test_a_cache_of_one_token_is_keys_and_values_of_all_layers() -> None:
    rollout = work_of("meta-llama/Llama-3.1-8B").rollout
    assert kv_bytes(rollout) == 2 * 32 * 8 * 128 * 2
    assert kv_bytes(replace(rollout, tensor_parallel=4)) == 2 * 32 * 2 * 128 * 2


def test_four_bits_are_those_of_linear_layers_but_the_head() -> None:
    policy = replace(work_of("meta-llama/Llama-3.1-8B").policy, lora_rank=16)
    plain, packed = (
        trained_memory(replace(policy, four_bit=bits), True).device["weights"]
        for bits in (False, True)
    )
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert plain - packed == pytest.approx((2 - 4.5 / 8) * 32 * layer, abs=1)
    adapters = 6 * policy.shape.lora_parameters(16)  # float32, and autocast's copy
    assert packed - adapters == pytest.approx(6.03e9, rel=0.01)  # 3.93 + 2.10 of embeddings, head
    mixture = replace(policy, shape=from_table("Qwen/Qwen3-30B-A3B"))
    kept = trained_memory(replace(mixture, four_bit=True), True).device["weights"]
    assert kept > 2 * mixture.shape.expert_parameters, "experts are no linear layers"


def test_a_frozen_model_keeps_no_gradients() -> None:
    memory = frozen_memory(work_of().frozen[0], on_gpu=True)
    assert "gradients" not in memory.device
    assert memory.device["weights"] == 2 * from_table(SMALL).parameters
