"""Plans: a place for every role, what is short, and how long a step takes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.bundles import RoleRequest
from cluster.gpus import gpu_type
from cluster.placement import DoesNotFit
from cluster.plan.memory import kv_bytes
from cluster.plan.plan import Plan, make_plan
from cluster.plan.shapes import from_table
from cluster.plan.work import Work
from cluster.resources import Cluster, described
from cluster.tables import UnknownName
from tests.cluster.plan.works import H100, LARGE, SMALL, work_of, zero


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
    blocks = (3072 + 16) * token  # whole ones of 16 tokens, and one that vLLM holds back
    for row, have, fits in ((3072, blocks, True), (3072, blocks - 1, False), (3073, blocks, False)):
        made = replace(work.rollout, kv_cache_bytes=have)
        exact = replace(work, step=replace(work.step, episode_tokens=row), rollout=made)
        if fits:
            make_plan(exact, cluster)
        else:
            with pytest.raises(DoesNotFit, match=f"one sequence of {row} tokens"):
                make_plan(exact, cluster)


def test_the_weights_of_both_colocated_roles_count_on_their_device() -> None:
    work = replace(work_of(), colocate=[["policy", "rollout"]])
    with pytest.raises(DoesNotFit, match=r"\(policy 0, rollout 0\)"):
        make_plan(work, described(1, 2, "h100-80gb"))
    less = replace(work, rollout=replace(work.rollout, memory_share=0.4))
    plan = make_plan(less, described(1, 2, "h100-80gb"))
    assert plan.placement.slots["policy"] == plan.placement.slots["rollout"]


@pytest.mark.parametrize("order", [("a100-80gb", "l40s-48gb"), ("l40s-48gb", "a100-80gb")])
def test_a_role_on_two_types_of_gpus_takes_what_the_smaller_has(order: tuple[str, str]) -> None:
    """The slower one has more memory here."""
    work = work_of(replicas=3)
    requests = tuple(one for one in work.requests if one.role != "reference")
    work = replace(work, requests=requests, frozen=())
    nodes = tuple(described(1, 2, gpu).nodes[0]._replace(name=gpu) for gpu in order)
    plan = make_plan(work, Cluster(nodes, "mixed"))
    smaller = gpu_type("l40s-48gb").memory_bytes
    assert len({slot.node for slot in plan.placement.slots["rollout"]}) == 2
    assert plan.memory["rollout"].peak == pytest.approx(0.85 * smaller, rel=0.01)
    check_plan(plan)


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


def test_a_plan_is_equal_data_in_and_out() -> None:
    plan = make_plan(work_of(), described(1, 8, "h100-80gb"))
    assert isinstance(plan, Plan)
    assert json.loads(json.dumps(plan.as_dict())) == plan.as_dict()
