"""How an agent is played in its process: a function of the user's, or a program.

Standard library only: a child imports this, and the user's code; an HTTP client where the agent
asks for one.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import subprocess
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from actors.room import no_room
from actors.scoring.calling import named_parameters

CLIENT_SECONDS = 3600.0  # longest wait of the HTTP client that an agent is given
TAIL_BYTES = 2**16  # of a program's output, where its last line is looked for
LAST_SECONDS = 1.0  # from a program's end to that of its output, which what it left may hold open

Given = Mapping[str, Any]  # data, base_url, api_key, host, seed
Wait = Callable[[Awaitable[Any]], Any]
Player = Callable[[Given, Wait], Any]


class ProgramLost(RuntimeError):
    """A signal has ended the program, or the machine had no room for it: a fault that is not its
    own."""


def player_of(agent: Any) -> Player:
    """What plays `agent`: a function, or the arguments of a program. Raises ValueError."""
    if isinstance(agent, tuple):
        return _Program(agent)
    if not callable(agent):
        raise ValueError(f"the agent is a {type(agent).__name__}, which cannot be called")
    return _Function(agent)


def played(player: Player, given: Given, wait: Wait) -> float | dict[str, float] | None:
    """What the agent says of its episode; `wait` ends an awaitable.

    Raises ValueError where it is no reward, ProgramLost, and what the agent raises.
    """
    for name in ("NO_PROXY", "no_proxy"):  # a proxy of the node's reaches no session
        os.environ[name] = f"{os.environ.get(name, '')},{given['host']}".strip(",")
    os.environ["OPENAI_BASE_URL"] = given["base_url"]
    os.environ["OPENAI_API_KEY"] = given["api_key"]
    os.environ["ALIGNTUNE_SEED"] = str(given["seed"])
    return rewards(player(given, wait))


def rewards(value: Any) -> float | dict[str, float] | None:
    """A finite number, numbers by the ids of answers, or None. Raises ValueError for all else."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(name): _number(it, f"its reward of {name!r}") for name, it in value.items()}
    return _number(value, "what it returned")


def _number(value: Any, what: str) -> float:
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise ValueError(
            f"{what} is a {type(value).__name__}; an agent returns a number, numbers by the ids of "
            "the answers that it got, or None"
        )
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}, which is no reward")
    return number


class _Function:
    """`run(data, *, base_url, api_key, http_client)`, async or not; it gets what it names."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        named, takes_all = named_parameters(function)
        self._wanted = [n for n in ("base_url", "api_key", "seed") if takes_all or n in named]
        self._client = takes_all or "http_client" in named
        call = getattr(function, "__call__", None)  # noqa: B004 - an object may have an async one
        self._async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)

    def __call__(self, given: Given, wait: Wait) -> Any:
        options = {name: given[name] for name in self._wanted}
        if self._client and self._async:
            return wait(self._with_client(given["data"], options))
        with contextlib.ExitStack() as stack:
            if self._client:
                import httpx

                options["http_client"] = stack.enter_context(httpx.Client(timeout=CLIENT_SECONDS))
            value = self._function(given["data"], **options)
            return wait(value) if inspect.isawaitable(value) else value

    async def _with_client(self, data: Any, options: dict[str, Any]) -> Any:
        import httpx

        async with httpx.AsyncClient(timeout=CLIENT_SECONDS) as client:
            return await self._function(data, http_client=client, **options)


class _Program:
    """A program: the row as JSON on its standard input, the reward in its last line if at all."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command

    def __call__(self, given: Given, wait: Wait) -> Any:
        try:
            process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        except OSError as error:
            lost = ProgramLost if no_room(error) else ValueError
            raise lost(f"{self._command[0]!r} does not start: {error.strerror}") from error
        assert process.stdin is not None
        assert process.stdout is not None
        row = json.dumps(given["data"], default=str).encode()
        threading.Thread(target=_feed, args=(process.stdin, row), daemon=True).start()
        output = _Output(process.stdout)
        status = process.wait()
        output.join(LAST_SECONDS)
        if status < 0:
            raise ProgramLost(f"{self._command[0]!r} was ended by signal {-status}")
        if status:
            raise ValueError(f"{self._command[0]!r} ended with exit status {status}")
        return _last_line(output.tail)


class _Output(threading.Thread):
    """What a program prints: passed on as this process's own, and the end of it kept."""

    def __init__(self, stdout: Any) -> None:
        super().__init__(daemon=True)
        self._stdout = stdout
        self.tail = b""
        self.start()

    def run(self) -> None:
        """Until nobody holds it open any more."""
        while data := self._stdout.read(TAIL_BYTES):
            self.tail = (self.tail + data)[-TAIL_BYTES:]
            os.write(1, data)


def _feed(stdin: Any, row: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), stdin:
        stdin.write(row)


def _last_line(output: bytes) -> Any:
    """The reward of a last line such as {"reward": 1.0}; None where it says none."""
    lines = output.decode(errors="replace").split("\n")
    said = next((line for line in reversed(lines) if line.strip()), "")
    try:
        found = json.loads(said)
    except (ValueError, RecursionError):
        return None
    return found.get("reward") if isinstance(found, dict) else None
