"""Temporary folders that outlive no process for long, however it ends.

Invariant: a folder is locked as long as its owner lives, and the lock ends with the owner. Whoever
makes the first of its kind removes what dead owners have left: actors end by SIGKILL, which cleans
up nothing. Standard library only: a reward's child imports this.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from pathlib import Path
from weakref import finalize


class OwnedFolder:
    """A new folder in the temporary one, whose name begins with `prefix`; this process's own."""

    def __init__(self, prefix: str) -> None:
        _remove_left(prefix)
        made = None
        while made is None:  # another process may take it for one that was left
            made = _made(prefix)
        self.path, descriptor = made
        self._remove = finalize(self, _removed, self.path, descriptor, os.getpid())

    def remove(self) -> None:
        """Remove it with all that is in it, as the end of the interpreter does too."""
        self._remove()


def _made(prefix: str) -> tuple[str, int] | None:
    """A new folder and its descriptor, which holds the lock; None where it was removed before it
    was locked."""
    path = tempfile.mkdtemp(prefix=prefix)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    if _locked(descriptor) is False or not os.path.exists(path):
        os.close(descriptor)
        return None
    return path, descriptor


def _locked(descriptor: int) -> bool | None:
    """Whether this process has the lock now; None on a file system without locks, where folders
    that were left stay."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _removed(path: str, descriptor: int, owner: int) -> None:
    if os.getpid() == owner:  # and no fork of it that has come to its end
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


@functools.cache
def _remove_left(prefix: str) -> None:
    """Remove this user's folders of this kind that have no owner, once in a process."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # it is gone, or no folder
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.getuid() and _locked(descriptor):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
