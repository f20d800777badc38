"""The familiar keyword arguments land where the config tree has them."""

from __future__ import annotations

from typing import Any

import pytest

from aligntune.config.keywords import build_tree
from aligntune.errors import UserError


def test_keywords_map_onto_the_tree() -> None:
    tree, overrides, functions = build_tree(
        {
            "model_name": "m",
            "dataset_name": "d",
            "algorithm": "grpo",
            "num_generations": 4,
            "batch_size": 16,
            "beta": 0.1,
            "use_peft": True,
            "lora_r": 8,
            "reward_functions": ["math", "length"],
            "reward_function_weights": [1.0, 0.5],
            "max_completion_length": 100,
            "max_seq_length": 150,
            "overrides": ["train.seed=3"],
        }
    )
    assert tree["model"] == {"name": "m", "lora": {"r": 8}}
    assert tree["algorithm"] == {"name": "grpo", "beta": 0.1}
    assert tree["train"] == {"groups_per_step": 16, "completions_per_group": 4}
    assert tree["rollout"] == {"max_completion_length": 100, "max_prompt_length": 50}
    assert [r["weight"] for r in tree["rewards"]] == [1.0, 0.5]
    assert overrides == ["train.seed=3"]
    assert functions == {}
    assert tree["output_dir"].endswith("grpo")


def test_an_explicit_argument_wins_over_the_config_and_none_does_not() -> None:
    config = {"algorithm": "grpo", "model": {"name": "from-file"}, "train": {"epochs": 2}}
    tree, _, _ = build_tree(
        {"config": config, "model_name": "explicit", "algorithm": None, "max_steps": 5}
    )
    assert tree["model"]["name"] == "explicit"
    assert tree["algorithm"] == "grpo"
    assert tree["train"] == {"steps": 5}
    assert config["model"] == {"name": "from-file"}
    assert config["train"] == {"epochs": 2}


def test_callables_are_carried_by_name() -> None:
    def mine(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    tree, _, functions = build_tree({"algorithm": "grpo", "reward_functions": mine})
    assert functions == {"mine": mine}
    assert tree["rewards"][0]["name"] == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_nam": "x"}, "did you mean 'model_name'"),
        ({"use_peft": False, "lora_r": 4}, "contradict"),
        ({"reward_function_weights": [1.0]}, "needs reward_functions"),
        ({"reward_functions": ["math"], "reward_function_weights": [1, 2]}, "2 .* for 1"),
        ({"max_seq_length": 10}, "give max_completion_length too"),
        ({"max_seq_length": 10, "max_completion_length": 10}, "leaves no token"),
        (
            {"max_seq_length": 10, "max_completion_length": 4, "max_prompt_length": 4},
            "do not add up",
        ),
        ({"config": 3}, "YAML file or a mapping"),
        ({"reward_functions": [3]}, "neither a name nor a callable"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tree(arguments)
