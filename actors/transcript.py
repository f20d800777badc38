"""A prompt that the data have as text of Human and Assistant turns, in both its forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Transcript:
    """A reward model reads the form that it was trained on, whichever the policy sees."""

    spoken: list[dict[str, Any]]  # turn by turn, without the blanks around each
    written: str  # up to where a completion goes on
