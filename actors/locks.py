"""Locks on files between processes, which end with their holder however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class NoLocks(OSError):
    """The file system has no such locks; the message names it, and how it gets them."""


def locked(descriptor: int, path: Path) -> bool:
    """Whether the open file at `path` is this process's alone now; False where another has it.

    Raises NoLocks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NoLocks(
            f"the file system {_file_system(path)} does not lock files ({error.strerror}); mount "
            "it with locks (of Lustre: -o flock)"
        ) from error
    return True


def _file_system(path: Path) -> str:
    """Where the file system of `path` is mounted, and its type where that is known."""
    import psutil  # costs a start that needs none

    resolved = path.resolve()
    mount = next(str(place) for place in (resolved, *resolved.parents) if os.path.ismount(place))
    types = [part.fstype for part in psutil.disk_partitions(all=True) if part.mountpoint == mount]
    return f"{mount} ({types[-1]})" if types else mount
