"""Work with a limit of processor time that holds whatever is being computed, in C too.

Invariant: whether a piece of work is too much depends on the processor time it takes, not on what
else the machine does. It is done in a fork of this process, which the kernel ends at the limit.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

MEMORY_BYTES = 4 * 2**30  # that the work may take beside what this process has

_READY, _NOTHING, _NO, _YES = b"r", b"n", b"0", b"1"


class TooSlow(RuntimeError):
    """What all items are judged by was not made within its limit."""


def judged(
    make: Callable[[], Any],
    judge: Callable[[Any, Any], bool],
    items: Sequence[Any],
    make_seconds: float,
    judge_seconds: float,
) -> list[bool] | None:
    """`judge(made, item)` of each item, False where it takes more than `judge_seconds` of processor
    time or ends its process; None where `make()` gives None.

    Raises:
        TooSlow: `make` takes more than `make_seconds`.
        RuntimeError: the work failed otherwise.
    """
    verdicts: list[bool] = []
    while True:
        said, ended = _in_a_fork(make, judge, items[len(verdicts) :], make_seconds, judge_seconds)
        if said[:1] == _NOTHING:
            return None
        if ended == signal.SIGPROF and not said:
            raise TooSlow(f"not read within {make_seconds:g} s of processor time")
        if ended == signal.SIGKILL or (ended and not said) or ended < 0:
            raise RuntimeError(f"the process that compares answers ended ({ended})")
        verdicts += [verdict == ord(_YES) for verdict in said[1:]]
        if ended:
            verdicts.append(False)
        if len(verdicts) == len(items):
            return verdicts


def _in_a_fork(
    make: Callable[[], Any],
    judge: Callable[[Any, Any], bool],
    items: Sequence[Any],
    make_seconds: float,
    judge_seconds: float,
) -> tuple[bytes, int]:
    """What the fork said, and the signal that ended it: 0 for none, below 0 for an exit status."""
    heard, saying = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(heard)
        _work(make, judge, items, make_seconds, judge_seconds, saying)
    os.close(saying)
    said = b""
    while data := os.read(heard, 4096):
        said += data
    os.close(heard)
    _, status = os.waitpid(worker, 0)
    return said, -os.waitstatus_to_exitcode(status)


def _work(
    make: Callable[[], Any],
    judge: Callable[[Any, Any], bool],
    items: Sequence[Any],
    make_seconds: float,
    judge_seconds: float,
    saying: int,
) -> NoReturn:
    try:
        _limit_memory()
        for number in (signal.SIGPROF, signal.SIGTERM):  # each ends the process, not what it
            signal.signal(number, signal.SIG_DFL)  # was forked from had set for it
        signal.setitimer(signal.ITIMER_PROF, make_seconds)
        made = make()
        os.write(saying, _NOTHING if made is None else _READY)
        for item in items if made is not None else ():
            signal.setitimer(signal.ITIMER_PROF, judge_seconds)
            os.write(saying, _YES if judge(made, item) else _NO)
    except BaseException:  # noqa: BLE001 - printed, and said by the exit status
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        if most == resource.RLIM_INFINITY or limit < most:
            resource.setrlimit(resource.RLIMIT_AS, (limit, most))
