"""Rewards for the length of a completion, in characters or words. Pure."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from actors.scoring.said import Completion, text_of


def length_penalty(
    completions: list[Completion],
    *,
    target: Annotated[int, Field(gt=0)],
    tolerance: Annotated[int, Field(ge=0)] = 0,
    side: Literal["both", "over", "under"] = "both",
    unit: Literal["characters", "words"] = "characters",
    **columns: Any,
) -> list[float]:
    """0 within `tolerance` characters of `target`, then down by 1/`target` a character, to -1.

    Range: -1 to 0.
    Formula: -min(1, max(0, |length - target| - tolerance) / target). `side` "over" leaves
    completions shorter than `target` at 0, "under" the longer ones. Words are what white space
    parts. The budget in tokens that a run has is another thing: see DAPO's `overlong_cache`.
    Source: linear, as the soft length penalty of Yu et al. 2025 (DAPO, arXiv:2503.14476).

    Raises:
        ValueError: `target` is not positive, `tolerance` negative, or `side` unknown.
    """
    if target <= 0 or tolerance < 0:
        raise ValueError(
            f"reward options: target {target} must be positive and tolerance {tolerance} not "
            "negative"
        )
    if side not in ("both", "over", "under"):
        raise ValueError(f"reward option 'side' is {side!r}; it can be 'both', 'over' or 'under'")
    distances = (_distance(_size(text_of(said), unit), target, side) for said in completions)
    return [-min(1.0, max(0, distance - tolerance) / target) for distance in distances]


def _size(text: str, unit: str) -> int:
    return len(text.split()) if unit == "words" else len(text)


def _distance(length: int, target: int, side: str) -> int:
    if side == "over":
        return max(0, length - target)
    if side == "under":
        return max(0, target - length)
    return abs(length - target)
