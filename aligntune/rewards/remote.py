"""A reward that a service over HTTP gives: asked with limits, its answer checked, never guessed.

Invariant: a number is a score only where the service has said it in the form that is asked for;
whatever else happens is a failure of the call.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp

from aligntune.rewards.inputs import Completion

ANSWER_BYTES = 16 * 2**20
FIRST_PAUSE_S = 0.25  # before the second try; twice as long before each further one
LONGEST_PAUSE_S = 30.0
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))  # what another try may mend

_PLACES: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Semaphore]]
_PLACES = WeakKeyDictionary()


class NoAnswer(RuntimeError):
    """The service gave no scores; the message says what it did."""


class _TryAgain(NoAnswer):
    def __init__(self, text: str, pause_s: float | None = None) -> None:
        super().__init__(text)
        self.pause_s = pause_s


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
    {"scores": [number or null, ...]}, one a completion; null abstains. `token_env` names the
    variable that holds a bearer token. At most `concurrency` requests of this process run at once.

    Raises:
        NoAnswer: no answer in time after all retries, a refusal, or an answer of another form.
    """
    body = _body({"prompts": prompts, "completions": completions, "columns": columns})
    headers = {"Content-Type": "application/json", **_authorised(token_env)}
    places = _PLACES.setdefault(asyncio.get_running_loop(), {})
    place = places.setdefault(url, asyncio.Semaphore(concurrency))
    timeout = aiohttp.ClientTimeout(total=request_timeout_s)
    for tried in range(retries + 1):
        try:
            async with place, aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
                return scores_of(await _answer(session, url, body), len(completions))
        except _TryAgain as error:
            if tried == retries:
                raise NoAnswer(f"{url}: {error}, in {tried + 1} tries") from error
            pause = error.pause_s or FIRST_PAUSE_S * 2**tried * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(pause, LONGEST_PAUSE_S))
        except NoAnswer as error:
            raise NoAnswer(f"{url}: {error}") from error
    raise AssertionError("the last try returns or raises")


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


async def _answer(session: aiohttp.ClientSession, url: str, body: bytes) -> bytes:
    """The body of a good answer. Raises _TryAgain or NoAnswer."""
    try:
        async with session.post(url, data=body, allow_redirects=False) as response:
            if response.status in _AGAIN:
                wait = response.headers.get("Retry-After", "")
                pause = float(wait) if wait.isascii() and wait.isdigit() else None
                raise _TryAgain(f"it answered {response.status}", pause)
            if response.status != 200:
                raise NoAnswer(f"it answered {response.status} {response.reason}")
            answer = b""
            async for piece in response.content.iter_any():
                answer += piece
                if len(answer) > ANSWER_BYTES:
                    raise NoAnswer(f"its answer has more than {ANSWER_BYTES} bytes")
            return answer
    except TimeoutError as error:
        raise _TryAgain("no answer in time") from error
    except (aiohttp.ClientError, OSError) as error:
        raise _TryAgain(" ".join(str(error).split()) or type(error).__name__) from error


def _body(message: dict[str, Any]) -> bytes:
    try:
        return json.dumps(message, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise NoAnswer(f"the group cannot be sent as JSON: {error}") from error


def _authorised(token_env: str | None) -> dict[str, str]:
    if token_env is None:
        return {}
    token = os.environ.get(token_env)
    if not token:
        raise NoAnswer(f"the variable {token_env} of option token_env is not set in this process")
    return {"Authorization": f"Bearer {token}"}
