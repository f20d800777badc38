"""Rewards that compare the text of a completion with a data column. Pure."""

from __future__ import annotations

from typing import Any

from actors.scoring.said import Completion, text_of
from aligntune.rewards.inputs import column_of


def exact_match(
    completions: list[Completion],
    *,
    column: str = "answer",
    ignore_case: bool = False,
    **columns: Any,
) -> list[float]:
    """1 where the completion equals the column, white space around both removed; else 0.

    Range: 0 or 1.
    Formula: text == value; with `ignore_case` as `str.casefold` makes both.
    Source: Python's `str`.

    Values that are not strings are compared as `str` writes them.

    Raises:
        ValueError: there is no such column, or a row has no value in it.
    """
    pairs = zip(completions, column_of(columns, column), strict=True)
    return [
        float(_normal(text_of(completion), ignore_case) == _normal(str(value), ignore_case))
        for completion, value in pairs
    ]


def contains(
    completions: list[Completion],
    *,
    column: str = "answer",
    ignore_case: bool = False,
    **columns: Any,
) -> list[float]:
    """1 where the column's text, white space around it removed, is in the completion; else 0.

    Range: 0 or 1.
    Formula: value in text; with `ignore_case` as `str.casefold` makes both.
    Source: Python's `str`.

    Raises:
        ValueError: there is no such column, or a row is empty in it (every text holds that).
    """
    values = [_normal(str(value), ignore_case) for value in column_of(columns, column)]
    if not all(values):
        raise ValueError(f"a row of the data is empty in column {column!r}")
    return [
        float(value in _normal(text_of(completion), ignore_case))
        for completion, value in zip(completions, values, strict=True)
    ]


def _normal(text: str, ignore_case: bool) -> str:
    return text.strip().casefold() if ignore_case else text.strip()
