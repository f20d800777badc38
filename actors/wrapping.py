"""What a program under bubblewrap sees, as the beginning of its command.

A read-only mount keeps nobody from a socket that is a file: whoever connects to one of Ray's, or to
that of a server of processes, is out of the sandbox. So folders where such sockets lie are empty
inside, wherever this site has them. Standard library only: a reward's child imports this.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import PurePath

HOME = os.path.expanduser("~")
_HIDDEN = ("/home", "/root", "/run", "/mnt", "/media", "/srv")  # empty inside, where they are here
_OWN = ("/tmp", "/var/tmp", "/dev/shm")  # file systems in memory inside, which it may write to


def wrapped(
    program: str,
    scratch: str,
    shown: Sequence[str] = (),
    log: str | None = None,
    most: int | None = None,
    granted: Sequence[str] = (),
) -> list[str]:
    """The beginning of a command that runs under bubblewrap, and sees `shown` too.

    `most`: bytes that files in memory may take, in /tmp and in /dev/shm each; none elsewhere.
    `granted`: capabilities, over what is inside.
    """
    scratch, empty = os.path.realpath(scratch), hidden()
    needed = {sys.prefix, sys.base_prefix, sys.exec_prefix, *filter(os.path.exists, shown)}
    # A path may lead into a hidden folder by a link outside of it, which stays, or by its name.
    needed |= set(map(os.path.realpath, needed))
    covered = (*empty, "/tmp", "/var/tmp")
    inside = sorted(p for p in needed if any(_within(p, h) for h in covered))
    # bwrap cannot mount at a path with a link in it that is absolute.
    written = [scratch] if log is None else [scratch, os.path.realpath(log)]
    # What lies deeper comes later: it may be in a folder that is hidden, or in one that is shown.
    mounts: list[tuple[str, ...]] = [("--tmpfs", place) for place in empty]
    mounts += [("--ro-bind", place, place) for place in inside]
    mounts += [("--bind", place, place) for place in written]
    mounts += [
        ("--symlink", target, link)
        for link, target in _links(sys.executable)
        if any(_within(link, h) for h in covered) and not any(_within(link, p) for p in needed)
    ]
    mounts.sort(key=lambda mount: len(PurePath(mount[-1]).parts))
    size = [] if most is None else ["--size", str(most)]
    closed = ["/dev", "/var/tmp", *empty]
    # Root may write there, for the whole machine. For others nothing is put over a part of /proc:
    # the kernel would let none of them mount another one inside.
    kernel = ["--ro-bind-try", "/proc/sys", "/proc/sys"] if os.geteuid() == 0 else []
    return [
        program,
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--cap-drop", "ALL",
        *(part for name in granted for part in ("--cap-add", name)),
        "--ro-bind", "/", "/",
        "--dev", "/dev",
        *size, "--tmpfs", "/dev/shm",
        "--proc", "/proc",
        *kernel,
        *size, "--tmpfs", "/tmp",
        "--tmpfs", "/var/tmp",
        *(part for mount in mounts for part in mount),
        *(part for place in closed for part in ("--remount-ro", place)),
        "--chdir", scratch,
        "--",
    ]  # fmt: skip


def hidden() -> list[str]:
    """The folders of this machine that are empty inside, by their real paths: homes, mounts and
    temporary folders."""
    places = (*_HIDDEN, HOME, tempfile.gettempdir(), os.environ.get("RAY_TMPDIR", ""))
    real = dict.fromkeys(os.path.realpath(place) for place in places if place)
    return [p for p in real if os.path.isdir(p) and p not in (*_OWN, "/")]


def _links(path: str) -> Iterator[tuple[str, str]]:
    """The links that lead from `path` to a file, one to the next, each with where it leads to. A
    virtual environment's Python may be a link to one in somebody's home."""
    while os.path.islink(path):
        target = os.readlink(path)
        yield path, target
        path = os.path.normpath(os.path.join(os.path.dirname(path), target))


def _within(place: str, folder: str) -> bool:
    return place.startswith(f"{folder}/")
