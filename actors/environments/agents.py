"""Door B: the agent is the user's program, and calls us.

Each episode is a process of the user's and a session that it speaks to. Invariant: the process and
everything that it started, the session and its requests end with the episode, whichever ends first.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from actors.children.process import Child
from actors.environments.agent_child import rewards
from actors.environments.base import Episode, EpisodeFailed, EpisodeLimits, Sampler
from actors.environments.channel import Told
from actors.environments.child import ENVIRONMENT
from actors.environments.conversations import Conversation
from actors.environments.processes import Server, answered
from actors.environments.rendered import chat_tokens
from actors.environments.sessions import Session, SessionServer, require_free
from actors.environments.specs import EpisodeCode
from actors.environments.tokens import ChatTokens
from actors.environments.tool_episodes import first_messages, lost, setup_of
from actors.messages import FinishReason, Prompt
from actors.specs import ModelSpec

EVERYWHERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::")
"""Addresses that each machine has."""

Value = float | dict[str, float] | None
"""What an agent says of its episode: its reward, those of its answers by their ids, or nothing."""


class AgentEpisodes:
    """Runs agents that speak to an OpenAI-compatible address."""

    def __init__(
        self,
        code: EpisodeCode,
        limits: EpisodeLimits,
        model: ModelSpec,
        log: str | None,
        host: str = "127.0.0.1",
        port: int | None = None,
    ) -> None:
        """`log`: a file for what agents print; `port`: None is any that is free."""
        self._code = code
        self._limits = limits
        self._model = model
        self._log = log
        self._host = host
        self._port = port
        self._starting = asyncio.Lock()
        self._tokens: ChatTokens | None = None
        self._processes: Server | None = None
        self._sessions: SessionServer | None = None

    async def start(self) -> str:
        """Import the agent and serve; no sandbox is around it. Raises EpisodeFailed, with one
        line."""
        async with self._starting:
            if self._sessions is not None:
                return "off"
            try:
                setup, search_path = setup_of(self._code, self._limits, self._log)
                self._tokens = await asyncio.to_thread(chat_tokens, self._model, tools=False)
            except ValueError as error:
                raise EpisodeFailed(str(error)) from error
            processes = Server(setup, search_path, self._log)
            sessions = SessionServer(self._tokens, self._model.name, self._host, self._port)
            try:
                await processes.start()
                await sessions.start()
            except BaseException:
                await processes.close()
                raise
            self._processes, self._sessions = processes, sessions
            return "off"

    async def run(self, prompt: Prompt, rollout: int, seed: int, sample: Sampler) -> Episode:
        """One episode, as `Episodes.run` says. Raises EpisodeFailed."""
        await self.start()
        assert self._tokens is not None, "start has made them"
        assert self._sessions is not None, "start has made it"
        conversation = Conversation(self._tokens, sample, self._limits)
        try:
            with self._sessions.session(conversation) as session:
                value, reason = await self._play(prompt, seed, session)
        except EpisodeFailed as failed:
            if not conversation.answers:
                raise
            raise lost(failed, _episode(conversation, FinishReason.ERROR)) from failed
        if not conversation.answers:
            raise EpisodeFailed("the agent ended without an answer of the model")
        episode = _episode(conversation, reason)
        if not isinstance(value, dict):
            return replace(episode, rewards={ENVIRONMENT: value})
        own = {answer.id: 0.0 for answer in conversation.answers}
        if unknown := set(value) - set(own):
            raise EpisodeFailed(
                f"the agent gives a reward to {min(unknown)!r}, which is the id of none of the "
                "answers that it got"
            )
        return replace(episode, turn_rewards=tuple((own | value).values()))

    async def close(self) -> None:
        """End every process and session."""
        async with self._starting:
            if self._sessions is not None:
                await self._sessions.close()
            if self._processes is not None:
                await self._processes.close()
            self._sessions = self._processes = None

    async def _play(
        self, prompt: Prompt, seed: int, session: Session
    ) -> tuple[Value, FinishReason]:
        """What the agent said at its end, and why the episode ended. Raises EpisodeFailed."""
        assert self._processes is not None, "start has made it"
        conversation = session.conversation
        child = await self._processes.fork()
        try:
            given = {
                "data": self._row(prompt),
                "base_url": session.url,
                "api_key": session.key,
                "host": urlsplit(session.url).hostname,
                "seed": seed,
            }
            _, told = child.ask("play", given)
            while (left := self._limits.episode_timeout_s - conversation.agent_seconds) > 0:
                either: set[asyncio.Future[Any]] = {told, conversation.broken}
                await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if conversation.broken.done():
                    conversation.broken.result()
                if told.done():
                    return await self._end(child, told, conversation), conversation.finish_reason
        finally:
            self._processes.retire(child)
        if not conversation.answers:
            raise EpisodeFailed(
                f"the agent had no answer of the model within {self._limits.episode_timeout_s:g} s "
                "(episodes.episode_timeout_s)"
            )
        return None, FinishReason.TIME

    def _row(self, prompt: Prompt) -> dict[str, Any]:
        """The agent's `data`: the row, with its prompt where it has one."""
        if self._code.system_prompt is not None:
            return {"prompt": first_messages(prompt, self._code.system_prompt)} | prompt.columns
        return ({"prompt": prompt.source} if prompt.source else {}) | prompt.columns

    async def _end(
        self, child: Child[Told], told: asyncio.Future[Told], conversation: Conversation
    ) -> Value:
        where = f"; its output is in {self._log}" if self._log else ""
        try:
            said = await answered(told, 0, "the agent played")
        except EpisodeFailed as failed:
            raise EpisodeFailed(failed.reason + where, infrastructure=True) from failed
        if said.error is None:
            try:
                return rewards(said.value)
            except ValueError as error:
                raise EpisodeFailed(f"the agent's answer is garbled: {error}", True) from error
        if conversation.refused and not said.lost:  # it has ended, as it may, by the refusal
            return None
        raise EpisodeFailed(f"the agent failed: {said.error}{where}", infrastructure=said.lost)


def _episode(conversation: Conversation, reason: FinishReason) -> Episode:
    """What was said, without what it is worth."""
    messages, before = conversation.messages()
    return Episode(
        calls=tuple(answer.call for answer in conversation.answers),
        finish_reason=reason,
        messages=messages,
        prompt_messages=before,
        figures=conversation.figures(),
    )


def check_agent(code: EpisodeCode, model: ModelSpec, host: str, port: int | None) -> list[str]:
    """Import the agent of `code` in a process of its own, settle the tokens of `model`, and see
    that sessions can be served. Returns what the user should know, a line each.

    Raises:
        ValueError: what cannot be used, in one line.
    """
    tokens = chat_tokens(model, tools=False)
    setup, search_path = setup_of(code, EpisodeLimits(1, 1, 1, 1, 1.0, 1.0, 1), None)

    async def load() -> None:
        server = Server(setup, search_path, None)
        try:
            await server.start()
        finally:
            await server.close()

    try:
        if port is not None and host in EVERYWHERE:  # another address may be a node's
            require_free(host, port)
        with ThreadPoolExecutor(1) as thread:  # the caller may be in an event loop
            thread.submit(asyncio.run, load()).result()
    except EpisodeFailed as failed:
        raise ValueError(failed.reason) from failed
    return tokens.notes
