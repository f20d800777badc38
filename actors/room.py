"""Whether something failed because this machine had no room: no process, thread, memory or open
file was left. That may pass, and says nothing of whoever it was for. Standard library only."""

from __future__ import annotations

import errno
import os

_NUMBERS = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE})
_NO_THREAD = "can't start new thread"  # of a RuntimeError: asyncio needs one for each process


def no_room(error: BaseException) -> bool:
    """Whether `error` says so."""
    return getattr(error, "errno", None) in _NUMBERS or _NO_THREAD in str(error)


def tells_no_room(text: str) -> bool:
    """Whether what another program has printed says so."""
    return any(os.strerror(number) in text for number in _NUMBERS)
