"""A reward that a service over HTTP gives: asked with limits, its answer checked, never guessed.

Invariant: a number is a score only where the service has said it in the form that is asked for;
whatever else happens is a failure of the call.
"""

from __future__ import annotations

import json
import math
from typing import Any

from actors.scoring.said import Completion
from aligntune.plain import plain
from aligntune.rewards.service import NoAnswer, ask


async def remote_scores(
    prompts: list[Any],
    completions: list[Completion],
    *,
    url: str,
    request_timeout_s: float = 30.0,
    retries: int = 3,
    concurrency: int = 16,
    token_env: str | None = None,
    **columns: Any,
) -> list[float | None]:
    """The scores that the service at `url` gives to a group.

    It is sent {"prompts": [...], "completions": [...], "columns": {...}} and answers
    {"scores": [number or null, ...]}, one a completion; null abstains. What JSON has no word for in
    a prompt or column is sent as text, NaN and infinity as null. `token_env` names the
    variable that holds a bearer token. At most `concurrency` requests of this process run at once.

    Raises:
        NoAnswer: no answer in time after all retries, a refusal, or an answer of another form.
    """
    return await ask(
        url,
        {"prompts": plain(prompts), "completions": completions, "columns": plain(columns)},
        lambda answer: scores_of(answer, len(completions)),
        request_timeout_s=request_timeout_s,
        retries=retries,
        concurrency=concurrency,
        token_env=token_env,
    )


def scores_of(answer: bytes, count: int) -> list[float | None]:
    """The scores in a service's answer. Raises NoAnswer where it has another form."""
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise NoAnswer(f"it answered what is no JSON: {answer[:80]!r}") from error
    scores = said.get("scores") if isinstance(said, dict) else None
    if not isinstance(scores, list):
        raise NoAnswer(f'it answered no object with "scores": {answer[:80]!r}')
    if len(scores) != count:
        raise NoAnswer(f"it answered {len(scores)} scores for {count} completions")
    return [_score(value, index) for index, value in enumerate(scores)]


def _score(value: Any, index: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise NoAnswer(f"its score {index} is no number: {str(value)[:40]!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise NoAnswer(f"its score {index} is not finite")
    return number
