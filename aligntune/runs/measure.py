"""What the held-out figures of a run are made by: prompts, rewards and decoding may change where it
goes on, and figures before and after are then no scale.

Invariant: a row of figures says by what it was made. Rows of versions that did not say it were made
by what the first row says that does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

KEY = "measure"
"""Of a row of evals.jsonl, or of one of metrics.jsonl that has held-out figures."""

OPERATIONAL = {
    "name",
    "timeout_s",
    "workers",
    "try_first",
    "batch_size",
    "request_timeout_s",
    "retries",
    "concurrency",
    "token_env",
}
"""Keys of a reward that change no score."""

R = TypeVar("R", bound=Mapping[str, Any])


def measure(held_out: str, *settings: Any) -> str:
    """What changes with the held-out data, of which `held_out` is a digest, and with settings."""
    told = json.dumps([held_out, *settings], sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def scored_by(reward: Mapping[str, Any]) -> dict[str, Any]:
    """What of a reward's settings changes its scores: of the options too where these are the
    judge's. In those of another function a name may mean anything."""
    told = {key: value for key, value in reward.items() if key not in OPERATIONAL}
    if told.get("function") == "judge":
        options = told.pop("options", {})
        if changing := {key: options[key] for key in options if key not in OPERATIONAL}:
            told["options"] = changing
    return told


def comparable(rows: Sequence[R]) -> list[R]:
    """Those of the evaluations that were made by what the last one was made by."""
    known = [row[KEY] for row in rows if KEY in row]
    return [row for row in rows if row.get(KEY, known[0]) == known[-1]] if known else [*rows]


NOT_COMPARED = (
    "what held-out figures are made by has changed (prompts, rewards, or how completions are "
    "drawn): those of before are not compared with new ones"
)
