"""A tool and an environment as a user writes them; processes that hold them import nothing else."""

from __future__ import annotations

from typing import Any


class Quiet:
    """An environment that asks in the row's stead."""

    def reset(self, **row: Any) -> str:
        return "1+1"

    def nod(self) -> str:
        """Nod."""
        return "yes"

    def get_reward(self) -> float:
        return 1.0


def nod() -> str:
    """Nod."""
    return "yes"
