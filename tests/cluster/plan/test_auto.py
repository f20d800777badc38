"""What is decided where a config leaves resources open: laws over described clusters, and cases."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.messages import Row
from actors.packing import microbatches
from actors.strategies.specs import TorchSpec
from aligntune.online.work import others_of
from cluster.bundles import BadRequest, RoleRequest
from cluster.gpus import gpu_names, gpu_type
from cluster.placement import DoesNotFit
from cluster.plan.auto import CACHE, HEADROOM, Choice, choose
from cluster.plan.fit import shortest, times_of, try_draft
from cluster.plan.memory import GIB, kv_bytes
from cluster.plan.shapes import from_table
from cluster.plan.work import Frozen, Kept, Rollout, Step, Trained, Work, microbatch
from cluster.resources import Cluster, described
from cluster.tables import DATA, UnknownName

SMALL, MIDDLE, LARGE = "Qwen/Qwen3-0.6B", "Qwen/Qwen2.5-7B", "meta-llama/Llama-3.1-70B"
ROLES = ("policy", "rollout", "reference", "critic", "reward")
OPEN = frozenset(
    {
        "model.dtype",
        "model.gradient_checkpointing",
        "cluster.colocate",
        "rollout.engine",
        "rewards.0.dtype",
        *(
            f"{role}.{what}"
            for role in ("policy", "critic")
            for what in ("ranks", "strategy", "tokens_per_microbatch")
        ),
        *(f"{role}.replicas" for role in ("rollout", "reference", "reward")),
        *(f"{role}.resources.{what}" for role in ROLES for what in ("cpus", "gpus", "threads")),
    }
)


def work_of(
    model: str = SMALL,
    staleness: int = 0,
    reference: bool = False,
    critic: bool = False,
    reward: bool = False,
    engine: str = "vllm",
) -> Work:
    """A run as a config without a word on resources makes it."""
    shape = from_table(model)
    step = Step(32, 8, 512, 256, passes=1, updates=1, max_staleness=staleness)
    trained = Trained(
        "policy",
        shape,
        1,
        Kept(),
        4,
        21 * 768,
        768,
        others=others_of(TorchSpec()),
        several=False,
        head_rows=1024,
    )
    requests = [RoleRequest("policy", 1, 1), RoleRequest("rollout", 1, 1)]
    requests.append(RoleRequest("reward", 1, 0.5))
    frozen = []
    if reference:
        requests.append(RoleRequest("reference", 1, 1))
        frozen.append(Frozen("reference", shape, 1, 4, 8 * 768, 1024))
    if reward:
        scorer = from_table(SMALL)
        frozen.append(Frozen("reward", scorer, 1, 4, 8 * 768, section="rewards.0", longest=768))
    if critic:
        requests.append(RoleRequest("critic", 1, 1))
    return Work(
        step,
        trained,
        Rollout(shape, 1, engine, 4, 32),
        tuple(requests),
        critic=replace(trained, role="critic", head_rows=0) if critic else None,
        frozen=tuple(frozen),
    )


def values(work: Work) -> dict[str, object]:
    """Every setting that could be decided, by its key."""
    found: dict[str, object] = {
        "model.dtype": work.policy.dtype_bytes,
        "model.gradient_checkpointing": work.policy.checkpointing,
        "cluster.colocate": [list(group) for group in work.colocate],
        "rollout.engine": (
            work.rollout.engine,
            work.rollout.tensor_parallel,
            work.rollout.memory_share,
        ),
    }
    for one in work.trained:
        found[f"{one.role}.ranks"] = one.ranks
        found[f"{one.role}.strategy"] = one.kept
    for frozen in work.frozen:
        found[f"{frozen.role}.replicas"] = frozen.replicas
        if frozen.role == "reward":
            found[f"{frozen.section}.dtype"] = frozen.dtype_bytes
    found["rollout.replicas"] = work.rollout.replicas
    for request in work.requests:
        gpus = request.gpus
        if request.role == "rollout" and gpus:
            gpus /= work.rollout.tensor_parallel
        found[f"{request.role}.resources.gpus"] = gpus
        found[f"{request.role}.resources.cpus"] = request.cpus
    return found


def seconds(work: Work, cluster: Cluster) -> float:
    draft = try_draft(work, cluster)
    assert draft is not None
    return times_of(draft, work, cluster).step(work.step.max_staleness)


def cluster_of(nodes: int, per_node: int, gpu: str) -> Cluster:
    return described(nodes, per_node, gpu if per_node else None)


MODELS = sorted(json.loads((DATA / "models.json").read_text())["models"])
CASES = st.fixed_dictionaries(
    {
        "model": st.sampled_from(MODELS),
        "staleness": st.sampled_from([0, 1, 4]),
        "reference": st.booleans(),
        "critic": st.booleans(),
        "reward": st.booleans(),
        "engine": st.sampled_from(["vllm", "transformers"]),
    }
)
NODES = st.sampled_from([1, 2, 3, 5, 8, 16, 64, 128])
PER_NODE = st.sampled_from([0, 1, 2, 4, 8])


@pytest.mark.slow
@settings(max_examples=20, deadline=None)  # each costs a third of a second
@given(CASES, NODES, PER_NODE, st.sampled_from(gpu_names()), st.sets(st.sampled_from(sorted(OPEN))))
def test_what_is_decided_fits_and_changes_nothing_that_is_set_or_there_is_a_reason(
    case: dict[str, object], nodes: int, per_node: int, gpu: str, set_: set[str]
) -> None:
    work, open_ = work_of(**case), OPEN - set_  # type: ignore[arg-type]
    cluster = cluster_of(nodes, per_node, gpu)
    answers = [_answer(work, open_, cluster) for _ in range(2)]
    assert answers[0] == answers[1]
    choice = answers[0]
    if isinstance(choice, str):
        assert "\n" not in choice
        assert "short" in choice or "too little" in choice or "fit" in choice
        return
    draft = try_draft(choice.work, cluster)
    assert draft is not None
    assert shortest(draft, choice.work) is None
    before, after = values(work), values(choice.work)
    assert {key: after[key] for key in before if key not in open_} == {
        key: before[key] for key in before if key not in open_
    }
    assert {one.path for one in choice.decided} <= {*open_, CACHE}
    decided = {one.path: one.value for one in choice.decided}
    if cache := decided.get(CACHE):  # vLLM starts: whole blocks, and one that it holds back
        blocks = int(cache * GIB) // (16 * kv_bytes(choice.work.rollout))
        assert blocks - 1 >= math.ceil(choice.work.step.row / 16)
    for one in choice.work.trained:  # what is decided is what was counted
        if budget := decided.get(f"{one.role}.tokens_per_microbatch"):
            rows = math.ceil(choice.work.step.sequences / choice.work.step.updates / one.ranks)
            assert one.tokens == microbatch(budget, rows, one.longest)


def _answer(work: Work, open_: frozenset[str], cluster: Cluster) -> Choice | str:
    try:
        return choose(work, open_, cluster, cores=8)
    except DoesNotFit as refused:
        return str(refused)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)  # each costs half a second
@given(
    CASES, st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 8]), st.sampled_from(gpu_names())
)
def test_twice_the_nodes_never_make_a_planned_step_slower(
    case: dict[str, object], nodes: int, per_node: int, gpu: str
) -> None:
    """Up to the 5 % for which fewer GPUs are taken."""
    work = work_of(**case)  # type: ignore[arg-type]
    taken = []
    for count in (nodes, 2 * nodes):
        cluster = cluster_of(count, per_node, gpu)
        try:
            taken.append(seconds(choose(work, OPEN, cluster, cores=8).work, cluster))
        except DoesNotFit:
            taken.append(float("inf"))
    assert taken[1] <= 1.05 * taken[0] * (1 + 1e-9)


def test_one_gpu_is_shared_by_all_and_rollouts_have_what_the_others_leave() -> None:
    work = choose(work_of(reference=True), OPEN, described(1, 1, "h100-80gb"), cores=8).work
    assert work.colocate == (("policy", "rollout", "reference"),)
    assert work.policy.ranks == work.rollout.replicas == 1
    assert not work.policy.kept.level
    draft = try_draft(work, described(1, 1, "h100-80gb"))
    assert draft is not None
    filled = max(use.bytes for use in draft.uses if use.device == 0)
    assert filled <= HEADROOM * gpu_type("h100-80gb").memory_bytes
    assert draft.memory["rollout"].device["KV cache"] >= kv_bytes(work.rollout) * 768


def test_stale_rollouts_have_gpus_of_their_own_and_work_about_as_long_as_the_policy() -> None:
    cluster = described(1, 8, "h100-80gb")
    work = choose(work_of(MIDDLE, staleness=1), OPEN, cluster, cores=8).work
    assert not any("rollout" in group for group in work.colocate)
    draft = try_draft(work, cluster)
    assert draft is not None
    times = times_of(draft, work, cluster)
    assert 0.5 < times.rollout / times.update < 2


def test_a_model_that_one_gpu_does_not_hold_is_shared_by_ranks() -> None:
    work = choose(work_of(LARGE), OPEN, described(16, 8, "h100-80gb"), cores=8).work
    assert work.policy.kept.weights
    assert not work.policy.kept.offload
    assert work.rollout.tensor_parallel > 1


@pytest.mark.parametrize("nodes", [1, 4])
def test_shards_share_out_query_heads_and_those_of_keys_and_values(nodes: int) -> None:
    work = choose(work_of("microsoft/phi-4"), OPEN, described(nodes, 8, "l4-24gb"), cores=8).work
    assert work.rollout.tensor_parallel in (2, 5, 10), "of 40 heads and 10, on GPUs of 24 GB"


def test_gpus_of_a_replica_that_vllm_cannot_share_the_model_over_are_refused() -> None:
    work = work_of("microsoft/phi-4")
    requests = tuple(
        replace(one, gpus=4.0) if one.role == "rollout" else one for one in work.requests
    )
    work = replace(work, requests=requests, rollout=replace(work.rollout, gpus_as_set=4.0))
    said = r"rollout.resources.gpus=4: .* use 1, 2, 5, 10, 20 or 40$"
    with pytest.raises(BadRequest, match=said):
        choose(work, OPEN - {"rollout.resources.gpus"}, described(1, 8, "h100-80gb"), cores=8)


def test_a_choice_says_where_gpus_of_several_types_count_as_one() -> None:
    cluster = replace(described(1, 2, "l4-24gb"), note="as the least of both")
    said = {one.path: one for one in choose(work_of(), OPEN, cluster, cores=8).decided}
    assert "(l4-24gb, as the least of both)" in said["policy.resources.gpus"].why


def test_the_optimiser_goes_to_the_host_only_where_nothing_else_fits() -> None:
    def offloads(gpu: str) -> bool:
        return choose(work_of(MIDDLE), OPEN, described(1, 1, gpu), 8).work.policy.kept.offload

    assert offloads("h100-80gb")
    assert not offloads("mi300x-192gb")


def test_a_gpu_without_bfloat16_computes_in_float32() -> None:
    choice = choose(work_of(), OPEN, described(1, 1, "v100-32gb"), cores=8)
    said = {one.path: one for one in choice.decided}
    assert said["model.dtype"].value == "float32"
    assert said["model.dtype"].why == "v100-32gb has no bfloat16"


def test_what_is_too_large_is_refused_with_what_is_short_and_by_how_much() -> None:
    with pytest.raises(DoesNotFit, match=r"GPU 0 .* needs [\d.]+ GiB and has 22.5 GiB: .* short"):
        choose(work_of(LARGE), OPEN, described(1, 1, "l4-24gb"), cores=8)


@pytest.mark.slow
def test_of_any_size_a_gpu_is_taken_or_what_is_short_is_said() -> None:
    """Where nothing is set nothing can be left out, and a share of the GPU need not be round."""

    def refused(mib: int) -> str:
        try:
            choose(work_of(), OPEN, described(1, 1, f"bf16-{mib}mib"), cores=8)
        except DoesNotFit as why:
            return str(why)
        return ""

    short, enough = 1024, 65536
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (middle, enough) if refused(middle) else (short, middle)
    assert re.search(r"GPU 0 .* needs [\d.]+ GiB and has [\d.]+ GiB: .* short", refused(short))


def test_a_refusal_names_a_setting_that_makes_it_fit() -> None:
    cluster = described(1, 1, "l4-24gb")
    work = work_of(MIDDLE)
    work = replace(work, policy=replace(work.policy, plain_loss=True))
    with pytest.raises(DoesNotFit, match=r"what would fit: policy.tokens_per_chunk=256"):
        choose(work, OPEN, cluster, cores=8)
    work = replace(work, policy=replace(work.policy, head_rows=256))
    choose(work, OPEN, cluster, cores=8)


@pytest.mark.parametrize(("staleness", "threads"), [(0, 8), (1, 4)])
def test_without_a_gpu_roles_that_take_turns_have_all_processors(
    staleness: int, threads: int
) -> None:
    choice = choose(work_of(staleness=staleness), OPEN, described(1, 0, None), cores=8)
    assert choice.work.threads == {"policy": threads, "rollout": threads}
    assert {request.gpus for request in choice.work.requests} == {0.0}
    assert choice.work.policy.dtype_bytes == 4
    assert choice.work.requests[0].cpus == 1.0  # nothing is overbooked


def test_roles_that_work_beside_each_other_share_the_processors() -> None:
    work = work_of(reference=True, critic=True, reward=True)
    choice = choose(work, OPEN, described(1, 0, None), cores=8)
    assert choice.work.threads == {
        "policy": 4, "critic": 4, "rollout": 2, "reference": 2, "reward": 2,
    }  # fmt: skip


def test_gpus_of_no_known_type_are_refused_with_what_to_set_and_then_taken_as_set() -> None:
    cluster = described(1, 2, "l4-24gb")
    unknown = replace(cluster, nodes=(cluster.nodes[0]._replace(gpu=None),))
    keys = ["policy.resources.gpus", "rollout.resources.gpus"]
    with pytest.raises(UnknownName, match=f"set {', '.join(keys)} .*policy.resources.gpus=0"):
        choose(work_of(), OPEN, unknown, cores=8)
    with pytest.raises(UnknownName, match=rf"set {keys[1]} \("):
        choose(work_of(), OPEN - {keys[0]}, unknown, cores=8)
    work = work_of()
    ones = tuple(replace(one, gpus=float(one.role != "reward")) for one in work.requests)
    given = replace(work, requests=ones)
    choice = choose(given, OPEN - set(keys), unknown, cores=8)
    assert choice.work == given
    said = {one.path: one for one in choice.decided}
    assert said["model.dtype"].value == "float32"
    assert "is not known" in said["model.dtype"].why
    assert said["policy.ranks"].value == 1


@given(st.lists(st.integers(1, 900), min_size=1, max_size=24), st.integers(1, 4000), st.booleans())
def test_no_micro_batch_has_more_tokens_than_are_counted(
    lengths: list[int], budget: int, packed: bool
) -> None:
    rows = [Row(0, index, tokens) for index, tokens in enumerate(lengths)]
    counted = microbatch(budget, len(rows), max(lengths))
    for batch in microbatches(rows, budget, packed):
        own = [row.tokens for row in batch]
        assert (sum(own) if packed else len(own) * max(own)) <= counted


def test_the_reference_is_counted_by_the_budget_that_is_decided() -> None:
    choice = choose(work_of(reference=True), OPEN, described(1, 8, "h100-80gb"), cores=8)
    budget = {one.path: one.value for one in choice.decided}["policy.tokens_per_microbatch"]
    assert [one.tokens for one in choice.work.frozen] == [microbatch(budget, 8, 768)]
    assert budget % 768, "no whole rows: else this shows nothing"
