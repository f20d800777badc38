"""The process between an actor and user code: it keeps the output within bounds and leaves nothing.

Invariant: when the user's process ends, or the actor ends or lets go of the lifeline, every process
that the user's code started is killed before this one ends with the user's exit status. On Linux
that holds for daemons too, as they become this process's children; elsewhere for the user's process
group. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

LOG_BYTES = 16 * 2**20  # of the log file, all processes that write to it together
STDOUT_BYTES = 2**20  # of this process, where there is no log file
_CHUNK = 2**16
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class Output:
    """Where the user's output goes, until there is too much of it; what follows is dropped."""

    def __init__(self, path: str | None) -> None:
        """`path`: a file that several processes append to, or None for standard output."""
        self._file = 1
        self._left = STDOUT_BYTES
        self._shared = path is not None
        self._cut = False
        if path is not None:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, data: bytes) -> None:
        """Write `data`, or say once that it is left out. A full disk is no reason to end."""
        if self._cut:
            return
        with contextlib.suppress(OSError):
            left = LOG_BYTES - os.fstat(self._file).st_size if self._shared else self._left
            self._left -= len(data)
            self._cut = len(data) > left
            os.write(self._file, data[: max(left, 0)])
            if self._cut and left >= 0:  # else one before this process has said so
                os.write(self._file, b"\n[too much output: what follows is left out]\n")


def keep(lifeline: int, log: str | None, serve: Callable[[], None]) -> NoReturn:
    """Run `serve` in a process of its own, and end as the module says. Never returns.

    `lifeline` is a socket that is at its end when the actor has closed its side, or ended; the
    exit status is written to it, as decimal digits, when nothing is left of what was kept.
    `serve` must come from the main thread of a process that has no other thread.
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    # A stopped keeper goes on when its actor ends, and sees the lifeline's end.
    prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    heard, said = os.pipe()
    ended, ending = os.pipe()
    child = os.fork()
    if child == 0:
        for descriptor in (heard, ended, ending, lifeline):
            os.close(descriptor)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.close(said)
        os.setsid()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if _unheard():
            os._exit(1)  # the keeper ended before that held
        _run(serve)
    os.close(said)
    output = Output(log)
    os.set_blocking(ending, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(ending, warn_on_full_buffer=False)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_IGN)  # the lifeline says when to end
    status = _watch(child, lifeline, heard, ended, output)
    kill_all(child)
    os.set_blocking(heard, False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(LOG_BYTES // _CHUNK):
            data = os.read(heard, _CHUNK)
            if not data:
                break
            output.write(data)
    if status is not None:
        with contextlib.suppress(OSError):
            os.write(lifeline, str(status).encode())
    _end_as(status)


def _unheard() -> bool:
    """Whether nobody reads what this process prints: its keeper has ended. Unlike the parent's
    number, that is to be seen from another process namespace too."""
    poll = select.poll()
    poll.register(1, 0)
    return bool(poll.poll(0))


def _run(serve: Callable[[], None]) -> NoReturn:
    """Run `serve` and end at once: threads that the user's code left must not keep the process."""
    try:
        serve()
    except BaseException:  # noqa: BLE001 - printed, and said by the exit status
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _watch(child: int, lifeline: int, heard: int, ended: int, output: Output) -> int | None:
    """The status of the user's process once it has ended; None where the actor wants no more."""
    watched = [lifeline, heard, ended]
    while True:
        while (found := os.waitpid(-1, os.WNOHANG)) != (0, 0):  # daemons it left are reaped too
            if found[0] == child:
                return found[1]
        readable, _, _ = select.select(watched, [], [])
        if lifeline in readable:
            return None
        if ended in readable:
            os.read(ended, _CHUNK)
        if heard in readable:
            data = os.read(heard, _CHUNK)
            output.write(data)
            if not data:  # the user's code has closed its standard output and error
                watched.remove(heard)


def kill_all(child: int) -> None:
    """Kill every process below this one, and wait until there is none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # its group; on Linux, a part of what follows
    with contextlib.suppress(ChildProcessError):
        if os.waitpid(child, os.WNOHANG) == (0, 0):
            os.kill(child, signal.SIGKILL)  # it was only just forked, and leads no group yet
            os.waitpid(child, 0)
    with contextlib.suppress(ChildProcessError):  # none left
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass  # reaped; most often there was none, and no table of processes need be read
        while True:
            for process in below(os.getpid()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            os.waitpid(-1, 0)


def below(top: int) -> list[int]:
    """The processes that `top` and their like have started, where /proc tells."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
    found = list(children.get(top, ()))
    for process in found:
        found.extend(children.get(process, ()))
    return found


def _end_as(status: int | None) -> NoReturn:
    """End this process as the user's has ended."""
    if status is None:
        os._exit(0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def prctl(option: int, value: int) -> None:
    """Ask the kernel for one of the options above, of this process; on Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
