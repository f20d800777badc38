"""The process between an actor's child and one program in a sandbox: it sets the limits, waits, and
ends all that the program has started. Standard library only."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
import time
from types import FrameType
from typing import Any, NoReturn

from actors.children.keeper import below, kill_all

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
MIB = 2**20
LOOK_SECONDS = 0.1  # between two looks at how many processes there are


def main(told: str) -> NoReturn:
    """Run `told["command"]` in `told["folder"]`; the last line of standard error says how it ended.

    SIGTERM ends it with everything below, and so does the end of the process above.
    """
    limits = json.loads(told)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    child = os.fork()
    if child == 0:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _held(limits)
        os.chdir(limits["folder"])
        os.execvpe(limits["command"][0], limits["command"], os.environ)

    def end(_: int, __: FrameType | None) -> None:
        kill_all(child)
        os._exit(1)

    signal.signal(signal.SIGTERM, end)
    most = limits["processes"] if limits["held"] else sys.maxsize
    status, late = _waited(child, limits["wall_s"], most)
    kill_all(child)
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        late = True
    os.write(2, b"\x1e" + json.dumps({"status": code, "late": late}).encode())
    os._exit(0)


def _waited(child: int, seconds: float, processes: int) -> tuple[int, bool]:
    """The wait status of `child`, and whether it was ended for its time.

    It is ended too where it has more than `processes`: the kernel's own limit is not for root.
    """
    deadline = time.monotonic() + seconds
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found == child:
            return status, False
        left = deadline - time.monotonic()
        if left <= 0 or len(below(os.getpid())) > processes:
            os.killpg(child, signal.SIGKILL)  # bwrap, whose end is that of all below it
            return os.waitpid(child, 0)[1], left <= 0
        signal.sigtimedwait({signal.SIGCHLD}, min(left, LOOK_SECONDS))


def _held(limits: dict[str, Any]) -> None:
    """Bound this process and what it starts, for good."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    cpu = max(1, round(limits["cpu_s"]))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits["held"]:
        memory, file = limits["memory_mib"] * MIB, limits["file_mib"] * MIB
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (file, file))
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        most = _tasks() + limits["processes"]
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))


def _tasks() -> int:
    """Processes and threads of this user now, which is what the limit of processes counts."""
    own, total = os.getuid(), 0
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == own:
                total += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:
            continue  # it has ended meanwhile
    return total


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)
