"""A key that another one makes do nothing is refused where it is set, and never as a default."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from aligntune.config.load import load_config
from aligntune.config.tree import dump
from aligntune.errors import UserError

BASE = {"model": {"name": "m"}, "data": {"path": "d", "eval_path": "e"}, "output_dir": "o"}
ONLINE = {**BASE, "algorithm": "grpo", "rewards": ["math"]}
GAME = {"environment": "a:Game"}
PPO = {**BASE, "algorithm": "ppo", "rewards": ["environment"], **GAME}
JOINS = {"cluster": {"address": "auto"}}
SCORED = {**BASE, "algorithm": "reward_model", "rewards": ["length"]}
TABLES = [{**BASE, "algorithm": name} for name in ("dpo", "sft", "reward_model")]


@pytest.mark.parametrize(
    ("tree", "key", "why"),
    [
        (ONLINE, "eval.completions=8", "are the same; raise eval.temperature, or remove it"),
        (
            ONLINE,
            "checkpoint.copy_timeout_s=60",
            "without checkpoint.storage; set that, or remove it",
        ),
        (
            {**ONLINE, "rollout": {"engine": "transformers"}},
            "rollout.max_concurrent_groups=8",
            "always has 2 groups in flight; use rollout.engine=vllm, or remove it",
        ),
        *(
            (tree, "hub.private=false", "nothing is pushed without hub.push_to")
            for tree in (ONLINE, SCORED)
        ),
        *(
            (tree, "hub.timeout_s=60", "nothing is pushed without hub.push_to")
            for tree in (ONLINE, SCORED)
        ),
        (PPO, "episodes.discount=0.9", "ppo takes a turn's reward at its turn .* algorithm.gamma"),
        *(
            ({**ONLINE, **plays}, "episodes.discount=0.9", "only an agent says what each of its")
            for plays in (GAME, {"tools": ["a:b"]})
        ),
        *(
            (tree, "cluster.object_store_gib=2", "with cluster.address=auto no Ray is started here")
            for tree in (JOINS | ONLINE, JOINS | SCORED)
        ),
        (SCORED, "data.chosen_column=best", "rewards form the pairs"),
        (SCORED, "data.rejected_column=worst", "rewards form the pairs"),
        *((tree, "cluster.placement_timeout_s=9", "train.start_timeout_s") for tree in TABLES),
        (SCORED, "rewards.0.workers=2", "one after the other, before anything starts"),
        (SCORED, "rewards.0.try_first=false", "one after the other, before anything starts"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused_in_one_line(
    tree: dict[str, Any], key: str, why: str
) -> None:
    with pytest.raises(UserError, match=why) as refused:
        load_config(tree, [key])
    assert str(refused.value).startswith(f"{key.partition('=')[0]} would do nothing: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("tree", "overrides"),
    [
        (ONLINE, ["eval.completions=8", "eval.temperature=0.6"]),
        ({**ONLINE, **GAME}, ["eval.completions=8"]),
        (ONLINE, ["checkpoint.copy_timeout_s=60", "checkpoint.storage=/shared"]),
        (ONLINE, ["hub.private=false", "hub.timeout_s=60", "hub.push_to=me/it"]),
        ({**ONLINE, "agent": "a:play"}, ["episodes.discount=0.9"]),
        (ONLINE, ["cluster.object_store_gib=2"]),
        *(
            (ONLINE, ["rollout.max_concurrent_groups=8", f"rollout.engine={engine}"])
            for engine in ("auto", "vllm")
        ),
        (ONLINE, ["rollout.max_concurrent_groups=32", "rollout.engine=transformers"]),
        (TABLES[2], ["data.chosen_column=best", "data.rejected_column=worst"]),
        (ONLINE, ["cluster.placement_timeout_s=9", "rewards.0.workers=2"]),
        (ONLINE, ["rewards.0={url: 'http://x/y'}", "train.stall_timeout_s=100"]),
        (PPO, []),
        (SCORED, []),
        *((tree, []) for tree in TABLES),
    ],
)
def test_where_it_does_something_it_is_taken_and_the_config_that_a_run_writes_is_read_again(
    tree: dict[str, Any], overrides: list[str]
) -> None:
    """What a run writes says every key, the defaults too."""
    config = load_config(tree, overrides)
    assert load_config(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize("betas", ["[0.9, 1]", "[-0.1, 0.9]", "[1.5, 0.9]"])
def test_a_mean_of_adam_that_never_moves_is_refused(betas: str) -> None:
    with pytest.raises(UserError, match=r"policy\.adam_betas\.\d"):
        load_config(ONLINE, [f"policy.adam_betas={betas}"])
    with pytest.raises(UserError, match=r"train\.adam_betas\.\d"):
        load_config(TABLES[0], [f"train.adam_betas={betas}"])
