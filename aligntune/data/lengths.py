"""Token budgets that follow the data where none is set. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

PERCENTILE = 95


def percentile_length(lengths: Iterable[int]) -> int:
    """The 95th percentile of `lengths` in tokens; 1 where there are none.

    It is one of the lengths, so at most a twentieth of the rows, rounded down, is longer.
    """
    ordered = sorted(lengths)
    if not ordered:
        return 1
    return ordered[math.ceil(PERCENTILE * len(ordered) / 100) - 1]
