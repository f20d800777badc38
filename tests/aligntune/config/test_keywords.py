"""The familiar keyword arguments land where the config tree has them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aligntune.config.keywords import PATHS, SPECIAL, build_tree
from aligntune.config.load import load_config
from aligntune.errors import UserError
from aligntune.trainers import create_rl_trainer


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
    assert functions == {"rewards.0.function": mine}
    assert tree["rewards"][0]["name"] == "mine"
    both = {"algorithm": "grpo", "reward_functions": ["math", mine], "reward_model_name": "rm"}
    assert build_tree(both)[2] == {"rewards.2.function": mine}


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
        ({"reward_functions": 3}, "reward_functions is a list, not 3"),
        ({"reward_functions": "math", "reward_function_weights": 3}, "weights is a list, not 3"),
        ({"overrides": "train.steps=3"}, r"overrides is a list of 'key\.path=value'"),
        ({"overrides": [3]}, "overrides: 3 is not a text"),
        ({"max_seq_length": "long", "max_completion_length": 3}, "a number of tokens, not 'long'"),
        ({"config": "nowhere.yaml"}, "no config file at nowhere.yaml"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_tree(arguments)


def test_the_signature_has_every_argument_with_a_type_and_a_word_on_it() -> None:
    parameters = dict(inspect.signature(create_rl_trainer).parameters)
    assert parameters.pop("unknown").annotation == "Never", "a type checker refuses other names"
    assert set(parameters) == {*PATHS, *SPECIAL}
    described = inspect.getdoc(create_rl_trainer) or ""
    for name, parameter in parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default is None
        assert parameter.annotation.endswith(" | None")
        assert f"    {name}: " in described, name


def test_a_name_that_is_not_known_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="no argument 'modl_name'; did you mean 'model_name'"):
        create_rl_trainer(modl_name="x")  # type: ignore[arg-type]


def test_paths_may_be_path_objects() -> None:
    tree, _, _ = build_tree({"model_name": Path("models/qwen"), "output_dir": Path("runs/a")})
    assert tree["model"] == {"name": "models/qwen"}
    assert tree["output_dir"] == "runs/a"


def test_a_mapping_is_left_as_it_was_however_deep_a_keyword_goes() -> None:
    config = {"algorithm": "grpo", "model": {"name": "m", "lora": {"r": 2}}}
    tree, _, _ = build_tree({"config": config, "lora_r": 8})
    assert tree["model"]["lora"]["r"] == 8
    assert config["model"] == {"name": "m", "lora": {"r": 2}}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=3)
    | st.just("grpo"),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@pytest.mark.slow
@given(
    arguments=st.dictionaries(st.sampled_from([*PATHS, *SPECIAL]), VALUES, max_size=3),
    algorithm=st.sampled_from(["grpo", "dpo", "reward_model"]) | VALUES,
)
def test_whatever_an_argument_is_it_makes_a_config_or_one_line(
    arguments: dict[str, Any], algorithm: Any
) -> None:
    given_all = {"model_name": "m", "dataset_name": "d", "algorithm": algorithm, **arguments}
    try:
        tree, overrides, _ = build_tree(given_all)
        load_config(tree, overrides)
    except UserError:
        pass


HUGE = 10**5000  # more digits than Python prints


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
@pytest.mark.parametrize("index", range(7))
def test_arguments_of_a_type_that_no_setting_has_are_refused_in_one_line(
    algorithm: str, index: int
) -> None:
    values = [object(), b"x", HUGE, -HUGE, {1}, range(3), {"a": object()}]
    every = [name for name in inspect.signature(create_rl_trainer).parameters if name != "unknown"]
    given = {"model_name": "m", "dataset_name": "d", "algorithm": algorithm}
    for name in every:
        with pytest.raises(UserError) as error:
            create_rl_trainer(**{**given, name: values[index]})
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 600
