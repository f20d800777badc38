"""What a process with the user's tools answers: a value, or why there is none.

Standard library only: a child imports this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.children.channel import DETAIL_CHARACTERS, Garbled, clean, line, parsed

UNTIMELY = "timeout"
RAISED = "raised"


@dataclass(frozen=True)
class Told:
    """The answer to one call."""

    call: str
    value: Any = None  # of JSON
    error: str | None = None  # what went wrong; None: nothing
    timed_out: bool = False


def told(call: str, value: Any) -> bytes:
    """The line that answers `call` with a value of JSON. Raises ValueError where it is none."""
    return line({"call": call, "value": value})


def refused(call: str, error: str, timed_out: bool = False) -> bytes:
    """The line that answers `call` with what went wrong."""
    kind = UNTIMELY if timed_out else RAISED
    return line({"call": call, "kind": kind, "error": error[-DETAIL_CHARACTERS:]})


def parse(answer: bytes) -> Told:
    """The answer in a line. Raises Garbled where it is none."""
    message = parsed(answer)
    match message:
        case {"call": str(call), "value": value} if len(message) == 2:
            return Told(call, value)
        case {"call": str(call), "kind": "raised" | "timeout" as kind, "error": str(error)} if (
            len(message) == 3
        ):
            return Told(call, error=clean(error), timed_out=kind == UNTIMELY)
    raise Garbled(f"it is not an answer: {answer[:80]!r}")
