"""A Gymnasium environment as an agent: each answer of the model is an action, worth its reward."""

from __future__ import annotations

from typing import Any

import gymnasium

from aligntune.agents import step_agent

ACTIONS = {"left": 0, "down": 1, "right": 2, "up": 3}


def make(row: dict[str, Any]) -> Any:
    """The lake of a data row, whose column `slippery` may say that the ice is."""
    return gymnasium.make("FrozenLake-v1", is_slippery=bool(row.get("slippery")))


def show(place: int) -> str:
    """What the model is told of an observation."""
    return f"You are in row {place // 4}, column {place % 4}. Go to row 3, column 3. Where to?"


def read(answer: str) -> int:
    """The action in an answer. Raises ValueError, which the model is told."""
    said = answer.strip().lower()
    if said not in ACTIONS:
        raise ValueError(f"Say only one of {', '.join(ACTIONS)}.")
    return ACTIONS[said]


walk = step_agent(make, show, read)
