"""A process that holds one environment, or serves tools: begin, call, score, answer.

Invariant: every call is answered once, by this process and none that the user's code has forked.
The user's code runs in the main thread, without a running event loop unless it is async. Standard
library only: a child imports this and the user's code. Its actor and its keeper see to its end.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from actors.children.channel import clean, opened, receive
from actors.children.code import traceback_tail
from actors.environments.agent_child import Player, ProgramLost, played
from actors.environments.channel import LOST, UNTIMELY, refused, told
from actors.environments.tools import Tool, answer_text, by_name, description, methods
from actors.scoring.calling import arguments, checked, named_parameters
from actors.scoring.criteria import RewardFailed

CALL_TIMEOUT = "episodes.call_timeout_s"
ENVIRONMENT = "environment"  # the criterion of what an environment itself says
OBSERVATION_CHARACTERS = 2**20  # of what `reset` returns, which is never cut
REFUSED_CHARACTERS = 2**22  # a tool's answer of more is a failed call, and not cut


@dataclass(frozen=True)
class Loaded:
    """The user's code, imported."""

    tools: Mapping[str, Tool]
    environments: Mapping[str, Callable[[], Any]]
    rewards: Mapping[str, tuple[Callable[..., Any], float]]  # with the seconds of a call
    memory_bytes: int | None
    max_output_characters: int
    player: Player | None = None  # of an agent


class OverTime(BaseException):
    """A call is over its limit; says which, where it is one of several. No Exception: the user's
    code must not take it for one of its."""


def serve(channel: int, loaded: Loaded) -> None:
    """Answer what comes over socket `channel` until it is closed."""
    connection, stream = opened(channel)
    if loaded.memory_bytes is not None:
        limit = loaded.memory_bytes + _data_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    # One loop for the life of the process: clients that awaitables keep stay usable.
    with asyncio.Runner() as runner:
        child = _Child(connection, loaded, runner)
        while (message := receive(stream)) is not None:
            word, what, *rest = message
            getattr(child, what)(word, *rest)
        child.leave()


