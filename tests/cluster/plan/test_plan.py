"""The pre-flight: pure functions over descriptions, and the command around them."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file, save_file

from actors.strategies.specs import DeepSpeedSpec, FSDPSpec, StrategySpec, TorchSpec
from aligntune.cli import main
from aligntune.config.load import load_config
from aligntune.online.work import kept_of, others_of
from aligntune.online.work import work_of as work_from
from cluster.bundles import RoleRequest
from cluster.gpus import gpu_type
from cluster.machines import Machines
from cluster.placement import DoesNotFit
from cluster.plan.draw import draw
from cluster.plan.memory import frozen_memory, kv_bytes, rollout_memory, trained_memory
from cluster.plan.options import to_fit
from cluster.plan.plan import Plan, make_plan
from cluster.plan.shapes import (
    BadModelConfig,
    from_config,
    from_folder,
    from_table,
    model_names,
    published_parameters,
)
from cluster.plan.work import Frozen, Rollout, Step, Trained, Work
from cluster.resources import Cluster, described
from cluster.tables import UnknownName

SMALL, LARGE = "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"
H100 = gpu_type("h100-80gb")


def keeping(strategy: StrategySpec) -> dict[str, Any]:
    """What `Trained` says of a strategy."""
    return {
        "kept": kept_of(strategy),
        "others": others_of(strategy),
        "several": strategy.several,
    }


def zero(stage: int, offload: bool = False) -> dict[str, Any]:
    """Of ZeRO."""
    return keeping(DeepSpeedSpec(stage=stage, offload=offload))  # type: ignore[arg-type]


def work_of(model: str = SMALL, ranks: int = 1, replicas: int = 1, gpus: float = 1.0) -> Work:
    """A run of equal parts on GPUs (or without): policy, rollouts, a reference."""
    shape = from_table(model)
    step = Step(32, 8, 512, 1024, passes=1, updates=1, max_staleness=0)
    kept = keeping(TorchSpec() if ranks == 1 else DeepSpeedSpec())
    return Work(
        step,
        Trained(
            "policy",
            shape,
            ranks,
            dtype_bytes=2,
            tokens=15360,
            longest=1536,
            checkpointing=True,
            head_rows=1024,
            **kept,
        ),
        Rollout(shape, replicas, "vllm", 2, 32),
        (
            RoleRequest("policy", ranks, 1, gpus),
            RoleRequest("rollout", replicas, 1, gpus),
            RoleRequest("reward", 1, 0.5),
            RoleRequest("reference", 1, 1, gpus),
        ),
        frozen=(Frozen("reference", shape, 1, 2, 12288, 1024),),
    )


# Shapes


@pytest.mark.parametrize("name", model_names())
def test_what_a_config_gives_is_what_the_published_weights_have(name: str) -> None:
    assert from_table(name).parameters == pytest.approx(published_parameters(name), rel=1e-3)


def test_the_table_goes_from_half_a_billion_to_deepseek() -> None:
    assert from_table("Qwen/Qwen2.5-0.5B-Instruct").parameters == 494_032_768
    large = from_table("deepseek-ai/DeepSeek-V3-0324")
    assert large.parameters == pytest.approx(671e9, rel=1e-3)
    assert large.active == pytest.approx(37e9, rel=0.02)
    assert large.kv_elements == 61 * (512 + 64)
    for ending in ("", "-bnb-4bit", "-unsloth-bnb-4bit"):  # of packed weights, which none trains
        named = from_table(f"unsloth/Llama-3.2-1B-Instruct{ending}")
        assert named.parameters == from_table("meta-llama/Llama-3.2-1B").parameters


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'Qwen/Qwen2.5-7B'"):
        from_table("Qwen/Qwen2.5-8B")


def test_a_local_model_is_counted_over_its_own_files(tiny_model: Path) -> None:
    from aligntune.quickstart.task import make_model

    shape = from_folder(tiny_model, "tiny")
    assert shape.parameters == sum(p.numel() for p in make_model(0).parameters())
    config = json.loads((tiny_model / "config.json").read_text())
    assert from_config(config, "tiny", "").parameters == shape.parameters


def test_weights_that_nobody_loads_are_not_counted(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    count = from_folder(tiny_model, "tiny").parameters
    assert from_folder(folder, "tiny").parameters == count

    parts = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, key in enumerate(parts)}
    for file in set(names.values()):
        save_file({key: parts[key] for key in parts if names[key] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert from_folder(folder, "tiny").parameters == count
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BadModelConfig, match=f"{file}.*cannot be read"):
        from_folder(folder, "tiny")


def test_packed_weights_are_not_taken_for_parameters(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.weight": np.zeros((40, 1), np.uint8)}, tmp_path / "model.safetensors")
    count = from_folder(tiny_model, "tiny").parameters
    assert from_folder(tmp_path, "tiny").parameters == count


def test_a_config_without_sizes_says_what_it_lacks() -> None:
    with pytest.raises(BadModelConfig, match="no hidden_size"):
        from_config({"model_type": "t5"}, "t5", "")


# Memory


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
    adapter = trained_memory(replace(policy, lora_rank=8, **keeping(FSDPSpec())), on_gpu=True)
    assert adapter.host["checkpoint"] < 0.02 * 12 * parameters // 4


def test_who_sends_and_takes_changes_keeps_a_whole_version_on_the_host() -> None:
    work = work_of(ranks=2, replicas=2)
    delta = replace(
        work,
        policy=replace(work.policy, sends_changes=True),
        rollout=replace(work.rollout, takes_changes=True),
    )
    bundle = 2 * work.policy.shape.parameters
    cluster = described(1, 8, "h100-80gb")

    def host(what: Work) -> int:
        return next(use.bytes for use in make_plan(what, cluster).uses if use.device is None)

    # Rank 0's own, one of each replica, and changes up to as much beside it in the object store.
    assert host(delta) - host(work) == (1 + 2 + 1) * bundle
    plans = [make_plan(what, cluster).memory for what in (work, delta)]
    for role in ("policy", "rollout"):
        assert plans[0][role].device == plans[1][role].device, "no GPU holds more"
        assert plans[1][role].host["last weights"] == bundle
    tight = host(delta) - bundle
    small = tuple(node._replace(memory_bytes=tight) for node in cluster.nodes)
    with pytest.raises(DoesNotFit, match=r"host .*last weights.*rollout\.weight_sync=full"):
        make_plan(delta, replace(cluster, nodes=small))


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


def test_a_frozen_model_keeps_no_gradients() -> None:
    memory = frozen_memory(work_of().frozen[0], on_gpu=True)
    assert "gradients" not in memory.device
    assert memory.device["weights"] == 2 * from_table(SMALL).parameters


# Plans


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(
    nodes=st.one_of(st.integers(1, 6), st.sampled_from([63, 1024, 4096])),
    gpus=st.integers(1, 8),
    gpu=st.sampled_from(["h100-80gb", "l4-24gb", "b200-180gb"]),
    model=st.sampled_from([SMALL, LARGE, "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3"]),
    ranks=st.sampled_from([1, 2, 8, 64, 4096]),
    replicas=st.sampled_from([1, 3, 16, 2048]),
    stage=st.integers(1, 3),
)
def test_a_plan_fills_no_device_beyond_its_memory_and_places_every_role_or_says_why(
    nodes: int, gpus: int, gpu: str, model: str, ranks: int, replicas: int, stage: int
) -> None:
    work = work_of(model, ranks, replicas)
    work = replace(work, policy=replace(work.policy, **zero(stage)))
    cluster = described(nodes, gpus, gpu)
    try:
        plan = make_plan(work, cluster)
    except DoesNotFit as short:
        reason = str(short)
    else:
        check_plan(plan)
        assert plan == make_plan(work, cluster)
        return
    assert "\n" not in reason
    assert "what would fit" in reason or "no setting" in reason


def check_plan(plan: Plan) -> None:
    work = plan.work
    for request in work.requests:
        assert len(plan.placement.slots[request.role]) == request.replicas
    for use in plan.uses:
        assert use.capacity is None or use.bytes <= use.capacity
    on = Counter((use.node, use.device) for use in plan.uses)
    assert max(on.values()) == 1
    for staleness in (0, 1):
        assert all(0 <= share <= 1 for share in plan.times.idle(staleness))
    assert plan.times.step(1) <= plan.times.step(0)
    now = plan.times.step(work.step.max_staleness)
    assert all(change.step_seconds < now for change in plan.changes)


def test_a_device_that_is_short_is_named_with_what_would_fit() -> None:
    with pytest.raises(DoesNotFit) as reason:
        make_plan(work_of(LARGE), described(1, 8, "h100-80gb"))
    said = str(reason.value)
    assert said.startswith("node-0, GPU 0 (policy 0) needs ")
    assert " short (policy: optimiser " in said
    assert "model.lora={r: 16}" in said


def test_a_rollout_whose_weights_leave_no_cache_is_told_to_shard() -> None:
    work = work_of("meta-llama/Llama-3.1-70B", ranks=16)
    work = replace(work, policy=replace(work.policy, **zero(3)))
    frozen = (replace(work.frozen[0], shape=from_table(SMALL)),)
    with pytest.raises(DoesNotFit, match=r"rollout\.engine\.tensor_parallel_size=2"):
        make_plan(replace(work, frozen=frozen), described(4, 8, "h200-141gb"))


def test_a_cache_has_to_hold_a_whole_episode() -> None:
    work = work_of(replicas=1)
    token = kv_bytes(work.rollout)
    work = replace(work, rollout=replace(work.rollout, kv_cache_bytes=2000 * token))
    cluster = described(1, 8, "h100-80gb")
    make_plan(work, cluster)
    longer = replace(work, step=replace(work.step, episode_tokens=3072))
    with pytest.raises(DoesNotFit, match="one sequence of 3072 tokens"):
        make_plan(longer, cluster)


def test_the_weights_of_both_colocated_roles_count_on_their_device() -> None:
    work = replace(work_of(), colocate=[["policy", "rollout"]])
    with pytest.raises(DoesNotFit, match=r"\(policy 0, rollout 0\)"):
        make_plan(work, described(1, 2, "h100-80gb"))
    less = replace(work, rollout=replace(work.rollout, memory_share=0.4))
    plan = make_plan(less, described(1, 2, "h100-80gb"))
    assert plan.placement.slots["policy"] == plan.placement.slots["rollout"]


def colocated(**rollout: object) -> Work:
    """Policy and rollout on one GPU, where both have place."""
    work = work_of()
    made = replace(work.rollout, memory_share=0.4, **rollout)
    return replace(work, colocate=[["policy", "rollout"]], rollout=made)


def test_roles_that_share_a_gpu_take_turns_at_every_staleness() -> None:
    cluster = described(1, 8, "h100-80gb")
    plan, apart = make_plan(colocated(), cluster), make_plan(work_of(), cluster)
    times = plan.times
    assert times.step(0) == pytest.approx(
        max(times.rollout, times.scoring) + times.update + times.transfer
    )
    assert times.rollout > times.scoring
    assert times.step(1) == times.step(0)
    assert times.idle(1) == times.idle(0)
    assert times.idle(1)[0] == pytest.approx(1 - times.rollout / times.step(0))
    assert not any("max_staleness" in change.settings for change in plan.changes)
    assert apart.times.step(1) < apart.times.step(0)
    assert any("max_staleness" in change.settings for change in apart.changes)


def test_halves_of_a_gpu_are_shared_as_colocated_roles_are() -> None:
    work = work_of(gpus=0.5)
    work = replace(work, rollout=replace(work.rollout, memory_share=0.3))
    work = replace(work, requests=tuple(r for r in work.requests if r.role != "reference"))
    plan = make_plan(replace(work, frozen=()), described(1, 1, "h100-80gb"))
    assert plan.placement.slots["policy"] == plan.placement.slots["rollout"]
    assert plan.times.step(1) == plan.times.step(0)


def test_two_replicas_on_one_gpu_are_no_faster_than_one() -> None:
    work = replace(work_of(), frozen=(), requests=(RoleRequest("policy", 1, 1, 1.0),))
    step = replace(work.step, groups=2048)  # so many that decoding is bound by arithmetic

    def seconds(replicas: int, share: float) -> float:
        rollout = replace(
            work.rollout,
            replicas=replicas,
            max_concurrent_groups=8,
            memory_share=0.4,
            kv_cache_bytes=2**33,
        )
        request = RoleRequest("rollout", replicas, 1, share)
        changed = replace(work, step=step, rollout=rollout, requests=(*work.requests, request))
        return make_plan(changed, described(1, 2, "h100-80gb")).times.rollout

    assert seconds(2, 0.5) >= 0.99 * seconds(1, 1.0)


def test_models_that_score_on_the_policys_gpu_wait_for_its_update() -> None:
    work = replace(work_of(), colocate=[["policy", "reference"]])
    work = replace(work, step=replace(work.step, completion_tokens=16))
    times = make_plan(work, described(1, 2, "h100-80gb")).times
    assert times.rollout < times.scoring < times.update
    assert times.step(1) == pytest.approx(times.scoring + times.update + times.transfer)


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize(
    ("nodes", "replicas", "hops"), [(1, 1, 0), (2, 1, 1), (4, 3, 2), (2, 3, 1)]
)
def test_weights_cross_the_network_to_every_node_but_the_policys(
    gpus: int, nodes: int, replicas: int, hops: int
) -> None:
    def seconds(nodes: int, replicas: int) -> float:
        """Of a transfer between roles that just fill the nodes."""
        each = (1 + replicas) // nodes
        work = work_of(replicas=replicas, gpus=gpus)
        two = tuple(replace(one, cpus=16 / each) for one in work.requests[:2])
        cluster = described(nodes, each * gpus, "h100-80gb" if gpus else None, 16)
        plan = make_plan(replace(work, requests=two, frozen=()), cluster)
        on = {slot.node for slot in plan.placement.slots["rollout"]}
        assert len(on - {plan.placement.slots["policy"][0].node}) == nodes - 1
        return plan.times.transfer

    link = 0.7 * (H100.network_bandwidth if gpus else 1.25e9)
    across = hops * 2 * from_table(SMALL).parameters / link
    assert seconds(nodes, replicas) - seconds(1, 1) == pytest.approx(across, abs=1e-9)


def test_of_the_policys_nodes_only_that_of_rank_0_has_the_weights() -> None:
    work = work_of(ranks=2, replicas=2)
    spread = tuple(replace(one, placement="STRICT_SPREAD") for one in work.requests[:2])
    two = replace(work, requests=spread, frozen=())
    one = replace(two, requests=(spread[0], replace(work.requests[1], placement="PACK")))
    on_both, on_one = (make_plan(run, described(2, 4, "h100-80gb")).times for run in (two, one))
    across = 2 * from_table(SMALL).parameters / (0.7 * H100.network_bandwidth)
    assert on_both.transfer - on_one.transfer == pytest.approx(across)


def test_what_does_not_fit_into_the_hosts_memory_may_stay_on_the_gpus() -> None:
    work = work_of(LARGE, ranks=8)
    away = replace(work, policy=replace(work.policy, **zero(3, offload=True)))
    cluster = described(2, 8, "h200-141gb")
    small = tuple(node._replace(memory_bytes=128 * 2**30) for node in cluster.nodes)
    with pytest.raises(DoesNotFit, match=r"host .*policy\.strategy\.offload=false"):
        make_plan(away, replace(cluster, nodes=small))


def test_a_reward_function_alone_on_the_gpus_leaves_what_is_short_on_the_host_to_be_said() -> None:
    work = replace(work_of(gpus=0), rollout=replace(work_of().rollout, engine="transformers"))
    requests = (*work.requests[:2], RoleRequest("reward", 1, 0.5, 1), *work.requests[3:])
    node = described(1, 1, "h100-80gb").nodes[0]
    small = Cluster((node._replace(memory_bytes=4 * 2**30),), "described")
    with pytest.raises(DoesNotFit, match=r"host .* short"):
        make_plan(replace(work, requests=requests), small)


def test_gpus_of_unknown_type_are_refused() -> None:
    nodes = described(1, 8, "h100-80gb").nodes
    unknown = Cluster(tuple(node._replace(gpu=None) for node in nodes), "Ray")
    with pytest.raises(UnknownName, match="--gpu NAME"):
        make_plan(work_of(), unknown)


def test_the_slower_part_bounds_the_step_and_staleness_hides_the_other() -> None:
    few = make_plan(work_of(replicas=1), described(1, 8, "h100-80gb"))
    many = make_plan(work_of(replicas=6), described(1, 8, "h100-80gb"))
    assert many.times.rollout < few.times.rollout
    assert many.times.update == few.times.update
    rollout_idle, policy_idle = few.times.idle(0)
    assert few.times.idle(1) < (rollout_idle, policy_idle)
    assert few.times.bound == max(few.times.parts, key=lambda name: few.times.parts[name])


def test_a_pass_for_old_log_probs_is_one_more_beside_the_four_of_an_update() -> None:
    """Forward, the same again for checkpointing, and backward, which is two."""
    work = work_of()
    more = replace(work, step=replace(work.step, old_passes=1.0))
    few, many = (make_plan(run, described(1, 8, "h100-80gb")).times for run in (work, more))
    assert many.update == pytest.approx(few.update * 5 / 4)


# Advice

SETTING = re.compile(r"([a-z_0-9]+(?:\.[a-z_0-9]+)+)=(\{.*?\}|[^\s,]+)")
REWARD = "Skywork/Skywork-Reward-V2-Qwen3-8B"
ON_GPUS = ["policy.resources.gpus=1", "rollout.resources.gpus=1", "model.dtype=bfloat16"]
SHARDED = ["policy.strategy=deepspeed", "policy.strategy.stage=3", "policy.ranks=16"]
SCORED = [*ON_GPUS, "reward.resources.gpus=1", "policy.tokens_per_microbatch=4096"]
TWO_SHARDS = [
    "rollout.engine=vllm",
    "rollout.engine.tensor_parallel_size=2",
    "rollout.resources.gpus=2",
]
LARGER = ["model.name=Qwen/Qwen2.5-32B", "model.gradient_checkpointing=true"]


def advice(plan: Callable[[], Plan]) -> list[tuple[list[str], float | None]]:
    """What a plan, or its refusal, says to set: (overrides, the step's seconds if promised)."""
    try:
        made = plan()
    except DoesNotFit as reason:
        said = str(reason).partition("what would fit: ")[2].split(", or ")
        return [([f"{k}={v}" for k, v in SETTING.findall(one)], None) for one in said if one]
    return [
        ([f"{k}={v}" for k, v in SETTING.findall(change.settings)], change.step_seconds)
        for change in made.changes
    ]


@pytest.mark.parametrize(
    ("tree", "overrides", "nodes", "gpu", "named"),
    [
        ({}, [f"model.name={LARGE}", *ON_GPUS[:2]], 2, "h100-80gb", "policy.strategy=deepspeed"),
        (
            {},
            [*LARGER, *ON_GPUS, *SHARDED],
            6,
            "l40s-48gb",
            "rollout.engine.tensor_parallel_size=2",
        ),
        (
            {},
            [*LARGER, *ON_GPUS, *SHARDED, *TWO_SHARDS, "policy.strategy.offload=true"],
            6,
            "l4-24gb",
            "rollout.resources.gpus=4",
        ),
        ({"rewards": [{"model": REWARD}]}, SCORED, 1, "l4-24gb", "rewards.0.dtype=bfloat16"),
        (
            {"rewards": ["exact_match", {"model": REWARD, "dtype": "bfloat16"}]},
            [*SCORED, "rewards.1.max_tokens=16384"],
            1,
            "l4-24gb",
            "rewards.1.batch_size=1",
        ),
        (
            {"rewards": [{"model": REWARD}, {"model": REWARD, "name": "second"}]},
            SCORED,
            1,
            "a100-40gb",
            "rewards.1.dtype=bfloat16",
        ),
        (
            {"algorithm": "ppo", "rewards": [{"model": REWARD}]},
            [*SCORED, f"model.name={LARGE}", "critic.resources.gpus=1"],
            2,
            "h100-80gb",
            "critic.strategy=deepspeed",
        ),
        (
            {"backend": "unsloth"},
            ["model.name=Qwen/Qwen2.5-14B", *ON_GPUS],
            1,
            "l4-24gb",
            "model.load_in_4bit=true",
        ),
        (
            {"cluster": {"colocate": [["policy", "rollout"]]}},
            ON_GPUS,
            1,
            "h100-80gb",
            "rollout.engine.gpu_memory_utilization=0.45",
        ),
        (
            {},
            [
                *("model.name=deepseek-ai/DeepSeek-V3", *ON_GPUS, *SHARDED),
                *("policy.ranks=256", "policy.tokens_per_microbatch=768"),
                *("model.gradient_checkpointing=true", "rollout.engine=vllm"),
                "rollout.engine.tensor_parallel_size=8",
            ],
            64,
            "b200-180gb",
            "rollout.engine.gpu_memory_utilization=0.92",
        ),
        (
            {"algorithm": {"name": "grpo", "beta": 0}},
            ON_GPUS,
            1,
            "h100-80gb",
            "train.max_staleness",
        ),
        (
            {"algorithm": {"name": "grpo", "beta": 0.1}},
            ON_GPUS,
            1,
            "h100-80gb",
            "reference.resources",
        ),
        (
            {"algorithm": {"name": "grpo", "beta": 0}},
            [*ON_GPUS, "rollout.max_replicas=1", "rollout.max_completion_length=4096"],
            1,
            "h200-141gb",
            "rollout.max_replicas=2",
        ),
        (
            {"algorithm": {"name": "grpo", "beta": 0}},
            [*ON_GPUS, *SHARDED, "policy.strategy.offload=true", "policy.ranks=2"],
            2,
            "h100-80gb",
            "policy.strategy.offload=false",
        ),
    ],
)
def test_every_suggestion_is_accepted_and_does_what_was_said(
    tree: dict[str, object], overrides: list[str], nodes: int, gpu: str, named: str
) -> None:
    whole = {
        "algorithm": {"name": "grpo", "beta": 0},
        "model": {"name": SMALL},
        "data": {"path": "not-read.jsonl"},
        "rewards": ["exact_match"],
        "output_dir": "not-written",
        "rollout": {"engine": "vllm"},
        **tree,
    }
    cluster = described(nodes, 8, gpu)

    def plan(*more: str) -> Plan:
        return make_plan(work_from(load_config(whole, [*overrides, *more])), cluster)

    suggested = advice(plan)
    assert any(named in setting for settings_, _ in suggested for setting in settings_), suggested
    for settings_, promised in suggested:
        changed = plan(*settings_)  # refused where the config does not take it, or it does not fit
        seconds = changed.times.step(changed.work.step.max_staleness)
        assert promised is None or seconds == pytest.approx(promised), settings_


def config_of(**changes: Any) -> Work:
    """The work of a config."""
    tree = {
        "algorithm": {"name": "grpo", "beta": 0.1},
        "model": {"name": SMALL},
        "data": {"path": "not-read.jsonl"},
        "rewards": ["exact_match"],
        "output_dir": "not-written",
        **changes,
    }
    lengths = {"max_prompt_length": 400, "max_completion_length": 600}
    return work_from(load_config({**tree, "rollout": {**lengths, **changes.get("rollout", {})}}))


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({}, 1000),
        ({"tools": ["a:b"]}, 2000),  # as much again for what tools say
        ({"tools": ["a:b"], "episodes": {"max_tokens": 5000}}, 5000),
        ({"tools": ["a:b"], "rollout": {"max_prompt_length": None}}, 2 * (512 + 600)),
    ],
    ids=["no episodes", "open", "set", "open, and so is the prompt"],
)
def test_rows_of_episodes_are_counted_with_all_their_turns(
    changes: dict[str, Any], row: int
) -> None:
    work = config_of(**changes, rewards=[{"model": REWARD}])
    assert work.policy.longest == row
    reference, reward = work.frozen
    groups = work.step.completions
    assert reference.tokens == min(groups * row, max(row, 16384))
    assert reward.longest == row
    assert work.step.longest == work.step.prompt_tokens + 600


