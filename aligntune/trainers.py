"""`create_rl_trainer`: the Python face of `aligntune train`, for every kind of run."""

from __future__ import annotations

from typing import Any

from aligntune.config.keywords import build_tree
from aligntune.config.load import load_config
from aligntune.config.preference import PreferenceConfig
from aligntune.online.trainer import OnlineTrainer
from aligntune.preference.trainer import PreferenceTrainer


def create_rl_trainer(**arguments: Any) -> OnlineTrainer | PreferenceTrainer:
    """A trainer from keyword arguments, a config file or mapping (`config=`), or both.

    An explicit argument wins over the config. `overrides` is a list of `key.path=value` for what
    has no keyword. Raises UserError for whatever is wrong, before anything starts.
    """
    tree, overrides, functions = build_tree(arguments)
    config = load_config(tree, overrides)
    if isinstance(config, PreferenceConfig):
        return PreferenceTrainer(config, functions)
    return OnlineTrainer(config, functions)
