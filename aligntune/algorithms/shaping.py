"""Rewards that depend on length."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def soft_overlong(lengths: torch.Tensor, budget: int, cache: int) -> torch.Tensor:
    """DAPO eq. 13, float64 in [-1, 0], from `lengths`, `budget` (L_max) and `cache` in tokens.

    0 up to L_max - L_cache, (L_max - L_cache - n) / L_cache up to L_max, -1 beyond. Raises
    ValueError where the cache is not within the budget.
    """
    if not 0 < cache <= budget:
        raise ValueError(
            f"overlong_cache must lie between 1 and max_completion_length = {budget}, got {cache}"
        )
    return ((budget - cache - lengths.double()) / cache).clamp(-1.0, 0.0)
