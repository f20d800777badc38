"""Door A: episodes with tools and environments in our own processes, in TRL's contract.

One difference: an environment is made for one episode, in a process of its own, and is not reset
for the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from actors.children.code import in_file
from actors.environments.base import Episode, EpisodeFailed, EpisodeLimits, Sampler
from actors.environments.child import ENVIRONMENT
from actors.environments.play import Clock, Play, Toolbox
from actors.environments.processes import (
    IMPORT_SECONDS,
    EnvironmentProcess,
    Outcome,
    Server,
    ToolCall,
    ToolProcesses,
    answered,
)
from actors.environments.rendered import chat_tokens
from actors.environments.server import Setup
from actors.environments.specs import AgentCommand, Code, EpisodeCode
from actors.environments.tokens import ChatTokens
from actors.messages import Messages, Prompt
from actors.sandbox import Mode
from actors.specs import ModelSpec

EVERY_ROW = ""  # the name of an environment that is every row's


class _Clock(Clock):
    """One that can be stopped: then the episode's time is over."""

    stopped = False

    @property
    def call_limit(self) -> float:
        """See `Clock`."""
        return 0.0 if self.stopped else super().call_limit


class _Environment(EnvironmentProcess):
    """One whose loss in a call ends the episode's turns there, so that they are known."""

    clock: _Clock
    loss: EpisodeFailed | None = None

    async def call(self, calls: Sequence[ToolCall], seed: int, limit: float) -> list[Outcome]:
        """As of `EnvironmentProcess`, but what loses the process is the answer of the calls."""
        try:
            return await super().call(calls, seed, limit)
        except EpisodeFailed as failed:
            self.clock.stopped, self.loss = True, failed  # nothing is called after it
            return [Outcome(failed.reason, failed=True) for _ in calls]


class ToolEpisodes:
    """Runs episodes whose tools and environments are the user's code in child processes."""

    def __init__(
        self,
        code: EpisodeCode,
        limits: EpisodeLimits,
        model: ModelSpec,
        log: str | None,
        sandbox: Mode = "off",
    ) -> None:
        """`log`: a file for what the user's code prints; default: this process's output."""
        self._sandbox = sandbox
        self._code = code
        self._limits = limits
        self._model = model
        self._log = log
        self._starting = asyncio.Lock()
        self._tokens: ChatTokens | None = None
        self._server: Server | None = None
        self._functions: ToolProcesses | None = None
        self._boxes: dict[str | None, Toolbox] = {}
        self._scored: frozenset[str] = frozenset()  # environments with a reward of their own

    async def start(self) -> str:
        """Import the user's code, and settle how conversations become tokens. Returns what sandbox
        is in force.

        Raises:
            EpisodeFailed: the code or the model cannot be used; one line says why.
        """
        async with self._starting:
            if self._server is not None:
                return self._server.in_force
            try:
                setup, search_path = setup_of(self._code, self._limits, self._log)
                self._tokens = await asyncio.to_thread(chat_tokens, self._model)
            except ValueError as error:
                raise EpisodeFailed(str(error)) from error
            server = Server(setup, search_path, self._log, self._sandbox)
            try:
                self._take(await described(server))
            except BaseException:
                await server.close()
                raise
            self._server, self._functions = server, ToolProcesses(server)
            return server.in_force

    def _take(self, found: dict[str, Any]) -> None:
        functions = frozenset(tool["name"] for tool in found["tools"])
        self._boxes = {None: Toolbox.of(found["tools"], functions)}
        for name, environment in found["environments"].items():
            self._boxes[name] = Toolbox.of(environment["tools"], functions)
        self._scored = frozenset(n for n, e in found["environments"].items() if e["reward"])

    async def run(self, prompt: Prompt, rollout: int, seed: int, sample: Sampler) -> Episode:
        """One episode, as `Episodes.run` says. Raises EpisodeFailed."""
        await self.start()
        assert self._tokens is not None, "start has made it"
        assert self._server is not None, "start has made it"
        assert self._functions is not None, "start has made them"
        name = self._environment_of(prompt)
        server, functions = self._server, self._functions
        place = await server.place()
        if place:
            functions = functions.of(place)
        environment: _Environment | None = None
        try:
            clock = _Clock(self._limits)
            messages = first_messages(prompt, self._code.system_prompt)
            if name is not None:
                with clock:
                    environment = await _Environment.start(
                        server, self._limits.call_timeout_s, place
                    )
                    environment.clock = clock
                    said = await environment.begin(name, seed, row_of(prompt, name))
                messages = with_observation(messages, said)
            play = Play(
                self._tokens, self._limits, self._boxes[name], functions, environment, clock
            )
            played = await play.run(messages, seed, sample)
            if environment is None:
                return played
            if environment.loss is not None:
                raise lost(environment.loss, played) from environment.loss
            return await self._scored_by(environment, played, prompt, clock)
        finally:
            if environment is not None:
                environment.end()
            if place:
                functions.close()
                server.clear(place)

    async def _scored_by(
        self, environment: EnvironmentProcess, played: Episode, prompt: Prompt, clock: Clock
    ) -> Episode:
        """The episode with what its environment, and rewards that see it, say. Raises
        EpisodeFailed."""
        if not (self._code.rewards or self._scored):
            return played
        asked = played.prompt_messages
        try:
            with clock:
                rewards = await environment.score(
                    played.messages[:asked],
                    played.messages[asked:],
                    prompt.columns,
                    self._code.reward_seconds,
                )
        except EpisodeFailed as failed:
            raise lost(failed, played) from failed
        if self._scored:
            rewards.setdefault(ENVIRONMENT, None)  # another environment's: it abstains here
        figures = replace(played.figures, tool_seconds=clock.seconds)
        return replace(played, rewards=rewards, figures=figures)

    async def close(self) -> None:
        """End every process."""
        async with self._starting:
            if self._functions is not None:
                self._functions.close()
            if self._server is not None:
                await self._server.close()
            self._server = self._functions = None

    def _environment_of(self, prompt: Prompt) -> str | None:
        """The name of the row's environment; None: there is none. Raises EpisodeFailed."""
        known = self._code.environments
        if not known:
            return None
        if EVERY_ROW in known:
            return EVERY_ROW
        name = prompt.columns.get(ENVIRONMENT)
        if name not in known:
            raise EpisodeFailed(
                f"row {prompt.row} has environment {name!r}; it must be one of "
                f"{', '.join(map(repr, known))}"
            )
        return str(name)


