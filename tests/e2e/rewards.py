"""Rewards the end-to-end tests name by import path."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def digits(completions: list[str], **columns: Any) -> list[float]:
    """The share of characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def nan_for(prompts: list[str], completions: list[str], bad: str, **columns: Any) -> list[float]:
    """NaN for one prompt, digits for the others."""
    if prompts[0] == bad:
        return [float("nan")] * len(completions)
    return digits(completions)


def hangs_for(prompts: list[str], completions: list[str], bad: str, **columns: Any) -> list[float]:
    """Never returns for one prompt."""
    if prompts[0] == bad:
        time.sleep(3600)
    return digits(completions)


def raises_until(
    prompts: list[str], completions: list[str], bad: str, counter: str, **columns: Any
) -> list[float]:
    """Raises for one prompt the first time it is asked."""
    mark = Path(counter)
    if prompts[0] == bad and not mark.exists():
        mark.touch()
        raise ValueError("flaky")
    return digits(completions)


def always_raises(completions: list[str], **columns: Any) -> list[float]:
    """A broken reward."""
    raise ValueError("this reward is broken")