def test_the_way_of_weights_is_known_to_a_plan() -> None:
    sizes = {}
    for way in ("full", "nccl", "ipc"):
        on_gpus = {"resources": {"gpus": 1}}
        rollout = {"engine": "vllm", "weight_sync": way, **on_gpus}
        colocate = [["policy", "rollout"]] if way == "ipc" else []
        work = config_of(rollout=rollout, policy=on_gpus, cluster={"colocate": colocate})
        sizes[way] = (
            work.policy.send_buffer, work.rollout.send_buffer, work.policy.shares_weights
        )  # fmt: skip
    size = 256 * 2**20
    assert sizes == {"full": (0, 0, False), "nccl": (size, size, False), "ipc": (0, 0, True)}


def test_a_budget_between_rows_may_be_halved_to_whole_ones() -> None:
    work = work_of(LARGE)
    work = replace(work, policy=replace(work.policy, tokens=2000))  # rows have 1536
    settings = [dict(option.settings) for option in to_fit(work, "policy")]
    assert {"policy.tokens_per_microbatch": "1536"} in settings


def test_more_ranks_have_fewer_rows_each() -> None:
    work = work_of(LARGE)
    few = replace(work, step=replace(work.step, groups=2))
    ranks = {
        option.work.policy.ranks: option.work.policy.tokens // work.policy.longest
        for option in to_fit(few, "policy")
        if "policy.ranks" in option.settings
    }
    assert (ranks[2], ranks[4], ranks[8], ranks[1024]) == (8, 4, 2, 1)


