"""Rewards for how much a completion has in common with the answers of a data column. Pure.

The column holds one text, or a list of texts of which the best counts. Those rewards measure
wording and nothing else: a right answer in other words scores low.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from actors.scoring.said import Completion, text_of
from aligntune.rewards.inputs import column_of

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LATIN = re.compile(r"[a-z0-9]", re.IGNORECASE)


def bleu(
    completions: list[Completion],
    *,
    column: str = "answer",
    tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a",
    **columns: Any,
) -> list[float]:
    """Sentence BLEU over 100 against the answers of a column, all of them as references.

    Range: 0 to 1; 0 for an empty text.
    Formula: the geometric mean of the precisions of 1- to 4-grams, as many as the text has, with
    exponential smoothing, times the brevity penalty.
    Source: sacrebleu (Post 2018, arXiv:1804.08771), `sentence_bleu` with `effective_order`.

    Raises:
        ValueError: there is no such column, or a row has no answer in it.
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(effective_order=True, tokenize=tokenize)
    return [
        min(1.0, float(metric.sentence_score(text, answers).score) / 100)
        for text, answers in _pairs(completions, column, columns)
    ]


def chrf(
    completions: list[Completion],
    *,
    column: str = "answer",
    word_order: Annotated[int, Field(ge=0)] = 0,
    **columns: Any,
) -> list[float]:
    """chrF over 100 against the answers of a column; with `word_order` 2 it is chrF++.

    Range: 0 to 1.
    Formula: the F-score (beta 2: recall counts twice) of character n-grams of 1 to 6, white space
    left out. It works in every language.
    Source: sacrebleu; Popovic 2015, "chrF".

    Raises:
        ValueError: as `bleu`.
    """
    from sacrebleu.metrics import CHRF

    metric = CHRF(word_order=word_order)
    return [
        min(1.0, float(metric.sentence_score(text, answers).score) / 100)
        for text, answers in _pairs(completions, column, columns)
    ]


def rouge(
    completions: list[Completion],
    *,
    column: str = "answer",
    kind: Literal["rouge1", "rouge2", "rougeL"] = "rougeL",
    measure: Literal["fmeasure", "precision", "recall"] = "fmeasure",
    stemmer: bool = False,
    **columns: Any,
) -> list[float]:
    """ROUGE against the answers of a column: shared words, pairs of words, or the longest order.

    Range: 0 to 1.
    Formula: the F1, precision or recall of unigrams (`rouge1`), bigrams (`rouge2`) or of the
    longest common subsequence (`rougeL`). Words are runs of a-z and 0-9 in lower case, nothing
    else: an answer without one is refused, for its score would be 0 whatever was said; use `chrf`.
    Source: rouge-score; Lin 2004, "ROUGE".

    Raises:
        ValueError: as `bleu`, or an answer without Latin letters and digits.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], use_stemmer=stemmer)
    scores = []
    for text, answers in _pairs(completions, column, columns):
        if not all(map(_LATIN.search, answers)):
            raise ValueError(
                f"a row of the data has no letter of a-z and no digit in column {column!r}, and "
                "ROUGE sees nothing else; use the reward 'chrf'"
            )
        best = max(getattr(scorer.score(answer, text)[kind], measure) for answer in answers)
        scores.append(float(best))
    return scores


def token_f1(
    completions: list[Completion], *, column: str = "answer", **columns: Any
) -> list[float]:
    """The F1 of words against the answers of a column, as questions of SQuAD are scored.

    Range: 0 to 1.
    Formula: 2 common / (words of the text + words of the answer), in lower case, without
    punctuation and the articles a, an, the. Where either has no word left: 1 if both have none.
    Source: the evaluation script of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).

    Raises:
        ValueError: as `bleu`.
    """
    return [
        max(_f1(_words(text), _words(answer)) for answer in answers)
        for text, answers in _pairs(completions, column, columns)
    ]


def _f1(words: Counter[str], wanted: Counter[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    return 2 * (words & wanted).total() / (words.total() + wanted.total())


def _words(text: str) -> Counter[str]:
    bare = text.lower().translate(_PUNCTUATION)
    return Counter(_ARTICLES.sub(" ", bare).split())


def _pairs(
    completions: list[Completion], column: str, columns: Mapping[str, Any]
) -> list[tuple[str, list[str]]]:
    """Each completion's text with its answers."""
    return [
        (text_of(completion), answers_of(value, column))
        for completion, value in zip(completions, column_of(columns, column), strict=True)
    ]


def answers_of(value: Any, column: str) -> list[str]:
    """One answer or several, as texts. Raises ValueError where there is none, or an empty one."""
    several = value if isinstance(value, list | tuple) else [value]
    if several and isinstance(several[0], Mapping):  # one answer, as messages
        several = [text_of(list(several))]
    answers = [str(answer) for answer in several]
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError(f"a row of the data has no answer, or an empty one, in column {column!r}")
    return answers
