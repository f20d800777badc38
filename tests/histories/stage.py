"""Actors without processes on a virtual clock: they take time, die, hang, and lose what they made.

What looks like Ray here: handles with `.method.remote()`, references whose objects lie on a node,
and the errors that Ray raises."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

from ray.exceptions import ActorDiedError, ObjectLostError


class Worker(Protocol):
    """The code of an actor; its other methods are what it is asked for."""

    name: str
    done: int

    def killed(self) -> None:
        """The process is gone."""


Around = Callable[["Actor", str], Any]  # awaited when a method is called, before its work


class Ref:
    """A reference to one value of a call."""

    def __init__(self) -> None:
        self.value: Future[Any] = Future()
        self.task: asyncio.Task[None] | None = None
        self.lost = False

    def lose(self) -> None:
        """The node that held the value is gone."""
        self.lost = True

    def drop(self) -> None:
        """As `ray.cancel` does it."""
        if self.task is not None:
            self.task.cancel()

    def future(self) -> Future[Any]:
        """As Ray's."""
        if not self.lost:
            return self.value
        gone: Future[Any] = Future()
        gone.set_exception(_gone())
        return gone

    def read(self) -> Any:
        """The value, for an actor that is given the reference. Raises ObjectLostError."""
        if self.lost:
            raise _gone()
        return self.value.result(0)

    def settle(self, value: Any, error: Exception | None = None) -> None:
        """The call has come to its end."""
        if self.value.done():
            return
        if error is None:
            self.value.set_result(value)
        else:
            self.value.set_exception(error)


def _gone() -> ObjectLostError:
    return ObjectLostError("0" * 56, None, "")


class Method:
    """A method of a handle."""

    def __init__(self, actor: Actor, name: str, returns: int = 1) -> None:
        self._actor = actor
        self._name = name
        self._returns = returns

    def options(self, num_returns: int = 1, concurrency_group: str | None = None) -> Method:
        """As Ray's."""
        return Method(self._actor, self._name, num_returns)

    def remote(self, *args: Any) -> Any:
        """References to the values to come."""
        refs = [Ref() for _ in range(self._returns)]
        self._actor.begin(self._name, args, refs)
        return refs if self._returns > 1 else refs[0]


class Actor:
    """The handle of an actor. `around` hears of every call that is not about its health."""

    def __init__(self, worker: Any, around: Around) -> None:
        self.worker = worker
        self.name: str = worker.name
        self.dead = False
        self.deaf = False  # stopped: it answers nothing, and does nothing
        self._around = around
        self._made: list[Ref] = []
        self._running: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    def begin(self, name: str, args: tuple[Any, ...], refs: list[Ref]) -> None:
        """Start a method."""
        if name == "ping":
            if self.dead:
                refs[0].settle(None, ActorDiedError())
            elif not self.deaf:
                refs[0].settle(self.worker.done)
            return
        task = asyncio.get_running_loop().create_task(self._run(name, args, refs))
        for ref in refs:
            ref.task = task
        self._running.add(task)

        def over(task: asyncio.Task[None]) -> None:
            self._running.discard(task)
            for ref in refs:  # of one that was ended before it began
                ref.settle(None, ActorDiedError())

        task.add_done_callback(over)

    async def _run(self, name: str, args: tuple[Any, ...], refs: list[Ref]) -> None:
        error: Exception | None = None
        value: Any = None
        try:
            if self.dead:
                raise ActorDiedError()
            if self.deaf:
                await asyncio.Event().wait()
            await self._around(self, name)
            value = await getattr(self.worker, name)(*args)
            self.worker.done += 1
        except asyncio.CancelledError:
            error = ActorDiedError()
        except Exception as raised:  # noqa: BLE001 - whoever called hears of it
            error = raised
        values = list(value) if len(refs) > 1 and error is None else [value] * len(refs)
        for ref, given in zip(refs, values, strict=True):
            ref.settle(given, error)
        if error is None:
            self._made += refs

    def kill(self) -> None:
        """The process is gone, and no answer of it comes any more."""
        self.dead = True
        self.worker.killed()
        for task in list(self._running):
            task.cancel()

    def lose_node(self) -> None:
        """The node is gone, with all that the actor made there."""
        self.kill()
        for ref in self._made:
            ref.lose()