def lost(failed: EpisodeFailed, played: Episode) -> EpisodeFailed:
    """`failed` with the episode up to it, where it is no fault of the row or the user's code."""
    so_far = played.lost() if failed.infrastructure else None
    return EpisodeFailed(failed.reason, failed.infrastructure, so_far)


def first_messages(prompt: Prompt, system_prompt: str | None) -> Messages:
    """The conversation that a row begins with; an empty one where the environment brings it."""
    source = prompt.source or ""
    messages = [{"role": "user", "content": source}] if isinstance(source, str) else list(source)
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return messages


def with_observation(messages: Messages, observation: str | None) -> Messages:
    """`messages` with what `reset` returned after the last one's text, as in TRL."""
    if observation is None:
        return messages
    content = messages[-1].get("content") or ""
    told: Any = observation
    if isinstance(content, list):
        told = [{"type": "text", "text": observation}]
    return [*messages[:-1], {**messages[-1], "content": content + told}]


def row_of(prompt: Prompt, environment: str) -> dict[str, Any]:
    """What `reset` gets: the row's columns, without the one that has chosen the environment."""
    row = {"prompt": prompt.source} if prompt.source else {}
    row |= prompt.columns
    if environment != EVERY_ROW:
        row.pop(ENVIRONMENT, None)
    return row


async def described(server: Server) -> dict[str, Any]:
    """Tools and environments, as `actors.environments.child` describes them.

    Raises:
        EpisodeFailed: one of them cannot be used; one line says why.
    """
    place = await server.place()
    try:
        child = await server.fork(place)
        asked, doing = child.ask("describe")[1], "describing tools and environments"
        try:
            told = await answered(asked, IMPORT_SECONDS, doing)
        finally:
            server.retire(child)
    finally:
        server.clear(place)
    if told.error is not None:
        raise EpisodeFailed(told.error)
    found: dict[str, Any] = told.value
    return found


def check_tools(code: EpisodeCode, model: ModelSpec) -> list[str]:
    """Import and describe the tools and environments of `code`, in a process of their own, and
    settle the tokens of `model`. Returns what the user should know, a line each.

    Raises:
        ValueError: what cannot be used, in one line.
    """
    tokens = chat_tokens(model)
    if code.rewards and not code.environments:
        name = next(iter(code.rewards))
        raise ValueError(f"reward {name!r} asks for environments, and there is none")
    limits = EpisodeLimits(1, 1, 1, 1, 1.0, 1.0, 1)
    setup, search_path = setup_of(code, limits, None)

    async def describe() -> None:
        server = Server(setup, search_path, None)
        try:
            found = await described(server)
        except EpisodeFailed as failed:
            raise ValueError(failed.reason) from failed
        finally:
            await server.close()
        if not found["tools"] and not any(e["tools"] for e in found["environments"].values()):
            tokens.notes.append("there is no tool: every episode is one turn of the policy")

    with ThreadPoolExecutor(1) as thread:  # the caller may be in an event loop, as in a notebook
        thread.submit(asyncio.run, describe()).result()
    return tokens.notes


def setup_of(
    code: EpisodeCode, limits: EpisodeLimits, log: str | None
) -> tuple[Setup, tuple[str, ...]]:
    """What the server imports, and where it looks. Raises ValueError."""
    path = tuple(map(str, code.search_path))

    def found(what: str, target: Code) -> Code:
        nonlocal path
        if isinstance(target, bytes):
            return target
        file, _, name = target.rpartition(":")
        if not file.endswith(".py"):
            return target
        try:
            target, path = in_file(file, name, path)
        except ValueError as error:
            raise ValueError(f"{what} {error}") from error
        return target

    agent: Code | tuple[str, ...] | None = None
    if isinstance(code.agent, AgentCommand):
        agent = code.agent.command
    elif code.agent is not None:
        agent = found("agent", code.agent)
    setup = Setup(
        tools=[found("tool", target) for target in code.tools],
        environments={n: found("environment", t) for n, t in code.environments.items()},
        rewards={n: (found("reward", r.target), r.timeout_s) for n, r in code.rewards.items()},
        agent=agent,
        memory_bytes=None if limits.memory_gib is None else int(limits.memory_gib * 2**30),
        max_output_characters=limits.max_output_characters,
        log=log,
    )
    return setup, path
