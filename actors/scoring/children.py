"""The child processes of a criterion: who serves a call, its deadline, and what a death costs.

Invariant: a call gets what the function said of it, or `RewardFailed`; its time limit runs from
when its child begins it, and no call fails by what another one did to a child that both were in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actors.children.channel import Garbled
from actors.children.process import Child, ChildEnded, started
from actors.scoring.channel import Answer, parse
from actors.scoring.child import CONCURRENT
from actors.scoring.criteria import RewardCriterion, RewardFailed, RewardFailure
from actors.scoring.said import with_thoughts
from actors.specs import MAX_CONCURRENT_GROUPS

if TYPE_CHECKING:  # torch: seconds, which trying a reward need not take
    from actors.messages import Conversations, Messages, Prompt

IMPORT_SECONDS = 300.0  # a new child's time to import the function, not counted against calls
GROW_SECONDS = 0.25  # a call waits so long for a child before another one is started
CANCEL_SECONDS = 2.0  # of an async function, to end a call that is over its limit

_CHILD = "actors.scoring.child"


class FunctionScorer:
    """A Python function in child processes of its own.

    Calls of an async function share one child and run on its loop together, up to `workers` where
    the criterion says so: others wait, and their time does not run. Any other function has several
    children that serve one call at a time each: a call that finds none idle for a while has
    another one started, up to `workers`, and waits its turn beyond that. The time limit is that of
    the function: waiting for a child and importing the function are not counted.

    Calls that were in one child when it ended are made again, each in a child of its own.
    """

    def __init__(
        self,
        criterion: RewardCriterion,
        log: str | None = None,
        max_concurrent_groups: int = MAX_CONCURRENT_GROUPS,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`log`: a file for what the function prints; default: this process's standard output.
        `max_concurrent_groups`: calls at once where the criterion does not say, as many as may
        come. `variables` are added to the children's environment."""
        self._variables = variables
        self.name = criterion.name
        self._criterion = criterion
        self._log = log
        self._children: set[Child[Answer]] = set()
        self._idle: asyncio.LifoQueue[Child[Answer]] = asyncio.LifoQueue()
        self._places = asyncio.Semaphore(criterion.workers or max_concurrent_groups)
        self._starting = asyncio.Lock()
        self._shared: Child[Answer] | None = None
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

    async def score(
        self, prompt: Prompt, completions: Sequence[str], conversations: Conversations | None = None
    ) -> list[float | None]:
        """One call of the function for one group; of what was said since the prompt as messages
        where there are conversations. Raises `RewardFailed`, as `call`."""
        said: Sequence[str | Messages] = completions
        if conversations is not None:
            said = conversations.answers
        return await self.call(prompt.source, said, prompt.columns, prompt.text)

    async def call(
        self,
        source: str | Messages,
        completions: Sequence[str | Messages],
        columns: Mapping[str, Any],
        rendered: str = "",
    ) -> list[float | None]:
        """One call of the function for completions of one prompt and its data columns.

        `rendered` is the prompt as the model saw it: a text gets the `<think>` that it ends with
        where the criterion reads thoughts.

        Raises:
            RewardFailed: whatever kept it from one finite number, or None, per completion.
        """
        if self._criterion.thoughts:
            completions = [
                with_thoughts(rendered, said) if isinstance(said, str) else said
                for said in completions
            ]
        message = (source, list(completions), dict(columns))
        await self.start()
        if self._concurrent:
            try:
                async with self._places:
                    await self.start()  # the shared child may have ended meanwhile
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
        word, answer = child.ask(*message, accept=_numbers(len(message[1])))
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

    async def _end_call(
        self, child: Child[Answer], word: str, answer: asyncio.Future[Answer]
    ) -> None:
        """End one call of the shared child, or the child where that is not to be had.

        Raises ChildEnded: whichever of the calls in it holds it up, none goes on.
        """
        child.tell(word, None)
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
                _, answer = child.ask(*message, accept=_numbers(len(message[1])))
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

    async def _idle_child(self) -> Child[Answer]:
        while True:
            try:
                async with asyncio.timeout(GROW_SECONDS if self._children else 0):
                    child = await self._idle.get()
            except TimeoutError:
                return await self._new_child()
            if child.running:
                return child
            await self._retire(child)

    async def _new_child(self) -> Child[Answer]:
        try:
            child, copy = await started(
                _CHILD, parse, self._criterion.search_path, self._log, variables=self._variables
            )
        except OSError as error:  # of this machine: it says nothing of the group
            detail = f"no process could be started: {error}"
            raise RewardFailed(self.name, RewardFailure.UNREACHED, detail) from error
        copy.close()
        self._children.add(child)
        ready = False
        try:
            _, answer = child.ask(self._criterion, accept=_numbers(1))
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

    def _serving(self, child: Child[Answer] | None) -> bool:
        return child is not None and child.running

    def _values(self, answer: Answer) -> list[float | None]:
        if answer.failure is not None:
            raise RewardFailed(self.name, *answer.failure)
        assert answer.scores is not None
        return answer.scores

    def _failed(self, ended: ChildEnded, doing: str = "scoring a group") -> RewardFailed:
        reason = RewardFailure.GARBLED if ended.garbled else RewardFailure.DIED
        return RewardFailed(self.name, reason, f"{ended.detail} while {doing}")

    def _timeout(self) -> RewardFailed:
        return RewardFailed(
            self.name,
            RewardFailure.TIMEOUT,
            f"no answer within {self._criterion.timeout_s:g} s while scoring a group",
        )


def _numbers(count: int) -> Callable[[Answer], None]:
    """What accepts a failure, or `count` numbers."""

    def accept(answer: Answer) -> None:
        if answer.scores is not None and len(answer.scores) != count:
            raise Garbled(f"{len(answer.scores)} numbers for {count}")

    return accept
