"""Rewards the end-to-end tests name by import path."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

SPECIAL = re.compile(r"<\|[^|]*\|>")  # an untrained model writes many, as <|reserved_12|>


def digits(completions: list[str], **columns: Any) -> list[float]:
    """The share of characters that are digits, special tokens left out."""
    written = [SPECIAL.sub("", text) for text in completions]
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in written]


def misbehaves_for(
    prompts: list[str], completions: list[str], bad: dict[str, str], counter: str, **columns: Any
) -> list[float]:
    """NaN, no answer, an exception, or an exception the first time only, as `bad` says."""
    match bad.get(prompts[0]):
        case "nan":
            return [float("nan")] * len(completions)
        case "hang":
            time.sleep(3600)
        case "raise":
            raise ValueError("broken")
        case "once" if not Path(counter).exists():
            Path(counter).touch()
            raise ValueError("flaky")
    return digits(completions)


def undecided(completions: list[str], **columns: Any) -> list[float]:
    """The same for all."""
    return [0.1] * len(completions)


def of_answered(
    completions: list[str], answer: list[str | None], **columns: Any
) -> list[float | None]:
    """1 where the completion is the answer; of a row without one it abstains."""
    pairs = zip(completions, answer, strict=True)
    return [None if right is None else float(text == right) for text, right in pairs]


def always_raises(completions: list[str], **columns: Any) -> list[float]:
    """A broken reward."""
    raise ValueError("this reward is broken")


def like_the_chosen(completions: list[str], chosen: list[str], **columns: Any) -> list[float]:
    """Of data that are pairs: whether a completion is the chosen one."""
    return [float(text == good) for text, good in zip(completions, chosen, strict=True)]
