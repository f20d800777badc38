"""A fork becomes a program of its own, as if Python had been started for it; imports are done."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import multiprocessing.process
import multiprocessing.util
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.forks import spawned, threads, wire
from cluster.forks.ask import BADNESS, badness

PLACE = "the folder of the script"  # stands in `sys.path` for it, until there is one
_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP)


class Become(BaseException):
    """Unwinds a fork from the server's loop; `run` is what it is from now on."""

    def __init__(self, run: Callable[[], None]) -> None:
        super().__init__()
        self.run = run


def prepare(
    request: dict[str, Any],
    files: Sequence[int],
    asker: socket.socket,
    own: Sequence[Any],
    modules: Collection[str],
) -> NoReturn:
    """Put everything in place as the request says, and raise Become once the asker says go.

    `own` are the server's descriptors, `modules` what it imports.
    """
    try:
        asker_file = _in_place(files, request, asker, own)
        os.setsid()
        _apply(request)
        spawned.follow(request["of_ray"], modules)
        with socket.socket(fileno=asker_file) as answered:
            answered.settimeout(30.0)
            answered.sendall(b"%s %d\n" % (wire.READY, os.getpid()))
            if wire.line(answered) != wire.GO:
                os._exit(0)  # it was too late: the asker has started the program by itself
            if request["spawned"]:
                answered.detach()  # it closes with this process
    except BaseException as error:  # noqa: BLE001 - a half-made process must never run on
        with contextlib.suppress(BaseException):
            print(f"a fork was given up: {type(error).__name__}: {error}", flush=True)
        os._exit(1)
    raise Become(lambda: _to_its_end(request["command"], request["spawned"]))


def _in_place(
    files: Sequence[int], request: dict[str, Any], asker: socket.socket, own: Sequence[Any]
) -> int:
    """Give each received file its number, close the server's, and return the asker's new number."""
    wanted = request["files"]
    above = max([*files, *wanted, asker.fileno()]) + 1
    moved = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, above) for file in files]
    answered = fcntl.fcntl(asker.fileno(), fcntl.F_DUPFD_CLOEXEC, above)
    for file in (*files, asker, *own):
        if isinstance(file, int):
            if file > 2:
                os.close(file)
        else:
            file.close()
    for number, file in zip(wanted, moved, strict=True):
        if number <= 2 or not _is_open(number) or os.path.sameopenfile(number, file):
            os.dup2(file, number, inheritable=True)
            os.close(file)
        elif request["spawned"]:  # it is told of its files by their numbers
            raise OSError(f"an import holds file {number}")
        else:  # an import holds that number: the file stays open under another one
            os.set_inheritable(file, True)
    return answered


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _apply(request: dict[str, Any]) -> None:
    signal.set_wakeup_fd(-1)
    for name in _SIGNALS:
        signal.signal(name, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.umask(request["umask"])
    for name, limits in request["limits"].items():
        kind = getattr(resource, name)
        if tuple(limits) != resource.getrlimit(kind):
            resource.setrlimit(kind, tuple(limits))
    if request["nice"] != os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, request["nice"])
    if request["processors"] != sorted(os.sched_getaffinity(0)):
        os.sched_setaffinity(0, request["processors"])
    if request["badness"] > badness():
        Path(BADNESS).write_text(str(request["badness"]))
    os.chdir(request["folder"])
    was = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(request["environment"])
    number = os.environ.get("OMP_NUM_THREADS")
    if number is not None and number != was:
        threads.limit(int(number))
    if request["spawned"]:
        threads.follow(os.environ)
    tempfile.tempdir = None
    multiprocessing.process.current_process().authkey = os.urandom(32)
    # Python's own is seeded anew at a fork; forks must not draw the same numbers.
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = _output(1, unbuffered)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _output(2, True)  # type: ignore[misc]


def _output(number: int, line_buffering: bool) -> Any:
    file = open(number, "w", closefd=False, errors="backslashreplace" if number == 2 else None)  # noqa: SIM115
    file.reconfigure(line_buffering=line_buffering or os.isatty(number))
    return file


def _to_its_end(command: list[str], spawned: bool) -> NoReturn:
    """Run a program, and end as Python does, but for what was imported for all: to take that down
    costs seconds, and a library whose threads stayed with the server would wait for them for ever.
    What multiprocessing has `spawned` has waited for its threads and cleaned up by then.
    """
    code = 1
    try:
        code = _code_of(command)
        if not spawned:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
    finally:
        multiprocessing.util._flush_std_streams()  # type: ignore[attr-defined]
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code & 0xFF)


def _code_of(command: list[str]) -> int:
    """Run it; its exit code, less than 0 where it ends by a signal."""
    try:
        _run(command)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001 - printed, and said by the end
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _run(command: list[str]) -> None:
    """Run a Python command line (`script ...`, `-m module ...`, `-c code ...`) as `__main__`."""
    first, *rest = command
    where = sys.path.index(PLACE)
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[where] = ""
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = rest
        sys.path[where] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[where] = os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")
