"""Rewards that compare a completion with the chosen and the rejected answer of its prompt. Pure.

Each is a similarity in 0..1 to the chosen answer, minus the same to the rejected one: above 0 where
a completion is nearer to what was preferred, 0 where it is like neither or like both alike, and in
-1..1 in all. They measure nearness of wording to two given answers and nothing else: not whether a
completion is true, safe, polite or short, and a good answer in other words than the chosen one's
scores about 0. What tells good answers apart in any words is a reward model trained on the pairs.

The data are preference pairs, so the columns `chosen` and `rejected` hold what follows the prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from aligntune.rewards.inputs import Completion, column_of, text_of

WORD = re.compile(r"\w+|[^\w\s]")
SPARE = 2  # positions that some encoders keep for padding
CACHED = 64  # answers whose embedding is kept; those of one group come one after the other


def preference(completions: list[Completion], **columns: Any) -> list[float]:
    """chrF(completion, chosen) - chrF(completion, rejected), each over 100, as sacrebleu has it.

    chrF is the F-score (beta 2: recall counts twice) of character n-grams of 1 to 6, white space
    left out. It grows with what a completion has of an answer, so a long completion loses less
    than a short one.

    Raises:
        ValueError: there is no column `chosen` or `rejected`, or a row has no value in it.
    """
    from sacrebleu.metrics import CHRF

    chrf = CHRF()

    def similarity(text: str, answer: str) -> float:
        return float(chrf.sentence_score(text, [answer]).score) / 100

    return _difference(completions, columns, similarity)


def preference_overlap(completions: list[Completion], **columns: Any) -> list[float]:
    """The same with the F1 of words: the harmonic mean of the shares that are common to both.

    Words are runs of letters and digits, and single other characters; case does not count, order
    neither.

    Raises:
        ValueError: as `preference`.
    """
    return _difference(completions, columns, _word_f1)


def preference_embedding(
    completions: list[Completion], *, model: str, **columns: Any
) -> list[float]:
    """The same with (1 + cosine) / 2 of embeddings: the mean of the last hidden states of `model`.

    A text beyond the model's positions is read in windows, and none of it is left out.

    Args:
        model: a local folder or hub name of an encoder, such as
            sentence-transformers/all-MiniLM-L6-v2; it is loaded with the first call.

    Raises:
        ValueError: as `preference`, and where the model cannot be loaded.
    """
    import torch

    embed = _embedder(model)

    def similarity(text: str, answer: str) -> float:
        cosine = torch.nn.functional.cosine_similarity(embed(text), embed(answer), dim=0)
        return (1 + float(cosine)) / 2

    return _difference(completions, columns, similarity)


def _difference(
    completions: list[Completion], columns: Any, similarity: Callable[[str, str], float]
) -> list[float]:
    chosen, rejected = column_of(columns, "chosen"), column_of(columns, "rejected")
    return [
        similarity(text_of(completion), text_of(better))
        - similarity(text_of(completion), text_of(worse))
        for completion, better, worse in zip(completions, chosen, rejected, strict=True)
    ]


def _word_f1(text: str, answer: str) -> float:
    words, wanted = (Counter(WORD.findall(side.casefold())) for side in (text, answer))
    common = (words & wanted).total()
    return 2 * common / (words.total() + wanted.total()) if common else 0.0


@lru_cache(maxsize=1)
def _embedder(name: str) -> Callable[[str], Any]:
    """A function from a text to its embedding [H], in float32 on the CPU. Raises ValueError."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"the embedding model {name!r} could not be loaded ({str(error).splitlines()[0]}); "
            "give option 'model' a local folder or the hub name of an encoder"
        ) from error
    window = int(getattr(model.config, "max_position_embeddings", 512)) - SPARE

    @lru_cache(maxsize=CACHED)
    def embed(text: str) -> Any:
        windows = tokenizer(
            [text], truncation=True, max_length=window, return_overflowing_tokens=True
        )["input_ids"]
        states = [torch.zeros(1, model.config.hidden_size)]  # where the text has no tokens
        with torch.no_grad():
            for ids in windows:
                if ids:
                    states.append(model(input_ids=torch.tensor([ids])).last_hidden_state[0])
        return torch.cat(states[1:] or states).mean(0)

    return embed
