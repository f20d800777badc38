"""Rewards for what a completion must say, and must not. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from actors.scoring.said import Completion, text_of
from aligntune.rewards.inputs import column_of

Phrases = Annotated[list[str], Field(min_length=1)]


def required(
    completions: list[Completion],
    *,
    phrases: Phrases | None = None,
    column: str | None = None,
    ignore_case: bool = False,
    whole_words: bool = False,
    **columns: Any,
) -> list[float]:
    """The share of the phrases that a completion has, once or more.

    Range: 0 to 1.
    Formula: phrases found / phrases. They are option `phrases`, the same for every row, or a list
    in a `column` of the data. `whole_words`: no letter or digit may stand right beside a phrase.
    Source: the keyword checks of IFEval (Zhou et al. 2023, arXiv:2311.07911).

    Raises:
        ValueError: neither or both of `phrases` and `column`, or an empty phrase.
    """
    return _shares(completions, phrases, column, ignore_case, whole_words, columns)


def forbidden(
    completions: list[Completion],
    *,
    phrases: Phrases | None = None,
    column: str | None = None,
    ignore_case: bool = False,
    whole_words: bool = False,
    **columns: Any,
) -> list[float]:
    """Minus the share of the phrases that a completion has; its options are those of `required`.

    Range: -1 to 0; 0 where it has none of them.
    Formula: - phrases found / phrases.
    Source: as `required`.

    Raises:
        ValueError: as `required`.
    """
    found = _shares(completions, phrases, column, ignore_case, whole_words, columns)
    return [0.0 - share for share in found]


def _shares(
    completions: list[Completion],
    phrases: list[str] | None,
    column: str | None,
    ignore_case: bool,
    whole_words: bool,
    columns: Mapping[str, Any],
) -> list[float]:
    if (phrases is None) == (column is None):
        raise ValueError("reward options: give either phrases or column, not both and not neither")
    rows: Sequence[Any] = (
        [phrases] * len(completions) if column is None else column_of(columns, column)
    )
    flags = re.IGNORECASE if ignore_case else 0
    scores = []
    for completion, wanted in zip(completions, rows, strict=True):
        text = text_of(completion)
        patterns = [_pattern(phrase, whole_words) for phrase in _listed(wanted, column)]
        found = sum(re.search(pattern, text, flags) is not None for pattern in patterns)
        scores.append(found / len(patterns))
    return scores


def _listed(value: Any, column: str | None) -> list[str]:
    phrases = [value] if isinstance(value, str) else list(value)
    if not phrases or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
        where = "option 'phrases'" if column is None else f"a row of the data, column {column!r},"
        raise ValueError(f"{where} must have one phrase or more, none of them empty")
    return phrases


def _pattern(phrase: str, whole_words: bool) -> str:
    exact = re.escape(phrase)
    return rf"(?<!\w){exact}(?!\w)" if whole_words else exact
