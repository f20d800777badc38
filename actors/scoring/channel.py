"""What a reward function's child answers: numbers, or why there are none.

Standard library only: a child imports this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from actors.children.channel import DETAIL_CHARACTERS, Garbled, clean, line, parsed
from actors.scoring.criteria import RewardFailure


@dataclass(frozen=True)
class Answer:
    """What a child says of one call: numbers, or why there are none."""

    call: str
    scores: list[float | None] | None = None  # [G]; None where the function abstains
    failure: tuple[RewardFailure, str] | None = None  # and what it ends with, for a person


def scored(call: str, scores: Sequence[float | None]) -> bytes:
    """The line that answers `call` with numbers."""
    return line({"call": call, "scores": list(scores)})


def failed(call: str, reason: RewardFailure, detail: str) -> bytes:
    """The line that answers `call` with the reason why there are none."""
    return line({"call": call, "failure": reason.value, "detail": detail[-DETAIL_CHARACTERS:]})


def parse(answer: bytes) -> Answer:
    """The answer in a line. Raises Garbled where it is none."""
    message = parsed(answer)
    match message:
        case {"call": str(call), "scores": list(scores)} if len(message) == 2:
            if all(map(_is_score, scores)):
                return Answer(call, scores=scores)
        case {"call": str(call), "failure": str(reason), "detail": str(detail)} if len(
            message
        ) == 3 and reason in set(RewardFailure):
            return Answer(call, failure=(RewardFailure(reason), clean(detail[-DETAIL_CHARACTERS:])))
    raise Garbled(f"it is not an answer: {answer[:80]!r}")


def _is_score(value: object) -> bool:
    return value is None or (type(value) is float and math.isfinite(value))
