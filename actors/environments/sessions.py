"""Serves the sessions of agents over HTTP: an address and a key for each episode.

Invariant: a request is answered in the session of its address and key alone, and never after that
session has ended; a client that sends a request again, because the answer did not reach it, gets
the one answer, not another turn.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

from aiohttp import web

from actors.environments.base import EpisodeFailed
from actors.environments.chat_messages import normalised
from actors.environments.conversations import (
    Answer,
    Conversation,
    ConversationClosed,
    Refused,
)
from actors.environments.openai_api import (
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    Json,
    chat_answer,
    chat_chunks,
    completion_answer,
    error_body,
    generate_answer,
    models,
    parsed,
    sampled_ids,
)
from actors.environments.tokens import ChatTokens

BODY_BYTES = 64 * 2**20  # of one request at most
_RETRIES = "x-stainless-retry-count"  # OpenAI's clients count in it how often they have sent it
_LEAVE_SECONDS = 2.0  # of requests in flight when the server closes
_SERVED = (
    "a session has no such address: ask it for chat completions, as OpenAI's Agents SDK does after "
    "set_default_openai_api('chat_completions'), at the base_url that the agent was given"
)
_NO_RETRY = {"x-should-retry": "false"}  # what those clients heed

_Ask = Callable[[], Awaitable[Answer]]


@dataclass(eq=False)
class _Sent:
    """One turn, the connections that asked for it, and whether its answer reached the client."""

    turn: asyncio.Task[Answer]
    connections: list[asyncio.Transport | None] = field(default_factory=list)
    delivered: bool = False

    @property
    def lost(self) -> bool:
        """Whether its client has gone without the answer."""
        return not self.delivered and not any(map(_open, self.connections))


@dataclass(eq=False)
class Session:
    """One episode's address."""

    url: str  # ends with /v1
    key: str
    conversation: Conversation
    _sent: dict[tuple[str, bytes], list[_Sent]] = field(default_factory=dict)

    def sent(
        self, request: web.Request, body: bytes, ask: Callable[[], Awaitable[Answer]]
    ) -> _Sent:
        """The turn that `request` asks for: a new one, unless it is sent again, as it says or as an
        equal one's lost connection does."""
        earlier = self._sent.setdefault((request.path, hashlib.sha256(body).digest()), [])
        earlier[:] = [one for one in earlier if not one.turn.done() or not _failed(one.turn)]
        sent = next((one for one in earlier if one.lost), None)
        if sent is None and earlier and request.headers.get(_RETRIES, "0") not in ("", "0"):
            sent = next((one for one in earlier if not one.delivered), earlier[-1])
        if sent is None:
            sent = _Sent(asyncio.ensure_future(_turn(ask)))
            earlier.append(sent)
        sent.connections.append(request.transport)
        return sent

    def end(self) -> None:
        """Answer no more, and end what is being sampled."""
        self.conversation.close()
        for one in (one for several in self._sent.values() for one in several):
            one.turn.cancel()


async def _turn(ask: _Ask) -> Answer:
    return await ask()


def _failed(turn: asyncio.Task[Answer]) -> bool:
    return turn.cancelled() or turn.exception() is not None


