"""One child process and its keeper, as their actor has them: asked, heard, and ended.

Invariant: a call that is asked gets its answer or `ChildEnded`, and when `end` returns nothing is
left of the child nor of what it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from actors.children.channel import ANSWER_BYTES, Garbled, request
from actors.room import no_room
from actors.sandbox import Held

EXIT_SECONDS = 2.0  # between a closed channel and the exit status that explains it
KILL_SECONDS = 10.0  # of a child's keeper, to end what the child has started


class Answered(Protocol):
    """An answer that names its call."""

    @property
    def call(self) -> str:
        """The call's word."""


A = TypeVar("A", bound=Answered)
T = TypeVar("T")


class ChildEnded(RuntimeError):
    """A child is gone, or (`garbled`) said what is no answer; `alone`: no other call was in it."""

    def __init__(self, garbled: bool, detail: str, alone: bool) -> None:
        super().__init__(detail)
        self.garbled = garbled
        self.detail = detail
        self.alone = alone


@dataclass
class _Waiting(Generic[A]):
    accept: Callable[[A], None]  # raises Garbled
    answer: asyncio.Future[A]


class Child(Generic[A]):
    """One child process, with its keeper between. Make one by `started`, or by a server of forks"""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        lifeline: socket.socket,
        parse: Callable[[bytes], A],
        process: asyncio.subprocess.Process | None = None,
    ) -> None:
        """`lifeline` is at its end when the keeper is; `parse` raises Garbled."""
        self._reader = reader
        self._writer = writer
        self._lifeline = lifeline
        self._parse = parse
        self._process = process
        self._waiting: dict[str, _Waiting[A]] = {}
        self.running = True  # it can be asked
        self._held = True
        self._status: int | None = None
        self._gone = asyncio.create_task(self._wait_for_keeper())
        self._listener = asyncio.create_task(self._listen())

    @property
    def idle(self) -> bool:
        """It can be asked, and has answered all that it was."""
        return self.running and not self._waiting

    def ask(
        self, *message: Any, accept: Callable[[A], None] = lambda _: None
    ) -> tuple[str, asyncio.Future[A]]:
        """Send a message; returns the call's word and its answer, which raises ChildEnded.

        An answer that `accept` raises Garbled for ends the child.
        """
        word = secrets.token_hex(16)
        return word, self.ask_as(word, *message, accept=accept)

    def ask_as(
        self, word: str, *message: Any, accept: Callable[[A], None] = lambda _: None
    ) -> asyncio.Future[A]:
        """`ask` under a word of the caller's."""
        future = self.expect(word, accept)
        self._writer.write(request((word, *message)))
        return future

    def expect(self, word: str, accept: Callable[[A], None] = lambda _: None) -> asyncio.Future[A]:
        """The answer to a call that another message brings."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        if not self.running:
            future.set_exception(ChildEnded(False, "its process has ended", alone=True))
            return future
        self._waiting[word] = _Waiting(accept, future)
        future.add_done_callback(lambda _: self._waiting.pop(word, None))
        return future

    def tell(self, *message: Any) -> None:
        """Send a message that has no answer of its own."""
        self._writer.write(request(message))

    async def _listen(self) -> None:
        garbled = False
        try:
            while line := await self._reader.readline():
                answer = self._parse(line)
                waiting = self._waiting.get(answer.call)
                if waiting is None:
                    raise Garbled(f"no call waits for it: {line[:80]!r}")
                if waiting.answer.cancelled():  # its caller has just left
                    continue
                if waiting.answer.done():
                    raise Garbled(f"its call is answered already: {line[:80]!r}")
                waiting.accept(answer)
                waiting.answer.set_result(answer)
            self.running = False
            detail = await self._exit_status()
        except ValueError as error:  # Garbled, or a line without an end
            garbled = True
            detail = f"something wrote to its channel what is no answer ({error})"
        except OSError as error:
            detail = f"its channel is broken ({error})"
        finally:
            self.let_go()
        left = [w.answer for w in self._waiting.values() if not w.answer.done()]
        for answer_left in left:
            answer_left.set_exception(ChildEnded(garbled, detail, alone=len(left) == 1))
            answer_left.exception()  # where its caller has left, nobody else asks

    async def _wait_for_keeper(self) -> None:
        loop = asyncio.get_running_loop()
        said = b""
        try:
            with contextlib.suppress(OSError):
                while data := await loop.sock_recv(self._lifeline, 64):
                    said += data
        finally:
            self._lifeline.close()
        self._status = int(said) if said.isdigit() else None
        if self._process is not None:
            await self._process.wait()

    async def _exit_status(self) -> str:
        """How the process ended, in words."""
        await asyncio.wait({self._gone}, timeout=EXIT_SECONDS)
        if not self._gone.done():
            return "its process closed the channel"
        if self._status is None:
            return "its keeper was ended"
        code = os.waitstatus_to_exitcode(self._status)
        if code < 0:
            return f"its process was ended by signal {-code} ({signal.strsignal(-code)})"
        return f"its process ended with exit status {code}"

    def leave(self) -> None:
        """Ask no more, and have the child end by itself; see `end`."""
        self.running = False
        if self._held:
            with contextlib.suppress(OSError):
                self._writer.write_eof()

    def let_go(self) -> None:
        """Have the keeper end the child and all that it has started."""
        self.running = False
        if self._held:
            self._held = False
            with contextlib.suppress(OSError):
                self._lifeline.shutdown(socket.SHUT_WR)
            self._writer.close()

    async def end(self, patience: float = 0.0) -> None:
        """`let_go`, after so many seconds in which it may end by itself, and wait until nothing is
        left."""
        if patience:
            await asyncio.wait({self._gone}, timeout=patience)
        self.let_go()
        await asyncio.wait({self._gone}, timeout=KILL_SECONDS)
        if not self._gone.done() and self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # the keeper is stopped, or waits long
                os.killpg(self._process.pid, signal.SIGKILL)
            await asyncio.wait({self._gone}, timeout=KILL_SECONDS)
        await asyncio.wait({self._listener})


async def started(
    module: str,
    parse: Callable[[bytes], A],
    search_path: Sequence[str],
    log: str | None,
    answer_bytes: int = ANSWER_BYTES,
    variables: Mapping[str, str] | None = None,
    held: Held | None = None,
) -> tuple[Child[A], socket.socket]:
    """A process that runs `main(channel, lifeline, log)` of `module`, and a copy of its channel.

    It has imported nothing of the user's yet. Its output goes to file `log`; `variables` are added
    to its environment, and `held` is the sandbox around it. The copy is for what a stream cannot
    send; close it.

    Raises OSError: this machine has no room for another process, thread or open file.
    """
    here, there = socket.socketpair()
    mine, lifeline = socket.socketpair()
    mine.setblocking(False)
    copy = here.dup()
    # sys.path comes first, as it is what `actors` itself is found on.
    bootstrap = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        f"from {module} import main; main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])"
    )
    path = import_path(search_path)
    reader, writer = await asyncio.open_connection(sock=here, limit=answer_bytes)
    try:
        held = held or Held()
        own = os.environ if held.environment is None else held.environment
        process = await asyncio.create_subprocess_exec(
            *held.before,
            sys.executable,
            "-u",  # what the user prints is in the log when the child is killed
            "-c",
            bootstrap,
            json.dumps(path),
            str(there.fileno()),
            str(lifeline.fileno()),
            log or "",
            stdin=subprocess.DEVNULL,
            pass_fds=(there.fileno(), lifeline.fileno()),
            start_new_session=True,
            env={**own, **(variables or {})},
        )
    except BaseException as error:
        mine.close()  # what has started nevertheless ends by that
        copy.close()
        writer.close()
        if no_room(error):
            raise OSError(str(error)) from error
        raise
    finally:
        there.close()
        lifeline.close()
    return Child(reader, writer, mine, parse, process), copy


async def in_thread(function: Callable[[], T]) -> T:
    """`asyncio.to_thread`. Raises OSError, too: this machine has no room for another thread."""
    try:
        return await asyncio.to_thread(function)
    except RuntimeError as error:
        if no_room(error):
            raise OSError(str(error)) from error
        raise


def import_path(search_path: Sequence[str]) -> list[str]:
    """Where such a process looks for what it imports."""
    return list(dict.fromkeys((*_here(search_path), *(entry or "." for entry in sys.path))))


def _here(search_path: Sequence[str]) -> list[str]:
    """The driver's search path on this node: what is relative, is so to this process's folder."""
    return [os.path.abspath(entry) if os.path.isdir(entry) else entry for entry in search_path]
