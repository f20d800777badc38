"""What the shipped tables of GPUs and models have in common: their folder, and a name they lack."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

DATA = Path(__file__).parent / "data"


class UnknownName(ValueError):
    """A GPU or model that no table has; the message names the nearest. Or GPUs of which nothing can
    be learnt, since nvidia-smi does not answer; the message names the cure."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """'did you mean X?' for a name close to a valid one, else all valid ones (of many: a few)."""
    folded = {known.lower(): known for known in sorted(valid)}
    if starts := [known for known in folded if name and known.startswith(name.lower())]:
        return f"did you mean {folded[starts[0]]!r}?"
    close = difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.0)
    if close and difflib.SequenceMatcher(None, name.lower(), close[0]).ratio() >= 0.6:
        return f"did you mean {folded[close[0]]!r}?"
    if len(folded) > 20:
        return f"the nearest are {', '.join(folded[one] for one in close)}"
    return f"known are {', '.join(folded.values())}"
