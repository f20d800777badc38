"""The answer of a completion, as majorities count it.

A registered reward that reads an answer out of a completion has it read here too. For any other
criterion the answer is the whole text, blanks collapsed: completions agree where they say the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from actors.specs import RewardFunctionSpec
from aligntune.rewards.catalogue import REWARDS

WHOLE_TEXT = "the whole completion"


def whole_text(text: str) -> str:
    """The text with its blanks collapsed."""
    return " ".join(text.split())


def reader_of(reward: object) -> tuple[Callable[[str], str], str]:
    """What reads the answer for an entry of `rewards`, and what a person calls that."""
    if isinstance(reward, RewardFunctionSpec):
        registered = REWARDS.get(reward.function)
        if registered is not None and registered.answer is not None:
            module, _, name = registered.answer.partition(":")
            reader: Callable[[str], str] = getattr(importlib.import_module(module), name)
            return reader, f"the answer that reward {reward.function!r} reads"
    return whole_text, WHOLE_TEXT