# Size


@pytest.mark.slow
def test_planning_takes_work_in_proportion_to_nodes() -> None:
    """Counts calls, not seconds: they are the same on every machine. A plan that compared nodes
    with each other would make eight times as many calls for each node."""

    def calls(nodes: int) -> int:
        work = work_of(LARGE, ranks=nodes, replicas=7 * nodes - 168)
        work = replace(work, policy=replace(work.policy, **zero(3)))
        cluster = described(nodes, 8, "h100-80gb")
        seen = Counter[str]()
        before = sys.getprofile()
        sys.setprofile(lambda _frame, event, _arg: seen.update((event,)))
        try:
            plan = make_plan(work, cluster)
        finally:
            sys.setprofile(before)
        assert len(plan.placement.slots["rollout"]) == 7 * nodes - 168
        return seen["call"] + seen["c_call"]

    few, many = calls(64), calls(512)
    assert many / 512 < 1.5 * few / 64


@pytest.mark.parametrize("gpus", [0, 8])
def test_nodes_of_one_kind_are_drawn_once_though_their_memory_differs_a_little(gpus: int) -> None:
    nodes = described(64, gpus, "h100-80gb" if gpus else None).nodes
    sizes = [512 * 2**30 - 2**20 * (37 * index % 101) for index in range(64)]
    cluster = Cluster(
        tuple(node._replace(memory_bytes=size) for node, size in zip(nodes, sizes, strict=True)),
        "Ray",
    )
    work = work_of(ranks=64, replicas=64, gpus=float(gpus > 0))
    rollout = replace(work.rollout, engine="vllm" if gpus else "transformers")
    spread = tuple(replace(one, placement="SPREAD") for one in work.requests)
    out = io.StringIO()
    draw(
        make_plan(replace(work, rollout=rollout, requests=spread), cluster),
        Console(file=out, force_terminal=False),
    )
    shown = out.getvalue()
    assert len(shown.splitlines()) < 60
    assert " nodes)" in shown
    assert f"{min(sizes) / 2**30:.1f} GiB .. {max(sizes) / 2**30:.1f} GiB" in shown


