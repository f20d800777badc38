"""The process that forks for episodes: what becomes of one that hangs or cannot be started."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.environments import processes
from actors.environments.base import EpisodeFailed
from actors.environments.processes import Server
from actors.environments.server import Setup

TOOL = '''
def tool() -> str:
    """Say it.

    Returns:
        It.
    """
    return "it"
'''


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Server], Awaitable[None]]], None]:
    (tmp_path / "a_tool.py").write_text(TOOL)

    def with_server(body: Callable[[Server], Awaitable[None]]) -> None:
        async def whole() -> None:
            server = Server(Setup(("a_tool:tool",), {}), (str(tmp_path),), None)
            try:
                await body(server)
            finally:
                await server.close()

        asyncio.run(asyncio.wait_for(whole(), 120))

    return with_server


def no_room(*_: Any, **__: Any) -> Any:
    raise OSError(errno.EMFILE, "Too many open files")


def process_of(server: Server) -> psutil.Process:
    assert server._child is not None
    assert server._child._process is not None
    (forks,) = psutil.Process(server._child._process.pid).children()
    return forks


@pytest.mark.slow
def test_a_server_that_is_stopped_is_replaced(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(server: Server) -> None:
        server.retire(await server.fork())
        stopped = process_of(server)
        stopped.send_signal(signal.SIGSTOP)
        with monkeypatch.context() as patch:
            patch.setattr(processes, "FORK_SECONDS", 0.5)
            with pytest.raises(EpisodeFailed, match="starting gave no answer") as failed:
                await server.fork()
        assert failed.value.infrastructure
        assert not stopped.is_running()
        server.retire(await server.fork())

    run(body)


@pytest.mark.slow
def test_a_fork_that_hangs_alone_ends_no_other(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(server: Server) -> None:
        await server.start()
        before, real, asked = server._child, processes.Child.ask, asyncio.Event()

        def ask(self: Any, *message: Any, **more: Any) -> Any:
            if asked.is_set():
                return real(self, *message, **more)
            asked.set()
            return "nobody's", asyncio.get_running_loop().create_future()

        monkeypatch.setattr(processes.Child, "ask", ask)
        monkeypatch.setattr(processes, "FORK_SECONDS", 2.0)
        hangs = asyncio.create_task(server.fork())
        await asked.wait()
        other = await server.fork()
        with pytest.raises(EpisodeFailed):
            await hangs
        assert server._child is before
        assert other.running
        server.retire(other)

    run(body)


def test_without_room_for_a_thread_a_start_fails_as_infrastructure_and_the_next_answers(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_thread(*_: Any, **__: Any) -> Any:
        raise RuntimeError("can't start new thread")

    async def body(server: Server) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "to_thread", no_thread)
            with pytest.raises(EpisodeFailed, match="can't start new thread") as told:
                await server.fork()
        assert told.value.infrastructure
        server.retire(await server.fork())

    run(body)


@pytest.mark.parametrize("begun", [False, True])
def test_without_room_for_a_process_a_fork_fails_as_infrastructure_and_the_next_answers(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """Nobody else's process is ended for it."""

    async def body(server: Server) -> None:
        other = await server.fork() if begun else None
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socketpair", no_room)
            with pytest.raises(EpisodeFailed, match=r"no process could be started: .*many") as told:
                await server.fork()
        assert told.value.infrastructure
        server.retire(await server.fork())
        if other is not None:
            assert other.running
            server.retire(other)

    run(body)
