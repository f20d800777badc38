"""Token budgets that follow the data where none is set. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

PERCENTILE = 95


def percentile_length(lengths: Iterable[int], positions: int | None = None) -> int:
    """The 95th percentile of `lengths` in tokens, within `positions`; 1 where there are none.

    It is one of the lengths, so at most a twentieth of the rows, rounded down, is longer.
    """
    ordered = sorted(lengths)
    if not ordered:
        return 1
    found = ordered[math.ceil(PERCENTILE * len(ordered) / 100) - 1]
    return found if positions is None else min(found, positions)
