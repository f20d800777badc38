"""The reward for the language of a text, by py3langid, whose model comes with it. Pure."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from actors.scoring.said import Completion, text_of


def language(
    completions: list[Completion],
    *,
    language: str,
    among: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """The probability that a completion is in `language`, an ISO 639 code such as en, de or zh.

    Range: 0 to 1; 0 for a text without a letter. A text of a few words is told badly: all of the
    138 languages have a share of it. `among` leaves those that may be meant, such as [en, de].
    Formula: naive Bayes over byte n-grams, made equal for lengths by a temperature of sqrt(bytes).
    Source: py3langid; Lui and Baldwin 2012, "langid.py".

    Raises:
        ValueError: a code that py3langid does not know, or `among` lacks `language`.
    """
    identifier = _identifier(tuple(among) if among is not None else None)
    if language not in identifier.labels:
        if among is not None and language not in among:
            raise ValueError(f"reward options: language {language!r} is not in among {among}")
        raise ValueError(
            f"reward option 'language' is {language!r}, which py3langid does not know; it knows "
            f"{', '.join(identifier.labels)}"
        )
    return [_probability(identifier, text_of(completion), language) for completion in completions]


def _probability(identifier: Any, text: str, language: str) -> float:
    if not any(character.isalpha() for character in text):
        return 0.0
    return min(1.0, float(dict(identifier.rank(text))[language]))


@lru_cache(maxsize=4)
def _identifier(among: tuple[str, ...] | None) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = sorted(set(among or ()) - set(identifier.labels))
    if unknown:
        raise ValueError(f"reward option 'among' has {unknown[0]!r}, which py3langid does not know")
    identifier.set_languages(among)
    return identifier
