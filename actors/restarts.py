"""How often what was lost may be started again, and how long to wait before. Pure.

Restarts come back with time: a run of weeks may lose what it has more often than one of hours.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PERIOD_S = 3600.0
"""In which a budget of restarts that is used up is whole again."""
LONGEST_PAUSE_S = 60.0


class Restarts:
    """`limit` restarts; those taken come back one by one, all of them within `PERIOD_S`."""

    def __init__(self, limit: int, now: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._now = now
        self._missing = 0.0
        self._since = now()

    @property
    def left(self) -> int:
        """Restarts that could be taken now."""
        now = self._now()
        self._missing = max(0.0, self._missing - (now - self._since) * self.limit / PERIOD_S)
        self._since = now
        return int(self.limit - self._missing + 1e-9)

    def take(self) -> bool:
        """Take one, where one is left."""
        if not self.left:
            return False
        self._missing += 1
        return True


def pause(failures: int) -> float:
    """Seconds before the next try, after so many in a row that came to nothing."""
    return 0.0 if failures == 0 else min(LONGEST_PAUSE_S, 2.0 ** min(failures - 1, 6))
