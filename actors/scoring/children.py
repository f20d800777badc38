"""The child processes of a criterion: who serves a call, its deadline, and what a death costs.

Invariant: a call gets what the function said of it, or `RewardFailed`; its time limit runs from
when its child begins it, and no call fails by what another one did to a child that both were in.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.messages import Messages, Prompt
from actors.scoring.channel import ANSWER_BYTES, Answer, Garbled, parse, request
from actors.scoring.child import CONCURRENT
from actors.scoring.criteria import RewardCriterion, RewardFailed, RewardFailure

IMPORT_SECONDS = 300.0  # a new child's time to import the function, not counted against calls
GROW_SECONDS = 0.25  # a call waits so long for a child before another one is started
EXIT_SECONDS = 2.0  # between a closed channel and the exit status that explains it
CANCEL_SECONDS = 2.0  # of an async function, to end a call that is over its limit
KILL_SECONDS = 10.0  # of a child's keeper, to end what the child has started
LEAST_WORKERS = 4  # a reward often waits for something else than the processor

# sys.path comes first, as it is what `actors` itself is found on.
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from actors.scoring.child import main; "
    "main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])"
)


class ChildEnded(RuntimeError):
    """A child is gone, or said what is no answer; `alone`: no other call was in it then."""

    def __init__(self, reason: RewardFailure, detail: str, alone: bool) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.alone = alone


@dataclass
class _Waiting:
    count: int  # numbers that answer it
    answer: asyncio.Future[Answer]


class Child:
    """One child process, with its keeper between."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        lifeline: int,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._lifeline: int | None = lifeline
        self._waiting: dict[str, _Waiting] = {}
        self.running = True  # it can be asked
        self._listener = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, criterion: RewardCriterion, log: str | None) -> Child:
        """A process that has imported nothing of the user's yet. Its output goes to file `log`."""
        here, there = socket.socketpair()
        ending, lifeline = os.pipe()
        path = list(dict.fromkeys((*criterion.search_path, *(entry or "." for entry in sys.path))))
        reader, writer = await asyncio.open_connection(sock=here, limit=ANSWER_BYTES)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-u",  # what the user prints is in the log when the child is killed
                "-c",
                _BOOTSTRAP,
                json.dumps(path),
                str(there.fileno()),
                str(ending),
                log or "",
                stdin=subprocess.DEVNULL,
                pass_fds=(there.fileno(), ending),
                start_new_session=True,
            )
        except BaseException:
            os.close(lifeline)
            writer.close()
            raise
        finally:
            there.close()
            os.close(ending)
        return cls(process, reader, writer, lifeline)

    def ask(self, count: int, *message: Any) -> tuple[str, asyncio.Future[Answer]]:
        """Send a message whose answer is `count` numbers; returns the call's word and its answer.

        The answer raises ChildEnded.
        """
        word = secrets.token_hex(16)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[word] = _Waiting(count, future)
        future.add_done_callback(lambda _: self._waiting.pop(word, None))
        self._writer.write(request((word, *message)))
        return word, future

    def cancel(self, word: str) -> None:
        """Ask the child to end a call of an async function."""
        self._writer.write(request((word, None)))

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                answer = parse(line)
                waiting = self._waiting.get(answer.call)
                if waiting is None:
                    raise Garbled(f"no call waits for it: {line[:80]!r}")
                if answer.scores is not None and len(answer.scores) != waiting.count:
                    raise Garbled(f"{len(answer.scores)} numbers for {waiting.count}")
                waiting.answer.set_result(answer)
            self.running = False
            reason, detail = RewardFailure.DIED, await self._exit_status()
        except ValueError as error:  # Garbled, or a line without an end
            reason, detail = (
                RewardFailure.GARBLED,
                f"something wrote to its channel what is no answer ({error})",
            )
        except OSError as error:
            reason, detail = RewardFailure.DIED, f"its channel is broken ({error})"
        finally:
            self.let_go()
        left = [w.answer for w in self._waiting.values() if not w.answer.done()]
        for answer_left in left:
            answer_left.set_exception(ChildEnded(reason, detail, alone=len(left) == 1))
            answer_left.exception()  # where its caller has left, nobody else asks

    async def _exit_status(self) -> str:
        """How the process ended, in words."""
        try:
            code = await asyncio.wait_for(asyncio.shield(self._process.wait()), EXIT_SECONDS)
        except TimeoutError:
            return "its process closed the channel"
        if code < 0:
            return f"its process was ended by signal {-code} ({signal.strsignal(-code)})"
        return f"its process ended with exit status {code}"

    def let_go(self) -> None:
        """Have the keeper end the child and all that it has started."""
        self.running = False
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
            self._writer.close()

    async def end(self) -> None:
        """`let_go`, and wait until nothing is left."""
        self.let_go()
        try:
            await asyncio.wait_for(asyncio.shield(self._process.wait()), KILL_SECONDS)
        except TimeoutError:  # the keeper is stopped, or what it kills does not end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.wait({self._listener})


