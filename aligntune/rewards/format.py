"""Rewards for the form of a completion. Pure."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from actors.scoring.said import Completion, text_of

_TAG = re.compile(r"[\w.:-]+")


def format_match(
    completions: list[Completion],
    *,
    pattern: str,
    match: Literal["full", "search"] = "full",
    **columns: Any,
) -> list[float]:
    """1 where the regular expression `pattern` matches, else 0; `.` matches line ends too.

    Range: 0 or 1.
    Formula: `match` "full": the completion as a whole, white space around it removed. "search":
    anywhere in it, `^` and `$` at its ends only.
    Source: Python's `re`.

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


def tags(
    completions: list[Completion],
    *,
    tags: Annotated[list[str], Field(min_length=1)],
    partial: bool = False,
    **columns: Any,
) -> list[float]:
    """1 where a completion is the tagged parts one after the other, each once, and nothing else.

    Range: 0 or 1; with `partial` 0 to 1.
    Formula: for `tags` [think, answer] the text is `<think>...</think> <answer>...</answer>`, white
    space around and between. `partial` gives the share of the marks `<tag>` and `</tag>` that are
    there exactly once, wherever they stand.
    Source: the format rewards of DeepSeek-R1 (arXiv:2501.12948) and of its open reproductions.

    Raises:
        ValueError: a tag with a character that is no letter, digit, `-`, `_`, `.` or `:`, or twice.
    """
    if not all(_TAG.fullmatch(tag) for tag in tags) or len(set(tags)) < len(tags):
        raise ValueError(f"reward option 'tags' is {tags}; give names as in [think, answer]")
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    return [_tagged(text_of(completion), marks, partial) for completion in completions]


def _tagged(text: str, marks: list[str], partial: bool) -> float:
    once = [text.count(mark) == 1 for mark in marks]
    if partial or not all(once):
        return sum(once) / len(marks) if partial else 0.0
    between, rest = [], text
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found:  # its place was before another one's
            return 0.0
        between.append(before)
    return float(not any(part.strip() for part in (*between[::2], rest)))
