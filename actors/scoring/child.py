"""The child process that runs a criterion's function: import, call, check, answer.

Invariant: every call is answered once, by this process and none that the user's code has forked.
The user's code runs in the main thread (signals work there). Standard library only: a child imports
this, the user's function, and nothing else. Its actor and its keeper see to its end.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any, BinaryIO

from actors.children.channel import HEADER_BYTES, opened, receive, request_length
from actors.children.code import FunctionNotFound, load, traceback_tail
from actors.children.keeper import keep
from actors.scoring.calling import arguments, checked
from actors.scoring.channel import failed, scored
from actors.scoring.criteria import RewardCriterion, RewardFailed, RewardFailure, Unreached

CONCURRENT = 1.0  # the answer to the first message: how calls are served
IN_TURN = 0.0

Function = Callable[..., Any]
Call = tuple[str, Any, list[Any], dict[str, Any]]  # its word, prompt, completions, columns


def main(channel: int, lifeline: int, log: str) -> None:
    """Serve one criterion over socket `channel`, kept by a process of its own.

    The first message is (word, criterion), answered with how calls are served. Those of an async
    function run together, those of another one after the other. A message (word, None) ends a
    call of an async function.
    """
    keep(lifeline, log or None, lambda: _serve(channel))


def _serve(channel: int) -> None:
    connection, stream = opened(channel)
    setup = receive(stream)
    if setup is None:
        return
    word, criterion = setup
    function = _load(criterion)
    if isinstance(function, RewardFailed):
        connection.sendall(failed(word, function.reason, function.detail))
    elif _is_async(function):
        connection.sendall(scored(word, [CONCURRENT]))
        asyncio.run(_together(connection, criterion, function))
    else:
        connection.sendall(scored(word, [IN_TURN]))
        _in_turn(connection, stream, criterion, function)


def _load(criterion: RewardCriterion) -> Function | RewardFailed:
    try:
        function: Function = load(criterion.target)
        return function
    except FunctionNotFound as error:
        return RewardFailed(criterion.name, RewardFailure.IMPORT, str(error))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - unpickling imports the user's modules
        return RewardFailed(criterion.name, RewardFailure.IMPORT, traceback_tail(error))


def _is_async(function: Function) -> bool:
    call = getattr(function, "__call__", None)  # noqa: B004 - an object may have an async one
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _in_turn(
    connection: socket.socket, stream: BinaryIO, criterion: RewardCriterion, function: Function
) -> None:
    process = os.getpid()
    # One loop for the life of the process: clients that awaitables keep stay usable.
    with asyncio.Runner() as runner:
        while (call := receive(stream)) is not None:
            answer = _answer(criterion, function, call, lambda values: runner.run(_awaited(values)))
            if os.getpid() != process:
                os._exit(0)  # a fork that came back from the user's function
            connection.sendall(answer)


async def _together(
    connection: socket.socket, criterion: RewardCriterion, function: Function
) -> None:
    process = os.getpid()
    reader, writer = await asyncio.open_connection(sock=connection)
    running: dict[str, asyncio.Task[None]] = {}

    async def serve(call: Call) -> None:
        word, _, completions, _ = call
        try:
            values = function(**_arguments(criterion, function, call))
            if inspect.isawaitable(values):
                values = await values
            answer = scored(word, checked(criterion.name, values, len(completions)))
        except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:  # noqa: BLE001 - the user's code may raise anything; all of it is the answer
            answer = _failure(word, error)
        if os.getpid() != process:
            os._exit(0)  # a fork that came back from the user's function
        del running[word]
        writer.write(answer)

    while True:
        try:
            header = await reader.readexactly(HEADER_BYTES)
            message = pickle.loads(await reader.readexactly(request_length(header)))
        except (asyncio.IncompleteReadError, OSError):
            return
        word, *rest = message
        if rest != [None]:
            running[word] = asyncio.create_task(serve(message))
            await asyncio.sleep(0)  # it has begun, so that whatever ends it becomes an answer
        elif word in running:
            running[word].cancel()


def _arguments(criterion: RewardCriterion, function: Function, call: Call) -> dict[str, Any]:
    _, source, completions, columns = call
    shown = {name: value for name, value in columns.items() if name not in criterion.hidden}
    return arguments(function, source, completions, shown, criterion.options)


def _answer(
    criterion: RewardCriterion, function: Function, call: Call, wait: Callable[[Any], Any]
) -> bytes:
    word, _, completions, _ = call
    try:
        values = function(**_arguments(criterion, function, call))
        if inspect.isawaitable(values):
            values = wait(values)
        return scored(word, checked(criterion.name, values, len(completions)))
    except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:  # noqa: BLE001 - as in `serve`
        return _failure(word, error)


def _failure(word: str, error: BaseException) -> bytes:
    if isinstance(error, RewardFailed):
        return failed(word, error.reason, error.detail)
    away = isinstance(error, Unreached)
    reason = RewardFailure.UNREACHED if away else RewardFailure.RAISED
    return failed(word, reason, traceback_tail(error))


async def _awaited(values: Any) -> Any:
    return await values
