"""The processes of the user's tools and environments, as their actor has them.

Invariant: a call of a tool ends as one `Outcome` within its limit, whatever the tool does; what it
started has ended when its process has. Every process here comes from one server, which has imported
the user's code, so that another one is a matter of milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import resource
import secrets
import shutil
import socket
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from actors.children.channel import clean
from actors.children.process import Child, ChildEnded, import_path, in_thread, started
from actors.environments import apart
from actors.environments.base import EpisodeFailed
from actors.environments.channel import Told, parse
from actors.environments.child import CALL_TIMEOUT, OBSERVATION_CHARACTERS
from actors.environments.server import Setup, fork_request
from actors.sandbox import Held, Mode, SandboxFailed, SandboxMissing, held, in_force
from actors.scratch import OwnedFolder

IMPORT_SECONDS = 300.0  # to import the user's code, or to make an environment for its description
FORK_SECONDS = 60.0  # until a fork answers, on a busy machine
GRACE_SECONDS = 2.0  # of an environment to end a call that is over its limit, before it is killed
LEAVE_SECONDS = 10.0  # of an environment to free what it holds, when its episode has ended
FORKS_AT_A_TIME = 32  # that have not answered yet
TOOL_PROCESSES = 512  # at most: calls of tools that are under way
_CHARACTER_BYTES = 12  # of a character in JSON at most
_SHARED = "; episodes share processes, ports and /tmp: it lets nobody inside make namespaces"


@dataclass(frozen=True)
class Outcome:
    """What came of a tool call."""

    text: str
    failed: bool = False  # `text` says why
    timed_out: bool = False  # then it has not failed, but been ended


@dataclass(frozen=True)
class ToolCall:
    """One call that the model makes; `arguments` as it wrote them."""

    name: str
    arguments: Any


class Server:
    """The process that has the user's code, and forks."""

    def __init__(
        self, setup: Setup, search_path: Sequence[str], log: str | None, sandbox: Mode = "off"
    ) -> None:
        self._setup = setup
        self._sandbox = sandbox
        self.in_force = "off"  # of a sandbox, for a person
        self._scratch: OwnedFolder | None = None  # the folder that a sandbox may write to
        self._search_path = search_path
        self._log = log
        self._child: Child[Told] | None = None
        self._control: socket.socket | None = None
        self._starting = asyncio.Lock()
        self._forks = asyncio.Semaphore(FORKS_AT_A_TIME)
        self._forked = 0  # forks that have answered
        self._places: dict[Child[Told], str] = {}  # the names of their folders
        self._ending: dict[asyncio.Task[None], str] = {}  # by the folder that each has
        self._answer_bytes = 2**16 + _CHARACTER_BYTES * max(
            setup.max_output_characters, OBSERVATION_CHARACTERS
        )

    async def start(self) -> None:
        """Import the user's code in a new process, unless one is there.

        Raises:
            EpisodeFailed: it cannot be imported, or no process could be started.
        """
        async with self._starting:
            if self._child is not None and self._child.running:
                return
            await self._stop()
            _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # two for each process
            try:
                around = await in_thread(self._held)
                self._child, self._control = await started(
                    "actors.environments.server",
                    parse,
                    self._search_path,
                    self._log,
                    variables={"PYTHONHASHSEED": "0"},  # sets are in one order in every run
                    held=around,
                )
            except OSError as error:
                raise _not_started(error) from error
            scratch = self._scratch.path if self._scratch is not None else None
            setup = replace(self._setup, scratch=scratch, wrapped=bool(around.before))
            try:
                asked, doing = self._child.ask(setup)[1], "importing tools and environments"
                told = await answered(asked, IMPORT_SECONDS, doing)
                if told.error is not None:
                    raise EpisodeFailed(told.error)
                if around.before and not told.value:
                    self.in_force += _SHARED
            except BaseException:  # cancelled too: what runs is taken for one that has imported
                await self._stop()
                raise

    def _held(self) -> Held:
        """The sandbox around it and its forks. Raises EpisodeFailed."""
        if self._sandbox == "off":
            return Held()
        self._scratch = self._scratch or OwnedFolder("aligntune-episodes-")
        imports = import_path(self._search_path)
        try:
            self.in_force = in_force(self._sandbox, "episodes.sandbox")
            return held(self._sandbox, "episodes.sandbox", self._scratch.path, imports, self._log)
        except SandboxMissing as missing:
            raise EpisodeFailed(str(missing)) from missing
        except SandboxFailed as failed:
            raise EpisodeFailed(str(failed), infrastructure=True) from failed

    async def place(self) -> str:
        """The name of a new folder for the processes of one episode, until `clear`; empty where
        there is no sandbox. Raises EpisodeFailed."""
        await self.start()
        if self._scratch is None:
            return ""
        scratch, name = self._scratch.path, secrets.token_hex(apart.NAME_BYTES // 2)
        try:
            await in_thread(lambda: apart.make(scratch, name))
        except OSError as error:
            raise EpisodeFailed(f"an episode has no folder: {error}", True) from error
        return name

    def clear(self, place: str) -> None:
        """Remove the folder of an episode, soon: when its processes, which were retired, have
        ended."""
        if place:
            before = [task for task, of in self._ending.items() if of == place]
            self._soon(self._remove(place, before))

    async def _remove(self, place: str, before: Sequence[asyncio.Task[None]]) -> None:
        if before:
            await asyncio.wait(before)
        if self._scratch is not None:
            folder = os.path.join(self._scratch.path, place)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def fork(self, place: str = "") -> Child[Told]:
        """A new process with the user's code, which answers, in the folder `place`.

        A server that has answered no fork for `FORK_SECONDS` hangs or is stopped: it is ended, and
        the next fork starts another one. Raises EpisodeFailed.
        """
        async with self._forks:
            for last in (False, True):
                await self.start()
                server, before = self._child, self._forked
                assert self._control is not None, "start has made it"
                try:
                    here, there = socket.socketpair()
                    mine, lifeline = socket.socketpair()
                except OSError as error:  # too many open files: that is not the server's fault
                    raise _not_started(error) from error
                mine.setblocking(False)
                try:
                    descriptors = [there.fileno(), lifeline.fileno()]
                    socket.send_fds(self._control, [fork_request(place)], descriptors)
                    break
                except OSError as error:
                    here.close()
                    mine.close()
                    if last:
                        raise _not_started(error) from error
                    await self._give_up(server)  # it has ended, which was not heard of yet
                finally:
                    there.close()
                    lifeline.close()
            reader, writer = await asyncio.open_connection(sock=here, limit=self._answer_bytes)
            child = Child(reader, writer, mine, parse)
            self._places[child] = place
            _, ready = child.ask("ready")
            try:
                await answered(ready, FORK_SECONDS, "starting")
            except BaseException as error:
                self.retire(child)
                silent = isinstance(error, EpisodeFailed) and not ready.done()
                if silent and self._forked == before:
                    await self._give_up(server)
                raise
            self._forked += 1
            return child

    def retire(self, child: Child[Told], leaving: bool = False) -> None:
        """End a fork and all that it has started, soon; `close` waits for it. `leaving`: it holds
        an environment, which goes first, unless a call is still under way."""
        leaving = leaving and child.idle
        if leaving:
            child.leave()
        else:
            child.let_go()
        self._soon(child.end(LEAVE_SECONDS if leaving else 0.0), self._places.pop(child))

    def _soon(self, work: Coroutine[Any, Any, None], place: str = "") -> None:
        """Have `work` done, which `close` waits for."""
        task = asyncio.create_task(work)
        self._ending[task] = place
        task.add_done_callback(self._ending.pop)

    async def close(self) -> None:
        """End the server and every fork: first those that end by themselves, since none outlives
        the server."""
        if self._ending:
            await asyncio.wait(self._ending)
        async with self._starting:
            await self._stop()
        if self._ending:  # of a call that came to its end meanwhile
            await asyncio.wait(self._ending)
        if self._scratch is not None:
            await asyncio.to_thread(self._scratch.remove)
            self._scratch = None

    async def _give_up(self, server: Child[Told] | None) -> None:
        """End `server` with all its forks, unless another one has taken its place."""
        async with self._starting:
            if self._child is server:
                await self._stop()

    async def _stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._child is not None:
            await self._child.end()
            self._child = None


class ToolProcesses:
    """Where tools that belong to no environment run: each call alone in a process, which serves
    the next call if this one ended well: in a sandbox, the next one of its episode."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._place = ""
        self._idle: list[Child[Told]] = []
        self._room = asyncio.Semaphore(TOOL_PROCESSES)

    def of(self, place: str) -> Self:
        """Those of the episode whose folder is `place`; the limit holds for all together."""
        own = type(self)(self._server)
        own._place, own._room = place, self._room
        return own

    async def call(self, call: ToolCall, seed: int, limit: float) -> Outcome:
        """One call. Waiting for a process is not counted. Raises EpisodeFailed: none could be had.

        Cancelling it ends the process.
        """
        async with self._room:
            child = await self._one()
            usable = False
            try:
                word = secrets.token_hex(16)
                answer = child.expect(word)
                child.tell(None, "call", [(word, call.name, call.arguments)], seed, None)
                await asyncio.wait({answer}, timeout=limit)
                if not answer.done():
                    return _ended(limit)
                usable = True
                return outcome(answer.result(), limit)
            except ChildEnded as ended:
                return Outcome(f"the tool ended its process: {ended.detail}", failed=True)
            finally:
                if usable and child.running:
                    self._idle.append(child)
                else:
                    self._server.retire(child)

    def close(self) -> None:
        """End the idle processes, soon."""
        while self._idle:
            self._server.retire(self._idle.pop())

    async def _one(self) -> Child[Told]:
        while self._idle:
            child = self._idle.pop()
            if child.running:
                return child
            self._server.retire(child)
        return await self._server.fork(self._place)


class EnvironmentProcess:
    """One environment, for one episode, in a process of its own."""

    def __init__(self, server: Server, child: Child[Told], limit: float) -> None:
        self._server = server
        self._child = child
        self._limit = limit

    @classmethod
    async def start(cls, server: Server, limit: float, place: str = "") -> Self:
        """A process for one environment, in the folder `place`; `limit` seconds for what it is
        asked, each time."""
        return cls(server, await server.fork(place), limit)

    async def begin(self, name: str, seed: int, row: dict[str, Any]) -> str | None:
        """Make environment `name` and reset it; returns its observation. Raises EpisodeFailed."""
        _, answer = self._child.ask("begin", name, seed, row, self._limit)
        return await self._value(answer, "reset")

    async def call(self, calls: Sequence[ToolCall], seed: int, limit: float) -> list[Outcome]:
        """Call methods: one, or several async ones, which run side by side.

        Raises:
            EpisodeFailed: the environment's process has ended, or has had to be.
        """
        words = [secrets.token_hex(16) for _ in calls]
        answers = [self._child.expect(word) for word in words]
        sent = [(w, c.name, c.arguments) for w, c in zip(words, calls, strict=True)]
        self._child.tell(None, "call", sent, seed, limit)
        doing = f"calling {calls[0].name}"
        told = await asyncio.gather(*(answered(a, limit + GRACE_SECONDS, doing) for a in answers))
        return [outcome(one, limit) for one in told]

    async def score(
        self,
        prompt: list[dict[str, Any]],
        completion: list[dict[str, Any]],
        row: dict[str, Any],
        reward_seconds: float,
    ) -> dict[str, float | None]:
        """What it says, and in `reward_seconds` more the functions that ask for it. Raises
        EpisodeFailed."""
        _, answer = self._child.ask("score", prompt, completion, row, self._limit)
        seconds = self._limit + reward_seconds
        told = await answered(answer, seconds + GRACE_SECONDS, "scoring the episode")
        if told.timed_out:
            raise EpisodeFailed(str(told.error), True)
        return self._said(told, "scoring the episode")

    def end(self) -> None:
        """Let the environment go, and end the process and all that it has started, soon."""
        self._server.retire(self._child, leaving=True)

    async def _value(self, answer: asyncio.Future[Told], doing: str) -> Any:
        told = await answered(answer, self._limit + GRACE_SECONDS, doing)
        if told.timed_out:
            raise EpisodeFailed(
                f"{doing} gave no answer within {self._limit:g} s ({CALL_TIMEOUT})", True
            )
        return self._said(told, doing)

    def _said(self, told: Told, doing: str) -> Any:
        if told.error is not None:
            raise EpisodeFailed(f"{doing} failed: {told.error}")
        return told.value


def _not_started(error: OSError) -> EpisodeFailed:
    return EpisodeFailed(f"no process could be started: {error}", infrastructure=True)


async def answered(answer: asyncio.Future[Told], seconds: float, doing: str) -> Told:
    """The answer, which must come in time.

    Raises:
        EpisodeFailed: a fault of infrastructure: the process has ended, or does not answer.
    """
    await asyncio.wait({answer}, timeout=seconds)
    if not answer.done():
        raise EpisodeFailed(f"{doing} gave no answer within {seconds:g} s", infrastructure=True)
    try:
        return answer.result()
    except ChildEnded as ended:
        raise EpisodeFailed(f"{ended.detail} while {doing}", infrastructure=True) from ended


def outcome(told: Told, limit: float) -> Outcome:
    """What a tool's answer means."""
    if told.timed_out:
        return _ended(limit)
    if told.error is not None:
        return Outcome(told.error, failed=True)
    if not isinstance(told.value, str):
        return Outcome("the tool's answer is garbled", failed=True)
    return Outcome(clean(told.value))


def _ended(limit: float) -> Outcome:
    return Outcome(f"no answer within {limit:g} s", timed_out=True)