def test_a_node_with_half_the_memory_is_drawn_apart() -> None:
    nodes = described(3, 0).nodes
    sizes = (256 * 2**30, 256 * 2**30, 128 * 2**30)
    cluster = Cluster(
        tuple(node._replace(memory_bytes=size) for node, size in zip(nodes, sizes, strict=True)),
        "Ray",
    )
    work = work_of(replicas=3, gpus=0.0)
    spread = (replace(work.requests[1], placement="STRICT_SPREAD"),)
    out = io.StringIO()
    plan = make_plan(
        replace(work, frozen=(), requests=(*spread, work.requests[0])),
        cluster,
    )
    draw(plan, Console(file=out, force_terminal=False))
    assert "128.0 GiB" in out.getvalue()
    assert "256.0 GiB" in out.getvalue()
    assert ".. 256.0" not in out.getvalue()


# The command


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Path:
    tree = {
        "algorithm": {"name": "grpo", "beta": 0.04},
        "model": {"name": str(tiny_model)},
        "data": {"path": "not-read.jsonl"},
        "rewards": ["exact_match"],
        "output_dir": str(tmp_path / "run"),
        "rollout": {"engine": "transformers"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`aligntune plan` on the config; its exit code and what it printed. Nothing may start Ray."""
    import ray

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a plan started Ray")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests' Ray is not asked

    def command(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(config), *arguments])
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return command


def test_the_command_draws_a_plan_for_this_machine(run: Run, config: Path) -> None:
    code, out, error = run()
    assert code == 0, error
    assert "this-machine" in out
    assert "policy 0, rollout 0, reward 0, reference 0" in out
    for heading in ("where each rank goes", "GiB of one rank", "bound by", "assumed"):
        assert heading in out
    assert out.isascii()
    assert not (config.parent / "run").exists()


GPUS = [f"{role}.resources.gpus=1" for role in ("policy", "rollout", "reference")]
ON_H100 = ["--nodes", "64", "--gpus-per-node", "8", "--gpu", "h100-80gb", *GPUS]


@pytest.mark.slow
def test_the_command_tells_everything_as_json(run: Run) -> None:
    code, out, error = run(*ON_H100, f"model.name={SMALL}", "rollout.replicas=500", "--json")
    assert code == 0, error
    plan = json.loads(out)
    assert len(plan["placement"]["rollout"]) == 500
    assert plan["staleness"]["0"]["step_seconds"] >= plan["staleness"]["1"]["step_seconds"]
    assert plan["bound"] in plan["seconds"]
    assert plan["assumptions"]


def test_nodes_that_look_alike_are_drawn_once(run: Run) -> None:
    code, out, error = run(
        *ON_H100, f"model.name={SMALL}", "rollout.replicas=502", "policy.ranks=1"
    )
    assert code == 0, error
    assert "node-01 .. node-62 (62 nodes)" in out
    assert "rollout 6 .. 494" in out
    assert len(out.splitlines()) < 80


AS_SET = [
    f"model.name={LARGE}",
    "model.dtype=bfloat16",
    "model.gradient_checkpointing=false",
    "policy.ranks=1",
    "policy.strategy=torch",
    "policy.tokens_per_microbatch=16384",
    "cluster.colocate=[]",
]


@pytest.mark.slow
def test_a_setting_that_the_refusal_names_makes_it_fit(run: Run) -> None:
    code, _, error = run(*ON_H100, *AS_SET)
    assert code == 2
    first = error.partition("what would fit: ")[2].partition(", or ")[0]
    settings_ = [part for text in first.split(" and ") for part in text.split(", ")]
    code, _, error = run(*ON_H100, *AS_SET, *settings_)
    assert code == 0, error


def test_the_type_that_is_given_is_that_of_all_gpus_of_a_connected_cluster(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Machines(described(1, 4, "a100-40gb"), 16, here=False)
    monkeypatch.setattr("aligntune.commands.plan.machines", lambda spec: there)
    for asked, kind in (([], "a100-40gb"), (["--gpu", "a100-80gb"], "a100-80gb")):
        code, out, error = run(f"model.name={SMALL}", "rollout.engine=vllm", *asked, "--json")
        assert code == 0, error
        capacities = {one["capacity"] for one in json.loads(out)["devices"]}
        assert gpu_type(kind).memory_bytes in capacities


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes", "0"], "--nodes is 0; a cluster has 1 or more"),
        (["--nodes", "2", "--gpus-per-node", "8"], "--gpu names no type"),
        (["--nodes", "2", "--gpus-per-node", "8", "--gpu", "h10"], "did you mean 'h100-80gb'"),
        (["--gpus-per-node", "8"], "say how many with --nodes"),
        (["--nodes", "1", *GPUS], "asks for 3 GPU"),
        (["model.name=Qwen/Qwen2.5-8B"], "did you mean 'Qwen/Qwen2.5-7B'"),
        (["model.name=./nowhere"], "model folder './nowhere' does not exist"),
        (["rollout.replicas=100", "--nodes", "1"], "asks for "),
        (["cluster.colocate=[[policy, rolout]]"], "did you mean 'rollout'"),
        (
            ["rollout.engine={name: vllm, tensor_parallel_size: 4}", "rollout.resources.gpus=2"],
            "each shard has one GPU",
        ),
        (["--gpu", "tpu"], "unknown GPU 'tpu'; known are a10-24gb"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    run: Run, arguments: list[str], said: str
) -> None:
    code, out, error = run(*arguments)
    assert code == 2
    assert said in error
    assert "\n" not in error.strip()
    assert not out


def test_a_preference_job_has_no_plan(run: Run) -> None:
    code, _, error = run("algorithm=dpo")
    assert code == 2
    assert "--dry-run" in error


def test_a_plan_is_equal_data_in_and_out() -> None:
    plan = make_plan(work_of(), described(1, 8, "h100-80gb"))
    assert isinstance(plan, Plan)
    assert json.loads(json.dumps(plan.as_dict())) == plan.as_dict()