class FunctionScorer:
    """A Python function in child processes of its own.

    Calls of an async function share one child and run on its loop together. Any other function has
    several children that serve one call at a time each: a call that finds none idle for a while has
    another one started, up to `workers`, and waits its turn beyond that. The time limit is that of
    the function: waiting for a child and importing the function are not counted.

    Calls that were in one child when it ended are made again, each in a child of its own.
    """

    def __init__(self, criterion: RewardCriterion, log: str | None = None) -> None:
        """`log`: a file for what the function prints; default: this process's standard output."""
        self.name = criterion.name
        self._criterion = criterion
        self._log = log
        self._children: set[Child] = set()
        self._idle: asyncio.LifoQueue[Child] = asyncio.LifoQueue()
        self._places = asyncio.Semaphore(criterion.workers or default_workers())
        self._starting = asyncio.Lock()
        self._shared: Child | None = None
        self._ending: set[asyncio.Future[None]] = set()  # calls whose callers have left
        self._concurrent: bool | None = None  # known when a child has imported the function

    async def start(self) -> None:
        """Start the first child and import the function there.

        Raises:
            RewardFailed: the import failed, did not end, or ended the process.
        """
        async with self._starting:
            if self._concurrent is None or (self._concurrent and not self._serving(self._shared)):
                child = await self._new_child()
                if self._concurrent:
                    self._shared = child
                else:
                    self._idle.put_nowait(child)

    async def score(self, prompt: Prompt, completions: Sequence[str]) -> list[float | None]:
        """One call of the function for one group. Raises `RewardFailed`, as `call`."""
        return await self.call(prompt.source, completions, prompt.columns)

    async def call(
        self, source: str | Messages, completions: Sequence[str], columns: Mapping[str, Any]
    ) -> list[float | None]:
        """One call of the function for completions of one prompt and its data columns.

        Raises:
            RewardFailed: whatever kept it from one finite number, or None, per completion.
        """
        message = (source, list(completions), dict(columns))
        await self.start()
        if self._concurrent:
            try:
                return await self._beside_others(message)
            except ChildEnded as ended:
                if ended.alone:
                    raise self._failed(ended) from ended
        return await self._alone(message)

    async def close(self) -> None:
        """End the children."""
        await asyncio.gather(*(child.end() for child in self._children))
        self._children.clear()

    async def _beside_others(self, message: tuple[Any, ...]) -> list[float | None]:
        """One call in the shared child. Raises ChildEnded."""
        child = self._shared
        assert child is not None, "start has made it"
        word, answer = child.ask(len(message[1]), *message)
        try:
            await asyncio.wait({answer}, timeout=self._criterion.timeout_s)
            if not answer.done():
                await self._end_call(child, word, answer)
                raise self._timeout()
            return self._values(answer.result())
        finally:
            if not answer.done():  # the caller has left
                ending = asyncio.ensure_future(self._end_call(child, word, answer))
                self._ending.add(ending)
                ending.add_done_callback(self._left)

    def _left(self, ending: asyncio.Future[None]) -> None:
        self._ending.discard(ending)
        if not ending.cancelled():
            ending.exception()  # there is nobody to tell

    async def _end_call(self, child: Child, word: str, answer: asyncio.Future[Answer]) -> None:
        """End one call of the shared child, or the child where that is not to be had.

        Raises ChildEnded: whichever of the calls in it holds it up, none goes on.
        """
        child.cancel(word)
        await asyncio.wait({answer}, timeout=CANCEL_SECONDS)
        if not answer.done():
            await child.end()
            ended = answer.exception()
            if isinstance(ended, ChildEnded) and ended.alone:
                raise self._timeout() from ended
        answer.result()

    async def _alone(self, message: tuple[Any, ...]) -> list[float | None]:
        """One call in a child that serves no other meanwhile."""
        async with self._places:
            child = await self._idle_child()
            usable = False
            try:
                _, answer = child.ask(len(message[1]), *message)
                await asyncio.wait({answer}, timeout=self._criterion.timeout_s)
                if not answer.done():
                    raise self._timeout()
                usable = True
                return self._values(answer.result())
            except ChildEnded as ended:
                raise self._failed(ended) from ended
            finally:
                if usable and child.running:
                    self._idle.put_nowait(child)
                else:
                    child.let_go()
                    await self._retire(child)

    async def _idle_child(self) -> Child:
        while True:
            try:
                async with asyncio.timeout(GROW_SECONDS if self._children else 0):
                    child = await self._idle.get()
            except TimeoutError:
                return await self._new_child()
            if child.running:
                return child
            await self._retire(child)

    async def _new_child(self) -> Child:
        child = await Child.start(self._criterion, self._log)
        self._children.add(child)
        ready = False
        try:
            _, answer = child.ask(1, self._criterion)
            await asyncio.wait({answer}, timeout=IMPORT_SECONDS)
            if not answer.done():
                raise RewardFailed(
                    self.name,
                    RewardFailure.TIMEOUT,
                    f"no answer within {IMPORT_SECONDS:g} s while importing the function",
                )
            self._concurrent = self._values(answer.result()) == [CONCURRENT]
            ready = True
        except ChildEnded as ended:
            raise self._failed(ended, "importing the function") from ended
        finally:
            if not ready:
                await self._retire(child)
        return child

    async def _retire(self, child: Child) -> None:
        self._children.discard(child)
        await child.end()

    def _serving(self, child: Child | None) -> bool:
        return child is not None and child.running

    def _values(self, answer: Answer) -> list[float | None]:
        if answer.failure is not None:
            raise RewardFailed(self.name, *answer.failure)
        assert answer.scores is not None
        return answer.scores

    def _failed(self, ended: ChildEnded, doing: str = "scoring a group") -> RewardFailed:
        return RewardFailed(self.name, ended.reason, f"{ended.detail} while {doing}")

    def _timeout(self) -> RewardFailed:
        return RewardFailed(
            self.name,
            RewardFailure.TIMEOUT,
            f"no answer within {self._criterion.timeout_s:g} s while scoring a group",
        )


def default_workers() -> int:
    """Children at most of a function that is not async: two a CPU, and not fewer than 4."""
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(LEAST_WORKERS, 2 * cpus)
