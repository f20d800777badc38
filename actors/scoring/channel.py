"""The channel between an actor and its child process: what is asked, and what is answered.

Invariant: an answer is parsed, never unpickled, and names its call by a word that nobody can guess:
bytes that anything else writes to the channel are no answer. Requests are pickled, as the child
trusts its actor. Standard library only: a child imports this.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from actors.scoring.criteria import RewardFailure

ANSWER_BYTES = 4 * 2**20  # of one answer at most: room for a hundred thousand numbers
DETAIL_CHARACTERS = 4000
_LENGTH = struct.Struct("!Q")


class Garbled(ValueError):
    """What came over the channel is no answer to a call that waits."""


@dataclass(frozen=True)
class Answer:
    """What a child says of one call: numbers, or why there are none."""

    call: str
    scores: list[float | None] | None = None  # [G]; None where the function abstains
    failure: tuple[RewardFailure, str] | None = None  # and what it ends with, for a person


def request(message: Any) -> bytes:
    """`message` as it goes to a child: 8 bytes of length, then a pickle."""
    body = pickle.dumps(message)
    return _LENGTH.pack(len(body)) + body


HEADER_BYTES = _LENGTH.size


def request_length(header: bytes) -> int:
    """Bytes of the pickle that follows a header of `HEADER_BYTES` bytes."""
    return int(_LENGTH.unpack(header)[0])


def receive(channel: BinaryIO) -> Any | None:
    """The next message to this child, or None when the actor has closed the channel."""
    header = channel.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    body = channel.read(request_length(header))
    return pickle.loads(body) if len(body) == request_length(header) else None


def scored(call: str, scores: Sequence[float | None]) -> bytes:
    """The line that answers `call` with numbers."""
    return _line({"call": call, "scores": list(scores)})


def failed(call: str, reason: RewardFailure, detail: str) -> bytes:
    """The line that answers `call` with the reason why there are none."""
    return _line({"call": call, "failure": reason.value, "detail": detail[-DETAIL_CHARACTERS:]})


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\n"


def parse(line: bytes) -> Answer:
    """The answer in a line. Raises Garbled where it is none."""
    try:
        message = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Garbled(f"it is not JSON: {line[:80]!r}") from error
    match message:
        case {"call": str(call), "scores": list(scores)} if len(message) == 2:
            if all(map(_is_score, scores)):
                return Answer(call, scores=scores)
        case {"call": str(call), "failure": str(reason), "detail": str(detail)} if len(
            message
        ) == 3 and reason in set(RewardFailure):
            text = detail[-DETAIL_CHARACTERS:].encode("utf-8", "replace").decode("utf-8")
            return Answer(call, failure=(RewardFailure(reason), text))
    raise Garbled(f"it is not an answer: {line[:80]!r}")


def _is_score(value: Any) -> bool:
    return value is None or (type(value) is float and math.isfinite(value))


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")
