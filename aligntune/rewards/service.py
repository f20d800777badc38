"""JSON posted to a service over HTTP, with limits and tries: `ask`.

Invariant: what comes back is what `read` makes of a good answer; whatever else happens is
`NoAnswer`, and never a value.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import random
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import aiohttp
import psutil
from yarl import URL

from actors.scoring.criteria import Unreached
from aligntune.errors import printable
from cluster import proxies

T = TypeVar("T")

ANSWER_BYTES = 16 * 2**20
REFUSAL_BYTES = 2048  # that are read of an answer that is no good one
REFUSAL_LENGTH = 200  # characters of it that are told
FIRST_PAUSE_S = 0.25  # before the second try; twice as long before each further one
LONGEST_PAUSE_S = 30.0
_AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))  # what another try may mend
_AWAY = frozenset((425, 429, 502, 503, 504))  # of these, what says nothing of what was asked

_PLACES: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Semaphore]]
_PLACES = WeakKeyDictionary()


class NoAnswer(RuntimeError):
    """The service gave no scores; the message says what it did."""


class Away(NoAnswer, Unreached):
    """No connection, or the service or what stands before it says that it is busy or down."""


class TryAgain(NoAnswer):
    """Another try may mend it, after `pause_s` where the service says so; `away` as in `Away`."""

    def __init__(self, text: str, pause_s: float | None = None, away: bool = False) -> None:
        super().__init__(text)
        self.pause_s = pause_s
        self.away = away


async def ask(
    url: str,
    message: Mapping[str, Any],
    read: Callable[[bytes], T],
    *,
    request_timeout_s: float,
    retries: int,
    concurrency: int,
    token_env: str | None,
) -> T:
    """What `read` makes of the answer to `message`, which is sent as JSON.

    `token_env` names the variable that holds a bearer token. At most `concurrency` requests of this
    process to this `url` run at once. `read` may raise NoAnswer, or TryAgain. The proxy that the
    environment names for the host is used, but for this machine itself.

    Raises:
        Away: no connection after all retries, or one of 425, 429, 502, 503, 504.
        NoAnswer: no answer in time after all retries, a refusal, or an answer of another form.
    """
    body, way = _body(message), _way_to(url)
    headers = {"Content-Type": "application/json", **_authorised(token_env)}
    places = _PLACES.setdefault(asyncio.get_running_loop(), {})
    place = places.setdefault(url, asyncio.Semaphore(concurrency))
    timeout = aiohttp.ClientTimeout(total=request_timeout_s, sock_connect=request_timeout_s / 2)
    for tried in range(retries + 1):
        try:
            async with place, aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
                return read(await _answer(session, url, body, way))
        except TryAgain as error:
            if tried == retries:
                kind = Away if error.away else NoAnswer
                raise kind(f"{url}: {error}, in {tried + 1} tries{way.said}") from error
            pause = error.pause_s or FIRST_PAUSE_S * 2**tried * random.uniform(0.5, 1.5)
            await asyncio.sleep(min(pause, LONGEST_PAUSE_S))
        except NoAnswer as error:
            raise NoAnswer(f"{url}: {error}{way.said}") from error
    raise AssertionError("the last try returns or raises")


async def _answer(session: aiohttp.ClientSession, url: str, body: bytes, way: _Way) -> bytes:
    """The body of a good answer. Raises TryAgain or NoAnswer."""
    try:
        async with session.post(
            url, data=body, allow_redirects=False, proxy=way.proxy, proxy_auth=way.login
        ) as response:
            if response.status in _AGAIN:
                wait = response.headers.get("Retry-After", "")
                pause = float(wait) if wait.isascii() and wait.isdigit() else None
                away = response.status in _AWAY
                said = await _why(response)
                raise TryAgain(f"it answered {response.status}{said}", pause, away)
            if response.status != 200:
                said = await _why(response)
                raise NoAnswer(f"it answered {response.status} {response.reason}{said}")
            answer = b""
            async for piece in response.content.iter_any():
                answer += piece
                if len(answer) > ANSWER_BYTES:
                    raise NoAnswer(f"its answer has more than {ANSWER_BYTES} bytes")
            return answer
    except aiohttp.ConnectionTimeoutError as error:
        raise TryAgain("no connection in time", away=True) from error
    except TimeoutError as error:
        raise TryAgain("no answer in time") from error
    except (aiohttp.ClientError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        away = isinstance(error, aiohttp.ClientConnectorError)
        # No wait mends a certificate.
        raise TryAgain(text, away=away and not isinstance(error, aiohttp.ClientSSLError)) from error


async def _why(response: aiohttp.ClientResponse) -> str:
    """What the service says of its refusal, behind a colon: the message of an error as OpenAI's
    servers write it, or the text as it is; empty where it says nothing."""
    said = b""
    while piece := await response.content.read(REFUSAL_BYTES - len(said)):
        said += piece
    try:
        told: Any = json.loads(said)
    except (ValueError, RecursionError):
        told = said.decode(errors="replace")
    for key in ("error", "message"):
        told = told.get(key, told) if isinstance(told, dict) else told
    text = told if isinstance(told, str) else said.decode(errors="replace")
    if token := response.request_info.headers.get("Authorization", "").removeprefix("Bearer "):
        text = text.replace(token, "[the token]")
    line = printable(" ".join(text.split()))[:REFUSAL_LENGTH]
    return f": {line}" if line else ""


@dataclass(frozen=True)
class _Way:
    """How a request gets to its service."""

    proxy: URL | None = None
    login: aiohttp.BasicAuth | None = None  # at the proxy
    said: str = ""  # of the proxy, behind what went wrong


def _way_to(url: str) -> _Way:
    """Through the proxy that the environment names, or past all. aiohttp's own `trust_env` would
    send logins of ~/.netrc too. Raises NoAnswer where that is no proxy for HTTP."""
    named = proxies.way_to(url)
    if named is None or _is_here(urlsplit(url).hostname or ""):
        return _Way()
    said = f"; {proxies.advice(url)}, in the environment that Ray was started with on this node"
    try:
        proxy = URL(named)
    except ValueError as error:
        raise NoAnswer(f"{url}: the proxy's address is no URL{said}") from error
    if proxy.scheme not in ("http", "https"):
        raise NoAnswer(f"{url}: a proxy that speaks {proxy.scheme} is not supported{said}")
    return _Way(proxy.with_user(None), aiohttp.BasicAuth.from_url(proxy), said)


def _is_here(host: str) -> bool:
    """Whether it is this machine's own, on which no proxy stands before anything: loopback, the
    unspecified address, or a name or an address of the node."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        own = socket.gethostname().lower()
        short = own.partition(".")[0]
        if host in (own, short, "localhost") or host.endswith(".localhost"):
            return True
        # The whole name may cost a look-up, so it is asked for only where it may be this one.
        return host.partition(".")[0] == short and host == socket.getfqdn().lower()
    if address.is_loopback or address.is_unspecified:
        return True
    cards = psutil.net_if_addrs().values()
    return host in {one.address.partition("%")[0] for card in cards for one in card}


def _body(message: Mapping[str, Any]) -> bytes:
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
