"""Asks the fork server for a process like one that would start here. Standard library only."""

from __future__ import annotations

import os
import resource
import signal
import socket
from collections.abc import Mapping
from typing import Any

from cluster.forks import agree, wire

# A server that still imports is worth waiting for: who imports alone would not be there sooner.
WAIT_S = 90.0
SEND_S = 5.0
BADNESS = "/proc/self/oom_score_adj"
LIMITS = ("RLIMIT_NOFILE", "RLIMIT_CORE", "RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_STACK")


class Refused(OSError):
    """The server started nothing; the message says why."""


def fork(
    path: str,
    command: list[str],
    environment: dict[str, str],
    *,
    ray: bool,
    files: Mapping[int, int] | None = None,
    folder: str | os.PathLike[str] | None = None,
    exact: bool = False,
) -> int:
    """Start `command`, a Python command line without its interpreter, and return its process id.

    It has this process's open files, working directory, limits and signals; `files` gives it
    others, ours by their numbers there, and `folder` another working directory. What the imports of
    the server have set is in its environment too, unless that is `exact`. Once this returns it
    runs; where this raises OSError nothing runs, nor will.
    """
    if files is None:
        files = {number: number for number in _open_files()}
    of_ray = dict(agree.of_ray(environment)) if ray else None
    request = _request(command, environment, list(files), of_ray) | {"exact": exact}
    if folder is not None:
        request["folder"] = os.fspath(folder)
    with socket.socket(socket.AF_UNIX) as server:
        return _started(server, path, request, list(files.values()))


def spawn(
    path: str,
    command: list[str],
    environment: dict[str, str],
    files: list[int],
    of_ray: Mapping[str, str] | None,
) -> tuple[int, socket.socket]:
    """As `fork`, from the branch of `of_ray`, with `files` alone, each under its own number.

    It ends with this process. On the socket its exit code is said, as a line, when it has ended; a
    socket that closes without one says that it has ended too.
    """
    server = socket.socket(socket.AF_UNIX)
    try:
        request = _request(command, environment, files, of_ray) | {"spawned": True}
        return _started(server, path, request, files), server
    except BaseException:
        server.close()
        raise


def _started(server: socket.socket, path: str, request: dict[str, Any], files: list[int]) -> int:
    server.settimeout(SEND_S)
    server.connect(path)
    wire.send(server, request, files)
    server.settimeout(WAIT_S)
    try:
        answer = wire.line(server)
    except TimeoutError as error:
        raise Refused(f"the fork server has not answered for {WAIT_S:g} s") from error
    if not answer.startswith(wire.READY):
        raise Refused(answer.decode().strip() or "the fork server has closed")
    server.sendall(wire.GO)
    return int(answer.split()[1])


def _request(
    command: list[str],
    environment: dict[str, str],
    files: list[int],
    of_ray: Mapping[str, str] | None,
) -> dict[str, Any]:
    umask = os.umask(0)
    os.umask(umask)
    return {
        "spawned": False,
        "exact": False,
        "of_ray": None if of_ray is None else dict(of_ray),
        "command": command,
        "environment": environment,
        "folder": os.getcwd(),
        "umask": umask,
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in LIMITS},
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
        "files": files,
        "processors": sorted(os.sched_getaffinity(0)),
        "badness": badness(),
    }


def badness() -> int:
    """How early this process ends where memory is short; Ray sets it for its workers."""
    with open(BADNESS) as file:
        return int(file.read())


def _open_files() -> list[int]:
    """The descriptors that a program started by `exec` here would have."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            continue  # that of the listing
    return sorted(found)
