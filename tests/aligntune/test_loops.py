"""A coroutine is run to its end from plain code and from within a loop; signals ask it to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from aligntune.errors import Interrupted
from aligntune.loops import SIGNALS, run, run_until_signal, stop_signals

Caller = Callable[[Callable[[], Any]], Any]


def plainly(call: Callable[[], Any]) -> Any:
    return call()


def in_a_loop(call: Callable[[], Any]) -> Any:
    """As a script's `async def main` does it."""

    async def main() -> Any:
        return call()

    return asyncio.run(main())


def in_a_cell(call: Callable[[], Any]) -> Any:
    """As a notebook does it: the kernel's loop serves a request, and within it the cell's code."""
    loop = asyncio.new_event_loop()
    answer: list[Any] = []

    async def request() -> None:
        async def cell() -> None:
            answer.append(call())

        await asyncio.create_task(cell())

    task = loop.create_task(request())
    task.add_done_callback(lambda _: loop.stop())
    try:
        loop.run_forever()
        task.result()
    finally:
        loop.close()
    return answer[0]


@pytest.fixture(params=[plainly, in_a_loop, in_a_cell], ids=lambda caller: caller.__name__)
def caller(request: pytest.FixtureRequest) -> Caller:
    found: Caller = request.param
    return found


def test_the_answer_and_the_error_come_back(caller: Caller) -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return "done"

    async def fails() -> None:
        raise LookupError("of the work")

    assert caller(lambda: run(work())) == "done"
    with pytest.raises(LookupError, match="of the work"):
        caller(lambda: run(fails()))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_the_work_to_stop_and_its_answer_still_comes(
    caller: Caller, number: int
) -> None:
    async def work(asked: asyncio.Queue[int]) -> int:
        os.kill(os.getpid(), number)
        return await asked.get()

    def call() -> int:
        asked: asyncio.Queue[int] = asyncio.Queue()
        return run(work(asked), asked.put_nowait)

    before = [signal.getsignal(n) for n in SIGNALS]
    assert caller(call) == number
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_the_second_signal_ends_the_wait_at_once(caller: Caller) -> None:
    ended: list[str] = []

    async def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asked.wait()
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    asked = asyncio.Event()
    with pytest.raises(Interrupted) as stopped:
        caller(lambda: run(work(), lambda number: asked.set()))
    assert stopped.value.signal == signal.SIGTERM
    assert ended == ["cancelled"]


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    handlers: list[Any] = []

    def call() -> None:
        with stop_signals(lambda number: None):
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize("number", SIGNALS)
def test_work_that_keeps_nothing_ends_with_the_first_signal(caller: Caller, number: int) -> None:
    ended: list[str] = []

    async def work() -> None:
        os.kill(os.getpid(), number)
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 30)
        finally:
            ended.append("let go of what it held")

    with pytest.raises(Interrupted) as error:
        caller(lambda: run_until_signal(work()))
    assert error.value.signal == number
    assert ended == ["let go of what it held"]
