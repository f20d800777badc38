"""Rewards for the length of a completion, in characters. Pure."""

from __future__ import annotations

from typing import Any, Literal

from aligntune.rewards.inputs import Completion, text_of


def length_penalty(
    completions: list[Completion],
    *,
    target: int,
    tolerance: int = 0,
    side: Literal["both", "over", "under"] = "both",
    **columns: Any,
) -> list[float]:
    """0 within `tolerance` characters of `target`, then down by 1/`target` a character, to -1.

    `side` "over" leaves completions shorter than `target` at 0, "under" the longer ones.

    Raises:
        ValueError: `target` is not positive, `tolerance` negative, or `side` unknown.
    """
    if target <= 0 or tolerance < 0:
        raise ValueError(
            f"reward options: target {target} must be positive and tolerance {tolerance} not "
            "negative, both in characters"
        )
    if side not in ("both", "over", "under"):
        raise ValueError(f"reward option 'side' is {side!r}; it can be 'both', 'over' or 'under'")
    return [
        -min(1.0, max(0, _distance(len(text_of(completion)), target, side) - tolerance) / target)
        for completion in completions
    ]


def _distance(length: int, target: int, side: str) -> int:
    if side == "over":
        return max(0, length - target)
    if side == "under":
        return max(0, target - length)
    return abs(length - target)