def _data_bytes() -> int:
    """The private memory that this process has to begin with."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError, ValueError):
        return 0


class _Child:
    """What a message asks for, by its name."""

    def __init__(self, connection: socket.socket, loaded: Loaded, runner: asyncio.Runner) -> None:
        self._connection = connection
        self._loaded = loaded
        self._runner = runner
        self._process = os.getpid()
        self._environment: Any = None
        self._tools = dict(loaded.tools)

    def ready(self, word: str) -> None:
        """Say that the process is there."""
        self._send(told(word, None))

    def describe(self, word: str) -> None:
        """All tools and environments, as data; each environment is made once for it."""

        def work() -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name in self._loaded.environments:
                environment = self._made(name)
                tools = by_name(self._loaded.tools.values(), methods(environment))
                found[name] = {
                    "kind": type(environment).__name__,
                    "tools": description(tools),
                    "reward": callable(getattr(environment, "get_reward", None)),
                }
            return {"tools": description(self._loaded.tools), "environments": found}

        self._answer(word, work, None, detailed=True)

    def begin(
        self, word: str, name: str, seed: int, row: dict[str, Any], limit: float | None
    ) -> None:
        """Make the environment and reset it for a row; the answer is its observation, if any."""

        def work() -> str | None:
            _seed(seed)
            self._environment = self._made(name)
            self._tools = by_name(self._loaded.tools.values(), methods(self._environment))
            reset = self._environment.reset
            accepted, takes_all = named_parameters(reset)
            given = row if takes_all else {k: v for k, v in row.items() if k in accepted}
            observation = self._awaited(reset(**given))
            if observation is None:
                return None
            text = clean(answer_text(observation))
            if len(text) > OBSERVATION_CHARACTERS:
                raise ValueError(f"reset returned {len(text)} characters, which is too much")
            return text

        self._answer(word, work, limit, detailed=True)

    def call(
        self, _: None, calls: Sequence[tuple[str, str, Any]], seed: int, limit: float | None
    ) -> None:
        """Call tools, each (word, name, arguments): async ones together, others in their order."""
        _seed(seed)
        together = []
        for word, name, given in calls:
            tool = self._tools[name]
            if inspect.iscoroutinefunction(tool):
                together.append((word, tool, given))
            else:
                self._answer(word, partial(self._called, tool, given), limit)
        if together:
            self._runner.run(self._together(together, limit))

    def play(self, word: str, given: dict[str, Any]) -> None:
        """Play an agent's episode; the answer is what it says of it."""

        def work() -> float | dict[str, float] | None:
            _seed(given["seed"])
            assert self._loaded.player is not None, "there is an agent"
            return played(self._loaded.player, given, self._awaited)

        self._answer(word, work, None, detailed=True)

    def score(
        self,
        word: str,
        prompt: list[dict[str, Any]],
        completion: list[dict[str, Any]],
        columns: dict[str, Any],
        limit: float | None,
    ) -> None:
        """What the environment says of its episode within `limit`, and what reward functions say
        that see it, each within its own."""

        def called(function: Callable[..., Any]) -> Any:
            given = arguments(
                function, prompt, [completion], columns, {"environments": [self._environment]}
            )
            return self._awaited(function(**given))

        def work() -> dict[str, float | None]:
            rewards = {}
            if callable(own := getattr(self._environment, "get_reward", None)):
                said = _named("get_reward", CALL_TIMEOUT, limit, lambda: self._awaited(own()))
                rewards[ENVIRONMENT] = checked(ENVIRONMENT, [said], 1)[0]
            for name, (function, seconds) in self._loaded.rewards.items():
                said = _named(
                    f"reward {name!r}", "its timeout_s", seconds, partial(called, function)
                )
                rewards[name] = checked(name, said, 1)[0]
            return rewards

        self._answer(word, work, None, detailed=True)

    def leave(self) -> None:
        """Let go of the environment: its `__del__` frees what it holds elsewhere, as in TRL."""
        self._tools, self._environment = {}, None
        gc.collect()

    async def _together(self, calls: Sequence[tuple[str, Tool, Any]], limit: float | None) -> None:
        async def one(word: str, tool: Tool, given: Any) -> None:
            scope = asyncio.timeout(limit)
            try:
                async with scope:
                    answer = told(word, self._text(await tool(**given)))
            except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:  # noqa: BLE001 - the user's code may raise anything; all of it is the answer
                answer = _over_time(word) if scope.expired() else _failure(word, error)
            self._send(answer)

        await asyncio.gather(*(one(*call) for call in calls))

    def _answer(
        self, word: str, work: Callable[[], Any], limit: float | None, detailed: bool = False
    ) -> None:
        try:
            answer = told(word, _within(limit, work))
        except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:  # noqa: BLE001 - as in `one`
            answer = _failure(word, error, detailed)
        except OverTime as over:
            answer = _over_time(word, *over.args)
        self._send(answer)

    def _send(self, answer: bytes) -> None:
        if os.getpid() != self._process:
            os._exit(0)  # a fork that came back from the user's code
        self._connection.sendall(answer)

    def _made(self, name: str) -> Any:
        try:
            return self._loaded.environments[name]()
        except (Exception, SystemExit) as error:
            of = f" {name!r}" if name else ""
            raise ValueError(f"environment{of} cannot be made: {traceback_tail(error)}") from error

    def _called(self, tool: Tool, given: Any) -> str:
        return self._text(tool(**given))

    def _text(self, result: Any) -> str:
        """What the model is told, cut where it is long."""
        text, most = answer_text(self._awaited(result)), self._loaded.max_output_characters
        if len(text) <= most:
            return text
        if len(text) > REFUSED_CHARACTERS:
            raise ValueError(f"the answer has {len(text)} characters, which is too much")
        return f"{text[:most]}\n[cut: the answer has {len(text)} characters]"

    def _awaited(self, value: Any) -> Any:
        return self._runner.run(_await(value)) if inspect.isawaitable(value) else value


def _failure(word: str, error: BaseException, detailed: bool = False) -> bytes:
    """Why a call has no answer: for the model, or `detailed` for a person."""
    if isinstance(error, RewardFailed):
        return refused(word, f"reward {error.criterion!r}: {error.detail}")
    if isinstance(error, ProgramLost):
        return refused(word, str(error), LOST)
    if detailed and not isinstance(error, ValueError):
        return refused(word, traceback_tail(error))
    told_to_model = isinstance(error, Exception) and str(error)
    return refused(word, told_to_model or f"the call ended with {type(error).__name__}")


def _over_time(word: str, which: str = "no answer in time") -> bytes:
    return refused(word, which, UNTIMELY)


async def _await(value: Any) -> Any:
    return await value


def _named(who: str, key: str, limit: float | None, work: Callable[[], Any]) -> Any:
    """Run `work` as `_within`; its OverTime says whose time was up, and by which setting."""
    try:
        return _within(limit, work)
    except OverTime:
        raise OverTime(f"{who} gave no answer within {limit:g} s ({key})") from None


def _within(limit: float | None, work: Callable[[], Any]) -> Any:
    """Run `work`, and raise OverTime in it when `limit` seconds have passed."""
    if limit is None:
        return work()

    def ring(*_: Any) -> None:
        raise OverTime

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _seed(seed: int) -> None:
    """Fix what the user's code draws, with the standard library and with what it has imported."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed % 2**63)
