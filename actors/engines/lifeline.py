"""Processes that end with another one, whatever ended it, and whether processes do anything.

vLLM runs its engine in processes of its own, which a kill -9 of the rollout actor would leave
behind with their memory, and which answer nothing while they work at one thing.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Sequence

import psutil

from actors.children.keeper import PR_SET_PDEATHSIG, prctl

_NO_MORE = (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
_IDLE = 0.1
"""Processor seconds a second of one process that are no work. A vLLM engine on CPU, idle or hung
amid a call, uses 0.02, or each of its workers does: they poll."""


def end_with(pid: int) -> None:
    """End this process, at once, when process `pid` of this machine has ended (Linux).

    One that is stopped then goes on first, as soon as its parent has ended.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=wait, name=f"end-with-{pid}", daemon=True).start()
    prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def work_of(processes: Sequence[int]) -> Callable[[], bool]:
    """What says, from outside, whether `processes` have worked since now: one of them has used
    more processor time than an idle one does, and none is stopped or gone."""

    def used() -> list[float] | None:
        try:
            seen = [psutil.Process(pid) for pid in processes]
            if any(one.status() in _NO_MORE for one in seen):
                return None
            return [sum(one.cpu_times()[:2]) for one in seen]
        except psutil.NoSuchProcess:
            return None

    began, before = time.monotonic(), used()

    def worked() -> bool:
        now, seconds = used(), time.monotonic() - began
        if before is None or now is None:
            return False
        return any(new - old > _IDLE * seconds for old, new in zip(before, now, strict=True))

    return worked