class SessionServer:
    """Serves the sessions of one actor."""

    def __init__(self, tokens: ChatTokens, model: str, host: str, port: int | None) -> None:
        """`model`: the name that the policy goes by; `port`: None is any that is free."""
        self._tokens = tokens
        self._model = model
        self._host = host
        self._port = port
        self._sessions: dict[str, Session] = {}
        self._runner: web.AppRunner | None = None
        self._address = ""
        self._noted: set[tuple[str, ...]] = set()

    async def start(self) -> None:
        """Listen. Raises EpisodeFailed: the port is not to be had."""
        app = web.Application(client_max_size=BODY_BYTES, middlewares=[_refusals])
        app.router.add_get("/{session}/v1/models", self._models)
        app.router.add_post("/{session}/v1/chat/completions", self._chat)
        app.router.add_post("/{session}/v1/completions", self._completions)
        app.router.add_post("/{session}/inference/v1/generate", self._generate)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_LEAVE_SECONDS)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port or 0)
        try:
            await site.start()
        except OSError as error:
            await self.close()
            raise EpisodeFailed(_not_served(self._host, self._port, error)) from error
        port = self._runner.addresses[0][1]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)
        self._address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    @contextlib.contextmanager
    def session(self, conversation: Conversation) -> Iterator[Session]:
        """An address for the time of one episode."""
        name = secrets.token_hex(8)
        key = f"sk-{secrets.token_hex(16)}"
        session = Session(f"{self._address}/{name}/v1", key, conversation)
        self._sessions[name] = session
        try:
            yield session
        finally:
            del self._sessions[name]
            session.end()

    async def close(self) -> None:
        """End every session and listen no more."""
        for session in self._sessions.values():
            session.end()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _models(self, request: web.Request) -> web.StreamResponse:
        limits = self._session(request).conversation.limits
        return web.json_response(models(self._model, limits.max_tokens))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        body = await request.read()
        asked = parsed(ChatRequest, body)
        self._note(asked.drawn_otherwise())
        tools = asked.tools or []
        try:
            messages = normalised(asked.messages)
        except ValueError as error:
            raise Refused(str(error), "invalid_messages") from error
        sent = session.sent(
            request,
            body,
            lambda: session.conversation.chat(
                messages,
                tools,
                asked.max_completion_tokens or asked.max_tokens,
                asked.parallel_tool_calls is not False,
            ),
        )
        answer = await _answered(sent)
        texts = self._texts(answer) if asked.logprobs else []
        if not asked.stream:
            return _delivered(request, sent, chat_answer(answer, asked, texts, _now()))
        return await self._stream(request, sent, chat_chunks(answer, asked, texts, _now()))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        body = await request.read()
        asked = parsed(CompletionRequest, body)
        self._note(asked.drawn_otherwise())
        sent = session.sent(
            request,
            body,
            lambda: session.conversation.complete(asked.prompt, asked.max_tokens),
        )
        answer = await _answered(sent)
        texts = self._texts(answer) if asked.logprobs is not None else []
        text = self._tokens.text(sampled_ids(answer))
        return _delivered(request, sent, completion_answer(answer, asked, text, texts, _now()))

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        session = self._session(request)
        body = await request.read()
        asked = parsed(GenerateRequest, body)
        sampling = asked.sampling_params
        if others := {*(sampling.stop_token_ids or ())} - self._tokens.ends:
            raise Refused(
                f"sampling_params.stop_token_ids: token {min(others)} ends no turn of this run; "
                "leave it out, or name it in the run's model.stop_token_ids",
                "invalid_request",
            )
        self._note(sampling.drawn_otherwise())
        sent = session.sent(
            request,
            body,
            lambda: session.conversation.complete(asked.token_ids, sampling.max_tokens),
        )
        answer = await _answered(sent)
        return _delivered(request, sent, generate_answer(answer, asked, _now()))

    def _session(self, request: web.Request) -> Session:
        """The session whose address and key a request has. Raises _Unknown."""
        session = self._sessions.get(request.match_info["session"])
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if session is None or not hmac.compare_digest(given.encode(), session.key.encode()):
            raise _Unknown
        return session

    async def _stream(
        self, request: web.Request, sent: _Sent, chunks: Iterator[Json]
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        await response.prepare(request)
        for chunk in chunks:
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        sent.delivered = _connected(request)
        return response

    def _texts(self, answer: Answer) -> list[str]:
        return [self._tokens.text([token]) for token in sampled_ids(answer)]

    def _note(self, settings: tuple[str, ...]) -> None:
        """Say once that the run's own settings hold."""
        if settings and settings not in self._noted:
            self._noted.add(settings)
            logging.getLogger(__name__).warning(
                "the agent asks for a %s of its own; tokens are drawn as `rollout` says, which is "
                "what the policy is trained on",
                " and a ".join(settings),
            )


class _Unknown(Exception):
    """No session has this address and key."""


@web.middleware
async def _refusals(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """What a request is told that gets no turn."""
    try:
        return await handler(request)
    except (_Unknown, ConversationClosed):
        message = "no session has this key: it is wrong, or its episode has ended"
        return _refusal(401, message, "invalid_api_key")
    except Refused as error:
        return _refusal(400, error.message, error.code)
    except _NoAnswer as error:
        return _refusal(503, str(error), "policy_unavailable")
    except web.HTTPClientError as error:  # of aiohttp itself
        message, code = _not_asked_for(error)
        error.text = json.dumps(error_body(message, code))
        error.content_type = "application/json"
        error.headers.update(_NO_RETRY)
        raise


def _not_asked_for(error: web.HTTPClientError) -> tuple[str, str]:
    """What a client is told that asks for what a session does not serve, and the code."""
    if isinstance(error, web.HTTPNotFound):
        return _SERVED, "unknown_url"
    if isinstance(error, web.HTTPMethodNotAllowed):
        takes = " or ".join(sorted(error.allowed_methods))
        return f"this address takes {takes}, not {error.method}", "method_not_allowed"
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        most = f"{BODY_BYTES // 2**20} MiB"
        return f"a session reads {most} at most; send a smaller request", "request_too_large"
    return f"a session cannot read the request: {error.reason}", "invalid_request"


def _refusal(status: int, message: str, code: str) -> web.Response:
    return web.json_response(error_body(message, code), status=status, headers=_NO_RETRY)


class _NoAnswer(Exception):
    """The policy could not be asked."""


async def _answered(sent: _Sent) -> Answer:
    """The turn, whoever else waits for it. Raises as `Conversation.chat`, and _NoAnswer."""
    await asyncio.wait({sent.turn})
    if sent.turn.cancelled():
        raise ConversationClosed
    error = sent.turn.exception()
    if error is None or isinstance(error, Refused | ConversationClosed):
        return sent.turn.result()
    raise _NoAnswer(f"the policy could not be asked: {error}") from error


def _delivered(request: web.Request, sent: _Sent, body: Json) -> web.Response:
    sent.delivered = _connected(request)
    return web.json_response(body)


def _connected(request: web.Request) -> bool:
    return _open(request.transport)


def _open(connection: asyncio.Transport | None) -> bool:
    return connection is not None and not connection.is_closing()


def _now() -> int:
    return int(time.time())


def require_free(host: str, port: int) -> None:
    """Raise EpisodeFailed, with one line, where sessions could not be served at `port` of `host`
    on this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EpisodeFailed(_not_served(host, port, error)) from error


def _not_served(host: str, port: int | None, error: OSError) -> str:
    reason = (error.strerror or str(error)).lower()
    cure = (
        "set another one, or leave it out for any that is free"
        if port
        else "set another episodes.host"
    )
    return (
        f"episodes.port: the sessions of agents cannot be served at {host}:{port}: {reason}; {cure}"
    )
