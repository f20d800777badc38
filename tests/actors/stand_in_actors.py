"""Actors without Ray: what `ReplicaSet` and `Ranks` call, on the event loop of the test itself."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any

from ray.exceptions import RayActorError


class Method:
    """A remote method of a stand-in."""

    def __init__(self, actor: Actor, name: str) -> None:
        self._actor = actor
        self._name = name
        self._returns = 1

    def options(self, num_returns: int) -> Method:
        """As Ray's."""
        self._returns = num_returns
        return self

    def remote(self, *args: Any) -> Any:
        """A reference to the answer, or one to each of several."""
        refs = [Ref() for _ in range(self._returns)]
        self._actor.begin(self._name, args, refs)
        return refs if self._returns > 1 else refs[0]


class Ref:
    """A reference to a value to come."""

    def __init__(self) -> None:
        self.value: Future[Any] = Future()
        self.task: asyncio.Task[None] | None = None

    def drop(self) -> None:
        """Nobody wants the value: as `ray.cancel` does, the method is cancelled."""
        if self.task is not None:
            self.task.cancel()

    def future(self) -> Future[Any]:
        """As Ray's."""
        return self.value


class Actor:
    """Runs the async methods of `worker`; once killed, every call fails as Ray's calls do."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.dead = False
        self._pending: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)

    def begin(self, name: str, args: tuple[Any, ...], refs: list[Ref]) -> None:
        """Start a method; its answer goes to `refs`."""
        task = asyncio.create_task(self._run(name, args, refs))
        for ref in refs:
            ref.task = task
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)

    async def _run(self, name: str, args: tuple[Any, ...], refs: list[Ref]) -> None:
        try:
            if self.dead:
                raise RayActorError()
            value = await getattr(self.worker, name)(*args)
        except asyncio.CancelledError:
            self._answer(refs, RayActorError())
        except Exception as error:  # noqa: BLE001 - whoever called hears of it
            self._answer(refs, error)
        else:
            values = value if len(refs) > 1 else [value]
            for ref, given in zip(refs, values, strict=True):
                if not ref.value.cancelled():
                    ref.value.set_result(given)

    def _answer(self, refs: list[Ref], error: Exception) -> None:
        for ref in refs:
            if not ref.value.cancelled():
                ref.value.set_exception(error)

    def kill(self) -> None:
        """The process is gone."""
        self.dead = True
        for task in list(self._pending):
            task.cancel()
