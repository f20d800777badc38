"""Python programs as forks of the session's server, which has imported what they would import."""

from __future__ import annotations

import os
import select
import signal
import time

from cluster.forks import ask, wire
from tests.conftest import STARTED

ENDED_WELL = "the program has ended well"


def said_by(script: str, *arguments: str, timeout: float = 240.0) -> str:
    """What `python -c script arguments` prints. Raises AssertionError where it does not end well.

    It starts in the environment of this session, and sets what it needs besides by itself.
    """
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    to_us = f"import os; os.dup2({theirs}, 1); os.dup2({theirs}, 2); os.close({theirs})\n"
    end = f"\nprint({ENDED_WELL!r}, flush=True)\nos._exit(0)\n"
    command = ["-c", to_us + script + end, *arguments]
    environment = {**STARTED, wire.SOCKET: "off"}
    process = ask.fork(os.environ[wire.SOCKET], command, environment, ray=False)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        deadline, said = time.monotonic() + timeout, b""
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (more := os.read(ours, 65536)):
                break
            said += more
        else:
            os.kill(process, signal.SIGKILL)
    text = said.decode(errors="replace")
    assert text.rstrip().endswith(ENDED_WELL), text[-3000:]
    return text
