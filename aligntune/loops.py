"""Plain code around the asynchronous core: a coroutine is run to its end wherever it is called, and
SIGINT and SIGTERM become a wish to stop."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from aligntune.errors import Interrupted

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPING = "stopping: what was trained goes into a checkpoint; a second signal ends the run at once"
"""What a person should read as soon as the first signal is heard."""


@contextmanager
def stop_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls `stop` with its number; the next ends the wait at once.

    Only the main thread gets signals; in others this changes nothing.

    Raises Interrupted for the second signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = 0

    def note(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt  # what asyncio lets through, wherever it stands
        asked = number
        stop(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(asked or signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(work: Coroutine[Any, Any, T], stop: Callable[[int], None] | None = None) -> T:
    """What `work` returns; where a loop runs already, as in a notebook, it gets a thread.

    `stop` is called in the loop of `work`, with the number of the first SIGINT or SIGTERM that the
    main thread gets meanwhile. Raises Interrupted for the second one, and cancels `work`.
    """
    loop, task = asyncio.new_event_loop(), None

    async def whole() -> T:
        nonlocal task
        task = asyncio.current_task()
        return await work

    def ask(number: int) -> None:
        if stop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(stop, number)

    def go() -> T:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(whole())

    with stop_signals(ask) if stop is not None else nullcontext():
        if not _in_a_loop():
            return go()
        with ThreadPoolExecutor(1, thread_name_prefix="aligntune-loop") as pool:
            done = pool.submit(go)
            try:
                return done.result()
            except KeyboardInterrupt:
                loop.call_soon_threadsafe(lambda: task.cancel() if task else None)
                raise


def _in_a_loop() -> bool:
    """Whether this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
