"""The process between an actor's child and one program in a sandbox: it sets the limits, waits, and
ends all that the program has started. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import sys
import time
from types import FrameType
from typing import Any, NoReturn

from actors.children.keeper import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    below,
    kill_all,
    prctl,
)

MIB = 2**20
BLOCK = 4096  # bytes on the disk that even an empty file or folder counts as
LOOK_SECONDS = 0.1  # between two looks at what the processes use
OTHERS = 1024  # tasks that this user's other programs may start while one runs
_NOT_STARTED = b"\x1e"
_PSS = re.compile(rb"^Pss: +(\d+) kB", re.MULTILINE)


def main(told: str) -> NoReturn:
    """Run `told["command"]` in `told["folder"]`; the last line of standard error says how it ended:
    `status` and `late`, and `failed`, why the program never ran, where it did not.

    SIGTERM ends it with everything below, and so does the end of the process above.
    """
    limits = json.loads(told)
    command: list[str] = limits["command"]
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _held(limits)
            os.chdir(limits["folder"])
            if limits["wrapped"]:  # bwrap keeps it from the program
                os.set_inheritable(said, True)
                command[1:1] = ["--json-status-fd", str(said)]
            os.execvpe(command[0], command, os.environ)
        except BaseException as error:  # noqa: BLE001 - said to the parent; this process ends here
            os.write(said, _NOT_STARTED + f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(1)
    os.close(said)

    def end(_: int, __: FrameType | None) -> None:
        kill_all(child)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the end of one that was ended, not failed
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    status, ended = _waited(child, limits)
    kill_all(child)
    code = os.waitstatus_to_exitcode(status)
    report: dict[str, Any] = {"status": code, "late": ended == "time" or code == -signal.SIGXCPU}
    if not ended:
        report["failed"] = _failed(heard, limits["wrapped"], code)
    os.write(2, b"\x1e" + json.dumps(report).encode())
    os._exit(0)


def _failed(heard: int, wrapped: bool, code: int) -> str:
    """Why the program never ran, by what its process and bwrap have said; empty where it ran."""
    os.set_blocking(heard, False)
    try:
        said = os.read(heard, 2**16)
    except BlockingIOError:
        said = b""
    if _NOT_STARTED in said:
        return said.rpartition(_NOT_STARTED)[2].decode(errors="replace")
    if wrapped and b'"exit-code"' not in said:  # which it says of every program that it started
        return f"bwrap ended with {code} and ran nothing"
    return ""


def _waited(child: int, limits: dict[str, Any]) -> tuple[int, str]:
    """The wait status of `child`, and the limit for which it was ended here: "time" for that of the
    clock or of the processor, "processes", "files", "memory" or ""."""
    deadline = time.monotonic() + limits["wall_s"]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found == child:
            return status, ""
        left = deadline - time.monotonic()
        over = "time" if left <= 0 else _over(_started(), limits)
        if over:
            os.killpg(child, signal.SIGKILL)  # bwrap, whose end is that of all below it
            return os.waitpid(child, 0)[1], over
        signal.sigtimedwait({signal.SIGCHLD}, min(left, LOOK_SECONDS))


def _started() -> list[int]:
    """The processes below this one, as the kernel lists each one's own: a table of all of them may
    have many thousands of others. One that starts or ends just now may be left out."""
    own = f"/proc/self/task/{os.getpid()}/children"
    if not os.path.exists(own):  # of a kernel without CONFIG_PROC_CHILDREN
        return below(os.getpid())
    found = dict.fromkeys(map(int, _read(own).split()))  # none twice, though its parent has ended
    ahead = list(found)
    while ahead:
        process = ahead.pop()
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{process}/task"):
                listed = map(int, _read(f"/proc/{process}/task/{task}/children").split())
                new = [child for child in listed if child not in found]
                found |= dict.fromkeys(new)
                ahead += new
    return list(found)


def _over(processes: list[int], limits: dict[str, Any]) -> str:
    """The limit over which `processes` are together; empty for none.

    The kernel's limits are of one process each, and its limit of processes is not for root.
    """
    cpu, pages = 0, 0
    for process in processes:
        fields = _read(f"/proc/{process}/stat").rpartition(b")")[2].split()
        if fields:
            cpu += sum(map(int, fields[11:15]))  # its own, and of children that it has waited for
            pages += int(fields[21])
    if cpu / os.sysconf("SC_CLK_TCK") > _cpu_seconds(limits):
        return "time"
    if limits["held"] and len(processes) > limits["processes"]:
        return "processes"
    most = limits["memory_mib"] * MIB
    if limits["held"] and _more_on_disk(limits["folder"], most):
        return "files"
    if limits["held"] and pages * os.sysconf("SC_PAGE_SIZE") > most:
        # Each page that several share is in the number above as often; here it is once in all.
        shares = (_read(f"/proc/{process}/smaps_rollup") for process in processes)
        if sum(int(found[1]) for found in map(_PSS.search, shares) if found) * 1024 > most:
            return "memory"
    return ""


def _more_on_disk(folder: str, most: int) -> bool:
    """Whether what lies in `folder` takes more than `most` bytes: the kernel's limit is of one
    file. Each counts as one block at least, so that their number has an end too."""
    taken, ahead = 0, [folder]
    while ahead:
        with contextlib.suppress(OSError), os.scandir(ahead.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # it is gone
                    taken += max(entry.stat(follow_symlinks=False).st_blocks * 512, BLOCK)
                    if taken > most:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        ahead.append(entry.path)
    return False


def _read(path: str) -> bytes:
    """What a file of /proc holds; nothing where its process has ended."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _cpu_seconds(limits: dict[str, Any]) -> int:
    return max(1, round(limits["cpu_s"]))


def _held(limits: dict[str, Any]) -> None:
    """Bound this process and what it starts, for good."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    cpu = _cpu_seconds(limits)
    _bound(resource.RLIMIT_CPU, cpu, cpu + 1)
    _bound(resource.RLIMIT_CORE, 0)
    if limits["held"]:
        _bound(resource.RLIMIT_AS, limits["memory_mib"] * MIB)
        _bound(resource.RLIMIT_FSIZE, limits["file_mib"] * MIB)
        _bound(resource.RLIMIT_NOFILE, 256)
        # Far off, for it counts what others start meanwhile too; `_waited` holds the limit itself.
        _bound(resource.RLIMIT_NPROC, _tasks() + limits["processes"] + OTHERS)


def _bound(kind: int, soft: int, hard: int | None = None) -> None:
    """Set a limit, or leave the machine's where that is lower: nobody but root may raise it."""
    there = resource.getrlimit(kind)[1]
    top = sys.maxsize if there == resource.RLIM_INFINITY else there
    resource.setrlimit(kind, (min(soft, top), min(hard or soft, top)))


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
