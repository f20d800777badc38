"""What a process with the user's tools answers: a value, or why there is none.

Standard library only: a child imports this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.children.channel import DETAIL_CHARACTERS, Garbled, clean, line, parsed

UNTIMELY = "timeout"
RAISED = "raised"
LOST = "lost"


@dataclass(frozen=True)
class Told:
    """The answer to one call."""

    call: str
    value: Any = None  # of JSON
    error: str | None = None  # what went wrong; None: nothing
    timed_out: bool = False
    lost: bool = False  # by a fault of a process or machine, and not of the user's code


def told(call: str, value: Any) -> bytes:
    """The line that answers `call` with a value of JSON. Raises ValueError where it is none."""
    return line({"call": call, "value": value})


def refused(call: str, error: str, kind: str = RAISED) -> bytes:
    """The line that answers `call` with what went wrong."""
    return line({"call": call, "kind": kind, "error": error[-DETAIL_CHARACTERS:]})


def parse(answer: bytes) -> Told:
    """The answer in a line. Raises Garbled where it is none."""
    message = parsed(answer)
    match message:
        case {"call": str(call), "value": value} if len(message) == 2:
            return Told(call, value)
        case {
            "call": str(call),
            "kind": "raised" | "timeout" | "lost" as kind,
            "error": str(error),
        } if len(message) == 3:
            return Told(call, None, clean(error), kind == UNTIMELY, kind == LOST)
    raise Garbled(f"it is not an answer: {answer[:80]!r}")
