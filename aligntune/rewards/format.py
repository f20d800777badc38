"""Rewards for the form of a completion. Pure."""

from __future__ import annotations

import re
from typing import Any, Literal

from aligntune.rewards.inputs import Completion, text_of


def format_match(
    completions: list[Completion],
    *,
    pattern: str,
    match: Literal["full", "search"] = "full",
    **columns: Any,
) -> list[float]:
    """1 where the regular expression `pattern` matches, else 0; `.` matches line ends too.

    `match` "full": the completion as a whole, white space around it removed. "search": anywhere in
    it, `^` and `$` at its ends only.

    Raises:
        ValueError: `match` is neither, or `pattern` is no regular expression.
    """
    if match not in ("full", "search"):
        raise ValueError(f"reward option 'match' is {match!r}; it can be 'full' or 'search'")
    try:
        regex = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"reward option 'pattern', {pattern!r}, is no regular expression: {error}"
        ) from error
    found = regex.fullmatch if match == "full" else regex.search
    return [float(found(text_of(completion).strip()) is not None) for completion in completions]
