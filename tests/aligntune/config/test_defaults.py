"""What of a config differs from the defaults is told with the default."""

from __future__ import annotations

from typing import Any

from aligntune.config.defaults import other_than_default
from aligntune.config.online import load_online_config
from tests.aligntune.config.test_preference import config


def test_what_was_set_to_its_default_does_not_differ() -> None:
    tree: dict[str, Any] = {
        "algorithm": {"name": "grpo", "beta": 0.04},
        "model": {"name": "m"},
        "data": {"path": "d"},
        "output_dir": "o",
        "rewards": ["exact_match"],
        "train": {"steps": 3},
    }
    plain = other_than_default(load_online_config(tree))
    assert plain["train.steps"] is None
    assert plain["rewards"] == []
    assert "algorithm.beta" not in plain
    assert "output_dir" not in plain  # a key without a default
    tree["algorithm"] = {"name": "grpo", "beta": 0.1}
    tree["policy"] = {"weight_decay": 0.5}
    other = other_than_default(load_online_config(tree))
    assert {path: other[path] for path in other.keys() - plain.keys()} == {
        "algorithm.beta": 0.04,
        "policy.weight_decay": 0.0,
    }


def test_what_machines_decide_differs_once_it_is_set() -> None:
    assert other_than_default(config("train.resources.gpus=2"))["train.resources.gpus"] == "auto"
    assert "train.resources.gpus" not in other_than_default(config())
