"""Keeps the processes of one episode from those of every other, inside the sandbox that all are in.

An episode has a folder of its own: its processes begin there, and it is their home and their place
for temporary files. Where the sandbox lets its server make namespaces, they see no other folder, no
other process and no other port either, and `/tmp`, `/var/tmp` and `/dev/shm` are their own too.
Invariant: what runs after `enter` has no capability left to undo that. Linux only, standard library
only.

`leave` runs in the keeper and `enter` in the process that it forks next: a process namespace is for
those that are forked after it was made, and ends with the first of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import socket
import struct
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NAME_BYTES = 16  # of the name of an episode's folder
SHARED_MEMORY = "size=1g,mode=1777"  # of /dev/shm
_PARTS = {"home": "", "tmp": "/tmp", "var": "/var/tmp"}  # of the folder, and where each is put
_NEW_MOUNTS, _NEW_IPC, _NEW_PROCESSES, _NEW_NETWORK = 0x20000, 0x8000000, 0x20000000, 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_PROGRAMS = 1, 2, 4, 8
_AGAIN, _BIND, _WITH_ALL_BELOW = 32, 4096, 16384
_OF_THE_KERNEL = ("sys", "sysrq-trigger", "irq", "bus")  # of /proc: root may write there
_SET_FLAGS, _UP = 0x8914, 1  # of a network interface
_THIRD_VERSION = 0x20080522  # of the capabilities' layout


@dataclass(frozen=True)
class Place:
    """Where the processes of one episode run."""

    scratch: str  # the folder that the sandbox may write to
    name: str  # of the episode's own folder in it
    alone: bool  # they have namespaces of their own
    wrapped: bool = True  # in the sandbox, whose server has what it takes to make namespaces
    log: str | None = None  # a file of all episodes, which they are not to read


def make(scratch: str, name: str) -> None:
    """Make the folder of a place. Raises OSError."""
    for part in _PARTS:
        os.makedirs(os.path.join(scratch, name, part))


def leave() -> None:
    """Have what this process forks next see no process, no port and no shared memory but its own.

    Raises OSError where that is not allowed.
    """
    _call("unshare", _NEW_PROCESSES | _NEW_IPC | _NEW_NETWORK)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # 127.0.0.1 is there
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh22x", b"lo", _UP))


def enter(place: Place) -> None:
    """Make `place` all that this process sees and may write to, and begin in it; where it is not
    alone, just begin in it. Raises OSError."""
    home = os.path.join(place.scratch, place.name, "home")
    if place.alone:
        home = place.scratch
        _cover(place)
    if place.wrapped:
        _call("capset", struct.pack("Ii", _THIRD_VERSION, 0), bytes(24))
    os.environ.update(HOME=home, TMPDIR=home)
    tempfile.tempdir = None
    os.chdir(home)


def possible(scratch: str) -> bool:
    """Whether `leave` and `enter` work here, tried in processes of their own; says where not."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        name = os.path.basename(folder)
        make(scratch, name)

        def both() -> None:
            leave()
            if not _works(lambda: enter(Place(scratch, name, alone=True))):
                raise PermissionError("the folders of an episode cannot be mounted")

        return _works(both)


def _works(what: Callable[[], None]) -> bool:
    """Whether `what` raises nothing, in a fork."""
    child = os.fork()
    if child == 0:
        try:
            what()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - printed, and said by the exit status
            traceback.print_exc()
        os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _cover(place: Place) -> None:
    """Put the place's own folders over what all episodes share, in mounts of this process's."""
    _call("unshare", _NEW_MOUNTS)
    with contextlib.ExitStack() as held:

        def hold(path: str) -> int:
            """It stays within reach when something is put over it."""
            descriptor = os.open(path, os.O_PATH)
            held.callback(os.close, descriptor)
            return descriptor

        own = {part: hold(os.path.join(place.scratch, place.name, part)) for part in _PARTS}
        kept = {}
        for path in _mounts():  # such as a project of the user's that lies in /tmp
            if path.startswith(("/tmp/", "/var/tmp/")) and path not in (place.scratch, place.log):
                with contextlib.suppress(FileNotFoundError):  # another mount is over it
                    kept[path] = hold(path)
        for part, target in _PARTS.items():
            if target:
                _bind(own[part], target)
        for path, descriptor in kept.items():
            _bind(descriptor, path)
        _bind(own["home"], place.scratch)
    _mount("tmpfs", "/dev/shm", "tmpfs", _NO_SUID | _NO_DEVICES, SHARED_MEMORY)
    if place.log is not None and os.path.exists(place.log):
        _mount("/dev/null", place.log, None, _BIND)
    quiet = _NO_SUID | _NO_DEVICES | _NO_PROGRAMS
    _mount("proc", "/proc", "proc", quiet)
    for path in (f"/proc/{name}" for name in _OF_THE_KERNEL):
        if os.path.exists(path):
            _mount(path, path, None, _BIND)
            _mount(None, path, None, _AGAIN | _BIND | _READ_ONLY | quiet)


def _mounts() -> list[str]:
    """Where something is mounted, in the order in which it was."""
    lines = os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines()
    return [
        re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in lines
    ]


def _bind(descriptor: int, target: str) -> None:
    """Have the file or folder `descriptor` at `target` too."""
    source = f"/proc/self/fd/{descriptor}"
    if not os.path.exists(target):
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            Path(target).touch()
    _mount(source, target, None, _BIND | _WITH_ALL_BELOW)


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    texts = (source, target, kind, options)
    of, at, by, told = (text if text is None else os.fsencode(text) for text in texts)
    _call("mount", of, at, by, ctypes.c_ulong(flags), told)


def _call(name: str, *arguments: object) -> None:
    """A function of the C library that answers 0. Raises OSError."""
    if getattr(_library(), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
