"""Processes that end with another one, whatever ended it.

vLLM runs its engine in processes of its own, which a kill -9 of the rollout actor would leave
behind with their memory.
"""

from __future__ import annotations

import os
import select
import threading


def end_with(pid: int) -> None:
    """End this process, at once, when process `pid` of this machine has ended (Linux)."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=wait, name=f"end-with-{pid}", daemon=True).start()
