"""Rewards for nearness in meaning to the answers of a data column, by a local encoder."""

from __future__ import annotations

from typing import Any, Literal

from actors.scoring.said import Completion, text_of
from aligntune.rewards.encoder import encoder, similarity
from aligntune.rewards.inputs import column_of
from aligntune.rewards.overlap import answers_of


def embedding(
    completions: list[Completion], *, model: str, column: str = "answer", **columns: Any
) -> list[float]:
    """How near a completion's embedding is to that of the column's answer, the nearest of several.

    Range: 0 to 1; unrelated texts are about 0.5 and more, as the model has it.
    Formula: (1 + cosine) / 2 of mean-pooled last hidden states of `model`, an encoder such as
    sentence-transformers/all-MiniLM-L6-v2.
    Source: sentence embeddings (Reimers and Gurevych 2019, arXiv:1908.10084).

    Raises:
        ValueError: the model cannot be loaded, or a row has no answer.
    """
    return [
        max(similarity(model, text_of(completion), answer) for answer in answers_of(value, column))
        for completion, value in zip(completions, column_of(columns, column), strict=True)
    ]


def bertscore(
    completions: list[Completion],
    *,
    model: str,
    column: str = "answer",
    measure: Literal["f1", "precision", "recall"] = "f1",
    **columns: Any,
) -> list[float]:
    """BERTScore against the column's answer, the best of several.

    Range: -1 to 1, in practice 0 to 1 and high; 0 where either text has no tokens.
    Formula: recall is the mean over the answer's tokens of the greatest cosine to a token of the
    completion, precision the other way round, f1 their harmonic mean. States are those of the last
    layer of `model`, without special tokens, idf weights or rescaling by a baseline, so values are
    not those of the package bert-score.
    Source: Zhang et al. 2020, arXiv:1904.09675.

    Raises:
        ValueError: as `embedding`.
    """
    return [
        max(_bertscore(model, text_of(completion), a, measure) for a in answers_of(value, column))
        for completion, value in zip(completions, column_of(columns, column), strict=True)
    ]


def _bertscore(model: str, text: str, answer: str, measure: str) -> float:
    own, wanted = encoder(model).words(text), encoder(model).words(answer)
    if not len(own) or not len(wanted):
        return 0.0
    cosines = own @ wanted.T  # [T of the text, T of the answer]
    precision, recall = float(cosines.max(1).values.mean()), float(cosines.max(0).values.mean())
    total = precision + recall
    values = {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / total if total > 0 else 0.0,
    }
    return min(1.0, max(-1.0, values[measure]))
