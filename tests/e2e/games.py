"""Environments for whole runs."""

from __future__ import annotations


class Adding:
    """The sum of two numbers, which a tool knows."""

    def reset(self, **row: object) -> None:
        """Begin."""
        self.calls = 0

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their sum.
        """
        self.calls += 1
        return a + b

    def get_reward(self) -> float:
        """How often the tool was called."""
        return float(self.calls)


def asked(environments: list[Adding], **columns: object) -> list[float]:
    """How often the tool was called, as the living environment says."""
    return [float(one.calls) for one in environments]


def messages(completions: list[list[dict[str, object]]], **columns: object) -> list[float]:
    """How many messages there were after the prompt."""
    return [float(len(one)) for one in completions]
