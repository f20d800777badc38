"""The process that has imported the user's tools and environments, and forks one for each use.

Invariant: a fork is kept by a process of its own, so that it and all that it starts end with its
episode, and everything ends with this one's keeper. In a sandbox it is apart from the forks of
other episodes before anything of the user's runs in it. Standard library and the user's code only.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from actors.children.channel import HEADER_BYTES, request_length
from actors.children.code import FunctionNotFound, load, traceback_tail
from actors.children.keeper import keep
from actors.environments import apart
from actors.environments.agent_child import Player, player_of
from actors.environments.channel import refused, told
from actors.environments.child import Loaded, serve
from actors.environments.tools import by_name


def fork_request(place: str) -> bytes:
    """The message that asks for a fork, with a channel and a lifeline; `place` is the name of its
    folder in the scratch folder, empty where there is none."""
    return place.encode().ljust(apart.NAME_BYTES)


@dataclass(frozen=True)
class Setup:
    """What is imported, and how its processes are bound."""

    tools: Sequence[str | bytes]
    environments: Mapping[str, str | bytes]
    rewards: Mapping[str, tuple[str | bytes, float]] = field(default_factory=dict)  # with seconds
    agent: str | bytes | tuple[str, ...] | None = None  # a tuple: a program and its arguments
    memory_bytes: int | None = None
    max_output_characters: int = 2**14
    log: str | None = None
    scratch: str | None = None  # the folder that a sandbox may write to, where there is one
    wrapped: bool = False  # bubblewrap is around this process


def main(channel: int, lifeline: int, log: str) -> None:
    """Serve over socket `channel`: first (word, Setup), then requests for forks."""
    keep(lifeline, log or None, lambda: _serve(channel))


def _serve(channel: int) -> None:
    os.set_inheritable(channel, False)
    connection = socket.socket(fileno=channel)
    word, setup = pickle.loads(
        _exactly(connection, request_length(_exactly(connection, HEADER_BYTES)))
    )
    try:
        loaded = Loaded(
            by_name([_load("tool", code) for code in setup.tools]),
            {name: _load("environment", code) for name, code in setup.environments.items()},
            {name: (_load("reward", code), limit) for name, (code, limit) in setup.rewards.items()},
            setup.memory_bytes,
            setup.max_output_characters,
            _player(setup.agent),
        )
    except ValueError as error:
        connection.sendall(refused(word, str(error)))
        return
    # Before SIGCHLD is ignored: it waits for what it tries.
    alone = setup.scratch is not None and setup.wrapped and apart.possible(setup.scratch)
    connection.sendall(told(word, alone))
    gc.collect()
    gc.freeze()  # what forks share stays shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks' keepers
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, apart.NAME_BYTES, 2)
        if not data:
            return
        name, place = data.decode().strip(), None
        if setup.scratch is not None:
            place = apart.Place(setup.scratch, name, alone, setup.wrapped, setup.log)
        with contextlib.suppress(OSError):  # no place for another process: its channel is closed
            if os.fork() == 0:
                try:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    connection.close()
                    theirs, life = descriptors
                    if alone:
                        apart.leave()
                    keep(life, setup.log, partial(_begin, place, theirs, loaded))
                except BaseException:  # noqa: BLE001 - printed; its channel is closed
                    traceback.print_exc()
                os._exit(1)
        for descriptor in descriptors:
            os.close(descriptor)


def _begin(place: apart.Place | None, channel: int, loaded: Loaded) -> None:
    """Serve what one episode asks for, or a part of it."""
    if place is not None:
        apart.enter(place)
    serve(channel, loaded)


def _load(what: str, code: str | bytes) -> Callable[..., Any]:
    try:
        found = load(code)
    except FunctionNotFound as error:
        raise ValueError(f"{what} {error}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"a {what} cannot be unpickled: {traceback_tail(error)}") from error
    if not callable(found):
        raise ValueError(f"a {what} is a {type(found).__name__}, which cannot be called")
    return found


def _player(agent: str | bytes | tuple[str, ...] | None) -> Player | None:
    if agent is None or isinstance(agent, tuple):
        return None if agent is None else player_of(agent)
    return player_of(_load("agent", agent))


def _exactly(connection: socket.socket, count: int) -> bytes:
    """`count` bytes and none more, for what follows may bring descriptors."""
    data = b""
    while len(data) < count:
        part = connection.recv(count - len(data))
        if not part:
            os._exit(0)  # the actor has closed the channel
        data += part
    return data
