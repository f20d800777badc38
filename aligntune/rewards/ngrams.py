"""Rewards against repetition: within a completion, and between those of a group. Pure.

A word is a run of letters and digits, or a single other character that is no white space; case does
not count. So a text in Chinese or Thai, which has no blanks, is few long words; use `unit`
`characters` there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from actors.scoring.said import Completion, text_of

WORD = re.compile(r"\w+|[^\w\s]")
Order = Annotated[int, Field(ge=1)]
Unit = Literal["words", "characters"]


def repetition(
    completions: list[Completion], *, n: Order = 3, unit: Unit = "words", **columns: Any
) -> list[float]:
    """Minus the share of a completion's n-grams that repeat an earlier one of it.

    Range: -1 to 0; 0 where none repeats, and where a text has fewer than `n` words.
    Formula: distinct / all - 1, of n-grams.
    Source: distinct-n (Li et al. 2016, arXiv:1510.03055), as the penalty of Yeo et al. 2025
    (arXiv:2502.03373).
    """
    return [_repetition(_ngrams(text_of(completion), n, unit)) for completion in completions]


def diversity(
    completions: list[Completion], *, n: Order = 3, unit: Unit = "words", **columns: Any
) -> list[float]:
    """The share of a completion's different n-grams that no other completion of its group has.

    Range: 0 to 1; 1 for a completion that is alone, 0 for a text of fewer than `n` words.
    Formula: |own - union of the others'| / |own|, sets of n-grams.
    Source: the idea of self-BLEU (Zhu et al. 2018, arXiv:1802.01886), with sets.
    """
    own = [set(_ngrams(text_of(completion), n, unit)) for completion in completions]
    holders: dict[tuple[str, ...], int] = {}
    for grams in own:
        for gram in grams:
            holders[gram] = holders.get(gram, 0) + 1
    return [
        sum(holders[gram] == 1 for gram in grams) / len(grams) if grams else 0.0 for grams in own
    ]


def pieces(text: str, unit: str) -> list[str]:
    """The words of a text in lower case, or its characters without white space."""
    folded = text.casefold()
    return WORD.findall(folded) if unit == "words" else [c for c in folded if not c.isspace()]


def _ngrams(text: str, n: int, unit: str) -> list[tuple[str, ...]]:
    parts = pieces(text, unit)
    return [tuple(parts[first : first + n]) for first in range(len(parts) - n + 1)]


def _repetition(grams: Sequence[tuple[str, ...]]) -> float:
    return len(set(grams)) / len(grams) - 1 if grams else 0.0
