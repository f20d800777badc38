"""Actors without processes: objects behind what looks like Ray's handles, which can be killed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError


class Ref:
    """A reference to one value of a call."""

    def __init__(self, call: asyncio.Future[Any], place: int | None) -> None:
        self._call = call
        self._place = place

    def value(self) -> Any:
        """What the call gave. Raises what it raised."""
        made = self._call.result()
        return made if self._place is None else made[self._place]

    def drop(self) -> None:
        """End the call, as `ray.cancel` does."""
        self._call.cancel()

    def future(self) -> Future[Any]:
        """As Ray's."""
        future: Future[Any] = Future()

        def settle(_: Any) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self.value())
            except ActorDiedError as died:
                future.set_exception(died)
            except Exception as error:  # noqa: BLE001 - whatever the actor's code raised
                future.set_exception(RayTaskError("f", "", error))

        self._call.add_done_callback(settle)
        return future


class Hand:
    """A handle of `actor`, whose async methods run in this loop."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.dead = False
        self.calls: set[asyncio.Future[Any]] = set()

    def __getattr__(self, method: str) -> Method:
        return Method(self, method)

    def kill(self) -> None:
        """The process is gone: what it was doing never ends well."""
        self.dead = True
        for call in list(self.calls):
            call.cancel()


class Method:
    """A method of a handle."""

    def __init__(self, hand: Hand, name: str, returns: int = 1) -> None:
        self._hand = hand
        self._name = name
        self._returns = returns

    def options(self, num_returns: int = 1, concurrency_group: str | None = None) -> Method:
        """As Ray's."""
        return Method(self._hand, self._name, num_returns)

    def remote(self, *args: Any) -> Any:
        """As Ray's."""
        call = asyncio.ensure_future(self._run(args))
        call.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may ask
        if self._returns == 1:
            return Ref(call, None)
        return [Ref(call, place) for place in range(self._returns)]

    async def _run(self, args: tuple[Any, ...]) -> Any:
        hand = self._hand
        if hand.dead:
            raise ActorDiedError
        given = [arg.value() if isinstance(arg, Ref) else arg for arg in args]
        work = asyncio.ensure_future(getattr(hand.actor, self._name)(*given))
        hand.calls.add(work)
        try:
            return await work
        except asyncio.CancelledError:
            raise ActorDiedError from None
        finally:
            hand.calls.discard(work)


class Company:
    """The actors of a run: `make[role](name)` gives one; `hands` are all that were made."""

    def __init__(self, make: dict[str, Callable[[str], Any]]) -> None:
        self._make = make
        self.hands: dict[str, Hand] = {}

    def maker(self, role: Any) -> Callable[[int, str], Hand]:
        """As `Roles.maker`."""

        def make(index: int, name: str) -> Hand:
            self.hands[name] = Hand(self._make[role.name](name))
            return self.hands[name]

        return make

    def room(self, role: Any) -> Callable[[int], bool]:
        """As `Roles.room`."""
        return lambda index: False
