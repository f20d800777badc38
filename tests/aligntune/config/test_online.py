"""The config tree: resolved values, refusals in one line, and the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from actors.settings import OneKind, OneOf
from actors.strategies.specs import DeepSpeedSpec, TorchSpec
from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.config.preference import PreferenceConfig
from aligntune.config.tree import SHORT_FORMS, dump, parse_override
from aligntune.errors import UserError
from aligntune.trainers import create_rl_trainer


@pytest.fixture
def tree() -> dict[str, Any]:
    return {
        "algorithm": "grpo",
        "model": {"name": "some/model"},
        "data": {"path": "data.jsonl"},
        "rewards": ["exact_match"],
        "output_dir": "runs/x",
    }


def test_silence_is_filled_from_the_algorithms_defaults(tree: dict[str, Any]) -> None:
    config = load_config(tree)
    assert config.train.completions_per_group == 8
    assert config.train.groups_per_minibatch == config.train.groups_per_step
    assert config.train.epochs_per_batch == 1
    assert config.policy.learning_rate == 1e-6
    assert config.train.epochs == 1.0
    assert config.algorithm.beta == 0.04


def test_an_override_wins_over_the_tree_and_keeps_its_type(tree: dict[str, Any]) -> None:
    config = load_config(
        tree, ["train.steps=7", "algorithm.beta=0", "rewards.0.weight=2", "model.lora.r=4"]
    )
    assert (config.train.steps, config.train.epochs) == (7, None)
    assert config.algorithm.beta == 0
    assert config.rewards[0].weight == 2
    assert config.model.lora is not None
    assert config.model.lora.r == 4


@pytest.mark.parametrize("spelled", ["GRPO", "Grpo", "grpo "])
def test_a_choice_in_another_spelling_keeps_its_options(tree: dict[str, Any], spelled: str) -> None:
    tree["algorithm"] = {"name": "grpo", "beta": 0.3}
    assert load_config(tree, [f"algorithm={spelled}"]).algorithm.beta == 0.3
    made = create_rl_trainer(config=tree, algorithm=spelled)
    assert made.config.algorithm.beta == 0.3
    assert load_config(tree, ["algorithm=Dr. GRPO"]).algorithm.beta == 0, "another's go with it"


def test_a_path_to_an_algorithm_is_the_same_choice_only_as_it_stands(tree: dict[str, Any]) -> None:
    path = "aligntune.algorithms.grpo:GRPO"
    tree["algorithm"] = {"name": path, "beta": 0.3}
    assert load_config(tree, [f"algorithm={path}"]).algorithm.beta == 0.3
    assert load_config(tree, ["algorithm=grpo"]).algorithm.beta == 0.04


def test_the_callers_mapping_is_left_as_it_was(tree: dict[str, Any]) -> None:
    load_config(tree, ["train.steps=7", "algorithm.beta=0"])
    assert tree["algorithm"] == "grpo"
    assert "train" not in tree


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=3"],
        ["policy.strategy={name: deepspeed, stage: 3}", "policy.ranks=2"],
        ["rollout.engine={name: vllm, options: {max_num_seqs: 4}}"],
    ],
)
def test_a_resolved_tree_reads_back_as_itself(tree: dict[str, Any], overrides: list[str]) -> None:
    config = load_config(tree, overrides)
    assert load_config(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize(
    ("before", "overrides", "now"),
    [
        ("deepspeed", [], DeepSpeedSpec()),
        ("deepspeed", ["policy.strategy.stage=3"], DeepSpeedSpec(stage=3)),
        (None, ["policy.strategy.stage=3", "policy.strategy=deepspeed"], DeepSpeedSpec(stage=3)),
        ({"name": "deepspeed", "stage": 1}, ["policy.strategy=deepspeed"], DeepSpeedSpec(stage=1)),
        ({"name": "deepspeed", "stage": 1}, ["policy.strategy=torch"], TorchSpec()),
        (DeepSpeedSpec(stage=3, offload=True), [], DeepSpeedSpec(stage=3, offload=True)),
    ],
)
def test_a_choice_by_its_name_by_its_options_or_by_both(
    tree: dict[str, Any], before: Any, overrides: list[str], now: Any
) -> None:
    if before is not None:
        tree["policy"] = {"strategy": before}
    assert load_config(tree, overrides).policy.strategy == now


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.max_completion_lenght=5"], "did you mean 'rollout.max_completion_length'"),
        (["algorithm.betta=1"], r"unknown key 'algorithm.betta'; did you mean 'algorithm.beta'"),
        (["rolout.engine=vllm"], "unknown key 'rolout'; did you mean 'rollout'"),
        (["algorithm=grop"], "did you mean 'grpo'"),
        (["algorithm.name=nonsense-entirely"], "unknown algorithm"),
        (["train.completions_per_group=1"], "gives no signal, use 2 or more"),
        (["train.groups_per_minibatch=5"], "does not divide"),
        (["train.steps=0"], r"train.steps: .* got 0"),
        (["train.steps=3", "train.epochs=2"], "both say how long"),
        (
            ["policy.ranks=2", "policy.strategy=torch"],
            "use policy.strategy=deepspeed or fsdp",
        ),
        (
            ["policy.strategy=deepsped"],
            "there is no 'deepsped'; give one of torch,",
        ),
        (["policy.strategy=3"], r"policy.strategy: give one of torch, deepspeed, fsdp"),
        (
            ["policy.strategy=deepspeed", "policy.strategy.stag=3"],
            "did you mean 'policy.strategy.stage'",
        ),
        (["policy.strategy=deepspeed", "policy.strategy.stage=4"], r"policy.strategy.stage: .* 4"),
        (
            ["policy.strategy={name: torch, stage: 3}"],
            "policy.strategy.stage is an option of deepspeed, and policy.strategy is torch",
        ),
        (["critic.strategy.stage=3"], "name is missing; stage is an option of deepspeed; give one"),
        (["policy.deepspeed.stage=3"], r"write policy.strategy=\{name: deepspeed, \.\.\.\}"),
        (["policy.resources.strategy=SPREAD"], r"write policy.resources.placement"),
        (
            ["rollout.engine=transformers", "rollout.engine.tensor_parallel_size=2"],
            "is an option of vllm, and rollout.engine is transformers",
        ),
        (["rollout.engine={name: auto, options: {}}"], "an option of vllm, and .* is auto"),
        (["rollout.engine.kv_cache_gib=2"], "name is missing; kv_cache_gib is an option of vllm"),
        (["rollout.tensor_parallel_size=2"], "write rollout.engine.tensor_parallel_size"),
        (["rollout.engine_options={}"], "write rollout.engine.options"),
        (["cluster.object_store_gib=.inf"], "cluster.object_store_gib: .* finite"),
        (["eval.completions=4"], "no held-out data.*data.eval_split"),
        (["algorithm=gspo", "backend=unsloth"], "gspo does not run with backend=unsloth"),
        (["backend=tlr"], "backend"),
        (["train.seed"], "not an override; write key.path=value"),
        (["model.name.x=3"], "model.name is a value, not a section"),
        (["rewards.3.weight=2"], "not an index of a list of 1"),
        (["output_dir="], "output_dir"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tree: dict[str, Any], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_config(tree, overrides)
    assert "\n" not in str(caught.value)


def test_a_missing_section_is_named() -> None:
    with pytest.raises(UserError, match="missing"):
        load_config({"algorithm": "grpo"})


def test_broken_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("algorithm: grpo\nmodel: {name: x\n")
    with pytest.raises(UserError, match=r"config\.yaml:\d+: not valid YAML"):
        load_config(path)
    with pytest.raises(UserError, match="no config file at"):
        load_config(tmp_path / "absent.yaml")


def test_override_values_are_yaml() -> None:
    assert parse_override("a.b=[1, 2]") == ("a.b", [1, 2])
    assert parse_override("a=null") == ("a", None)
    assert parse_override("a=x=y") == ("a", "x=y")


@pytest.mark.parametrize(
    ("reward", "override", "message"),
    [
        ("math", "rewards.0.wieght=1", r"rewards\.0\.wieght'; did you mean 'rewards\.0\.weight'"),
        (
            {"model": "m"},
            "rewards.0.batchsize=1",
            r"did you mean 'rewards\.0\.batch_size'",
        ),
        ("math", "rewards.0.batch_size=1", r"rewards\.0\.batch_size is an option of model, and "),
        (
            {"model": "m"},
            "rewards.0.workers=2",
            r"workers is an option of function, and",
        ),
        ("math", "rewards.0.model=m", r"rewards\.0: function and model are two kinds; give one"),
        ({"functoin": "math"}, "train.steps=1", r"functoin'; did you mean 'rewards\.0\.function'"),
        ({"model": "m"}, "rewards.0.batch_size=x", r"rewards\.0\.batch_size: .*got 'x'"),
    ],
)
def test_a_wrong_key_of_a_reward_is_told_by_the_kind_of_the_reward(
    tree: dict[str, Any], reward: Any, override: str, message: str
) -> None:
    tree["rewards"] = [reward]
    with pytest.raises(UserError, match=message):
        load_config(tree, [override])


def test_short_forms_are_those_that_the_sections_have() -> None:
    """Sections that are one of several choices or kinds say what a text alone stands for."""
    found = {"algorithm": "name"}  # whose choices are registered, and no table

    def walk(model: type[BaseModel], path: str) -> None:
        for name, field in model.model_fields.items():
            where, marks = f"{path}{name}", list(field.metadata)
            for item in get_args(field.annotation):
                if get_origin(field.annotation) is list and hasattr(item, "__metadata__"):
                    where, marks = f"{where}.*", [*item.__metadata__]
            for mark in marks:
                if isinstance(mark, OneKind):
                    found[where] = mark.short
                elif isinstance(mark, OneOf):
                    found[where] = "name"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation, f"{where}.")

    walk(RunConfig, "")
    walk(PreferenceConfig, "")
    assert found == SHORT_FORMS
