"""Plain code around the asynchronous core: a coroutine is run to its end wherever it is called, and
SIGINT and SIGTERM become a wish to stop."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from aligntune.errors import Interrupted

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNAL_SECONDS = 0.2  # after which a thread that waits for another looks for signals again
STOPPING = "stopping: what was trained goes into a checkpoint (Ctrl-C again: at once, without it)"
"""What a person should read as soon as the first signal is heard."""


@contextmanager
def stop_signals(
    stop: Callable[[int], None], give_up: Callable[[], None] | None = None
) -> Iterator[None]:
    """The first SIGINT or SIGTERM calls `stop` with its number; the next ends the wait at once.

    With `give_up` the second calls that, and only the third ends the wait. Only the main thread
    gets signals; in others this changes nothing.

    Raises Interrupted for the signal that ends the wait.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []

    def note(number: int, frame: object) -> None:
        heard.append(number)
        if len(heard) == 1:
            stop(number)
        elif len(heard) == 2 and give_up is not None:
            give_up()
        else:
            raise KeyboardInterrupt  # what asyncio lets through, wherever it stands

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(heard[0] if heard else signal.SIGINT) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(work: Coroutine[Any, Any, T], stop: Callable[[int], None] | None = None) -> T:
    """What `work` returns; where a loop runs already, as in a notebook, it gets a thread.

    `stop` is called in the loop of `work`, with the number of the first SIGINT or SIGTERM that the
    main thread gets meanwhile. Raises Interrupted for the second one, and cancels `work`.
    """
    loop, task, given_up = asyncio.new_event_loop(), None, False

    async def whole() -> T:
        nonlocal task
        task = asyncio.current_task()
        if task and given_up:
            task.cancel()
        return await work

    def ask(number: int) -> None:
        if stop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(stop, number)

    def give_up() -> None:
        nonlocal given_up
        given_up = True
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: task.cancel() if task else None)

    def go() -> T:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(whole())

    if not _in_a_loop():
        with stop_signals(ask) if stop is not None else nullcontext():
            return go()
    # The second signal raises nothing here: it may come while the thread is being started.
    with (
        stop_signals(ask, give_up) if stop is not None else nullcontext(),
        ThreadPoolExecutor(1, thread_name_prefix="aligntune-loop") as pool,
    ):
        done = pool.submit(go)
        try:
            # Python looks for signals between waits only, so one wait could miss one for good.
            while not wait({done}, timeout=SIGNAL_SECONDS).done:
                pass
            answer = done.result()
        except asyncio.CancelledError:
            if not given_up:
                raise
        except KeyboardInterrupt:
            give_up()
            raise
        if given_up:
            raise KeyboardInterrupt
        return answer


def run_until_signal(work: Coroutine[Any, Any, T]) -> T:
    """As `run`, but the first SIGINT or SIGTERM cancels `work`. Raises Interrupted then."""
    heard: list[int] = []
    task: asyncio.Task[Any] | None = None

    async def whole() -> T:
        nonlocal task
        task = asyncio.current_task()
        return await work

    def stop(number: int) -> None:
        heard.append(number)
        if task is not None:
            task.cancel()

    try:
        return run(whole(), stop)
    except asyncio.CancelledError:
        if not heard:
            raise
        raise Interrupted(heard[0]) from None


def _in_a_loop() -> bool:
    """Whether this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
