"""The reward for how hard a text is to read, by textstat. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from actors.scoring.said import Completion, text_of


def readability(
    completions: list[Completion],
    *,
    low: float,
    high: float,
    margin: Annotated[float, Field(gt=0)] = 5.0,
    index: Literal["ari", "coleman_liau", "lix"] = "ari",
    **columns: Any,
) -> list[float]:
    """1 where the index is from `low` to `high`, falling to 0 within `margin` beyond them.

    Range: 0 to 1; 0 for a text without words.
    Formula: `ari` = 4.71 characters / words + 0.5 words / sentences - 21.43, and `coleman_liau` =
    0.058 letters per 100 words - 0.296 sentences per 100 words - 15.8, are grades of American
    schools; `lix` = words / sentences + 100 long words / words is for European languages, from 20
    (easy) to 60 (hard). Indices that count syllables would need a dictionary that textstat
    downloads, so there is none of them.
    Source: textstat; Smith and Senter 1967, Coleman and Liau 1975, Bjornsson 1968.

    Raises:
        ValueError: `low` is above `high`.
    """
    if low > high:
        raise ValueError(f"reward options: low {low} is above high {high}")
    measure = _measure(index)
    scores = []
    for completion in completions:
        text = text_of(completion)
        value = measure(text)
        beyond = max(low - value, value - high, 0.0)
        worded = any(character.isalnum() for character in text)
        scores.append(max(0.0, 1.0 - beyond / margin) if worded else 0.0)
    return scores


def _measure(index: str) -> Callable[[str], float]:
    import textstat

    of: dict[str, Callable[[str], float]] = {
        "ari": textstat.automated_readability_index,
        "coleman_liau": textstat.coleman_liau_index,
        "lix": textstat.lix,
    }
    return of[index]
