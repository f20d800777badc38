"""Reinforcement learning for language models on Ray: exact, restartable, easy to start."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aligntune.config.load import load_config
    from aligntune.config.online import RunConfig
    from aligntune.config.preference import PreferenceConfig
    from aligntune.trainers import create_rl_trainer

__version__ = "0.1.0"
__all__ = ["PreferenceConfig", "RunConfig", "__version__", "create_rl_trainer", "load_config"]

_HOMES = {
    "RunConfig": "aligntune.config.online",
    "PreferenceConfig": "aligntune.config.preference",
    "load_config": "aligntune.config.load",
    "create_rl_trainer": "aligntune.trainers",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'aligntune' has no attribute {name!r}")
