"""Whether an actor is alive: it is asked again and again, and one that says nothing is found.

Invariant: a silence is counted in the caller's own turns, so that a caller that was stopped itself,
or a machine that slept, takes nobody for dead. What an actor answers with is how much it has done,
which tells one that works for long from one that is stuck.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.waiting import done_within

HEALTH = "health"
HEALTH_GROUP = {HEALTH: 2}
"""Threads of an actor beside its work: an event loop that is blocked does not hold them up."""


class Alive:
    """What every actor answers beside its work. `done` goes up with whatever it does."""

    done: int = 0

    def ping(self) -> int:
        """How much this actor has done; comes at once, whatever else it does."""
        return self.done

    def stacks(self) -> str:
        """Where every thread of this process is."""
        return all_stacks()


def all_stacks() -> str:
    """Where every thread of this process is, as text."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )


async def stacks_of(handles: Mapping[str, Any], seconds: float = 10.0) -> list[tuple[str, str]]:
    """(name, where its threads are) of every `Alive` actor; of one that hangs, that it does."""
    from ray.exceptions import RayError

    async def one(name: str, handle: Any) -> tuple[str, str]:
        ref = handle.stacks.options(concurrency_group=HEALTH).remote()
        told = asyncio.wrap_future(ref.future())
        if not await done_within(seconds, told):
            return name, f"no answer within {seconds:g} s"
        try:
            return name, told.result()
        except RayError as error:
            return name, f"no answer: {error}"

    return await asyncio.gather(*(one(name, handle) for name, handle in handles.items()))


def sign_of_life(concurrent: bool) -> Callable[[Any], Any]:
    """What asks an `Alive` actor, given its handle, and returns the reference to its answer.

    One that is `concurrent` answers from its event loop, so that this must turn; one that works in
    a thread answers beside it.
    """

    def ask(handle: Any) -> Any:
        method = handle.ping if concurrent else handle.ping.options(concurrency_group=HEALTH)
        return method.remote()

    return ask


@dataclass(frozen=True)
class Patience:
    """How long an actor may say nothing. Seconds."""

    lost_s: float  # then it is taken for dead

    @property
    def every_s(self) -> float:
        """Between two questions."""
        return min(5.0, self.lost_s / 6)

    @property
    def suspect_s(self) -> float:
        """Then it gets nothing new to do."""
        return self.lost_s / 3


USUAL = Patience(45.0)


async def listen(
    ask: Callable[[], Any],
    patience: Patience,
    heard: Callable[[int], None],
    suspect: Callable[[float], None] = lambda silent: None,
) -> str:
    """Ask until there is no answer any more; returns why the actor is lost.

    `ask` gives the reference to an answer of `Alive.ping`. `heard` gets how much was done since the
    answer before, `suspect` how long a silence lasts that is longer than it should be.
    """
    from ray.exceptions import RayError, RayTaskError

    now = asyncio.get_running_loop().time
    said = 0
    while True:
        await asyncio.sleep(patience.every_s)
        answer = asyncio.wrap_future(ask().future())
        silent, suspected = 0.0, False
        try:
            while not answer.done():
                began = now()
                await asyncio.wait((answer,), timeout=patience.every_s)
                silent += min(now() - began, 2 * patience.every_s)
                if silent >= patience.lost_s and not answer.done():
                    return f"no sign of life for {silent:.0f} s (train.silence_timeout_s)"
                if silent >= patience.suspect_s and not suspected and not answer.done():
                    suspected = True
                    suspect(silent)
            done = answer.result()
            heard(max(0, done - said))
            said = done
        except RayError as error:
            # What the actor raised itself stands below a coloured header of Ray's.
            cause = error.cause if isinstance(error, RayTaskError) else error
            return (str(cause).strip().splitlines() or ["died"])[0]
        finally:
            answer.cancel()
