"""What a plan suggests to set is accepted, and does what was said."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aligntune.config.load import load_config
from aligntune.errors import UserError
from aligntune.online.work import work_of as work_from
from cluster.placement import DoesNotFit
from cluster.plan.memory import trained_parameters
from cluster.plan.options import to_fit
from cluster.plan.plan import Plan, make_plan
from cluster.plan.work import Work
from cluster.resources import described
from tests.cluster.plan.works import LARGE, SMALL, work_of

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
        assert work.rollout.keeps_version == (way == "full")
    size = 256 * 2**20
    assert sizes == {"full": (0, 0, False), "nccl": (size, size, False), "ipc": (0, 0, True)}
    for way, keeps in (("delta", True), ("adapter", False)):
        rollout = {"engine": "vllm", "weight_sync": way}
        work = config_of(rollout=rollout, model={"name": SMALL, "lora": {"r": 8}})
        assert work.rollout.keeps_version == keeps


def test_adapters_of_experts_are_counted_where_they_are_asked_for() -> None:
    counts = {}
    for targets in ("all-linear", ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]):
        lora = {"r": 8, "target_modules": targets}
        work = config_of(model={"name": "Qwen/Qwen3-30B-A3B", "lora": lora})
        counts[str(targets)] = trained_parameters(work.policy)[0]
    every, attention, experts = counts.values()
    assert every == experts
    assert every - attention == 48 * 8 * (128 * (2 * (2048 + 1536) + 768 + 2048) + 2048 + 128)


def test_shards_over_which_vllm_cannot_share_out_the_heads_are_refused_with_those_that_do() -> None:
    def sharded(size: int) -> Work:
        rollout = {"engine": {"name": "vllm", "tensor_parallel_size": size}}
        return config_of(rollout=rollout, model={"name": "microsoft/phi-4"})

    for size in (1, 2, 5, 10, 20, 40):  # of 40 heads and 10 of keys and values
        assert sharded(size).rollout.tensor_parallel == size
    for size in (3, 4, 8):
        with pytest.raises(UserError, match=rf"size={size}: .* use 1, 2, 5, 10, 20 or 40$"):
            sharded(size)
    settings = [dict(one.settings) for one in to_fit(work_of("microsoft/phi-4"), "rollout")]
    sizes = {one.get("rollout.engine.tensor_parallel_size") for one in settings}
    assert sizes == {None, "2"}


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
