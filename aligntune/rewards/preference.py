"""Rewards that compare a completion with the chosen and the rejected answer of its prompt. Pure.

Each is a similarity in 0..1 to the chosen answer, minus the same to the rejected one: above 0 where
a completion is nearer to what was preferred, 0 where it is like neither or like both alike, and in
-1..1 in all. They measure nearness of wording to two given answers and nothing else: not whether a
completion is true, safe, polite or short, and a good answer in other words than the chosen one's
scores about 0. What tells good answers apart in any words is a reward model trained on the pairs.

Thoughts are no part of an answer: what stands before the last `</think>` and after an open
`<think>` is left out, of a completion and of both answers. Nothing is near to an empty text.

The data are preference pairs, so the columns `chosen` and `rejected` hold what follows the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from actors.scoring.said import Completion, text_of, without_thoughts
from aligntune.rewards.encoder import similarity
from aligntune.rewards.inputs import column_of
from aligntune.rewards.ngrams import pieces


def preference(completions: list[Completion], **columns: Any) -> list[float]:
    """chrF(completion, chosen) - chrF(completion, rejected), each over 100, as sacrebleu has it.

    Range: -1 to 1.
    Formula: chrF is the F-score (beta 2: recall counts twice) of character n-grams of 1 to 6, white
    space left out. It grows with what a completion has of an answer, so a long completion loses
    less than a short one.
    Source: sacrebleu; Popovic 2015, "chrF".

    Raises:
        ValueError: there is no column `chosen` or `rejected`, or a row has no value in it.
    """
    from sacrebleu.metrics import CHRF

    chrf = CHRF()

    def nearness(text: str, answer: str) -> float:
        return float(chrf.sentence_score(text, [answer]).score) / 100

    return _difference(completions, columns, nearness)


def preference_overlap(completions: list[Completion], **columns: Any) -> list[float]:
    """The same with the F1 of words: the harmonic mean of the shares that are common to both.

    Range: -1 to 1.
    Formula: 2 common / (words of both), to the chosen answer minus to the rejected one. Words are
    runs of letters and digits, and single other characters; case does not count, order neither.
    Source: as reward `token_f1`, by other words.

    Raises:
        ValueError: as `preference`.
    """
    return _difference(completions, columns, _word_f1)


def preference_embedding(
    completions: list[Completion], *, model: str, **columns: Any
) -> list[float]:
    """The same with (1 + cosine) / 2 of embeddings: the mean of the last hidden states of `model`.

    Range: -1 to 1.
    Formula: that of reward `embedding` to the chosen answer minus the same to the rejected one. A
    text beyond the model's positions is read in windows, and none of it is left out.
    Source: as `embedding`.

    Args:
        model: a local folder or hub name of an encoder, such as
            sentence-transformers/all-MiniLM-L6-v2; it is loaded with the first call.

    Raises:
        ValueError: as `preference`, and where the model cannot be loaded.
    """
    return _difference(completions, columns, partial(similarity, model))


def _difference(
    completions: list[Completion], columns: Any, nearness: Callable[[str, str], float]
) -> list[float]:
    chosen, rejected = column_of(columns, "chosen"), column_of(columns, "rejected")

    def near(completion: Completion, answer: Completion) -> float:
        one, other = (without_thoughts(text_of(said)).strip() for said in (completion, answer))
        return nearness(one, other) if one and other else 0.0

    return [
        near(completion, better) - near(completion, worse)
        for completion, better, worse in zip(completions, chosen, rejected, strict=True)
    ]


def _word_f1(text: str, answer: str) -> float:
    words, wanted = (Counter(pieces(side, "words")) for side in (text, answer))
    common = (words & wanted).total()
    return 2 * common / (words.total() + wanted.total()) if common else 0.0
