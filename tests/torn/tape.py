"""Writes down every operation that code of this process does on files below a folder, and can make
one of them fail.

What Python does through `open`, `os` and `shutil` is seen; other libraries' own C code is not.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock


@dataclass(frozen=True)
class Op:
    """One operation. `handle` tells an open file; paths are relative to the folder."""

    kind: str  # open, write, truncate, fsync, rename, mkdir, unlink, rmdir
    path: str = ""
    to: str = ""  # of a rename
    handle: int = 0
    at: int = 0  # where a write begins, or the size that a truncation leaves
    data: bytes = b""
    empties: bool = False  # an `open` that cuts the file to nothing


Fault = Callable[[int, Op], int | None]
"""Given the operation's number and itself: raises OSError, or says how many bytes are written."""


class Tape:
    """The operations below `root`, in order."""

    def __init__(self, root: Path, fault: Fault = lambda number, op: None) -> None:
        self.root = root
        self.ops: list[Op] = []
        self._prefix = str(root) + os.sep
        self._fault = fault
        self._tried = 0
        self._lock = threading.RLock()
        self._handles = 0

    def inside(self, path: Any) -> str | None:
        """`path` as it is written down; None where it is elsewhere."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        text = os.path.abspath(os.fspath(path))
        if text == str(self.root):
            return "."
        return text.removeprefix(self._prefix) if text.startswith(self._prefix) else None

    def do(self, op: Op, act: Callable[[int | None], Any]) -> Any:
        """Do an operation and write it down, or fail as it is to."""
        with self._lock:
            self._tried += 1
            allowed = self._fault(self._tried, op)
            done = act(allowed)
            if op.kind == "write":
                op = Op("write", op.path, handle=op.handle, at=op.at, data=op.data[:done])
            self.ops.append(op)
            return done

    def handle(self) -> int:
        """A new number."""
        with self._lock:
            self._handles += 1
            return self._handles


class _File(io.FileIO):
    """A file that is written to."""

    def __init__(self, tape: Tape, name: str, path: Any, mode: str) -> None:
        self._tape, self._path, self._number = tape, name, tape.handle()
        op = Op("open", name, handle=self._number, empties="w" in mode)
        tape.do(op, lambda _: super(_File, self).__init__(path, mode))

    def write(self, data: Any) -> int:
        content = bytes(data)
        appends = "a" in self.mode
        at = os.fstat(self.fileno()).st_size if appends else self.tell()
        op = Op("write", self._path, handle=self._number, at=at, data=content)
        write = super().write
        done: int = self._tape.do(op, lambda n: write(content if n is None else content[:n]))
        return done

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        op = Op("truncate", self._path, handle=self._number, at=size)
        truncate = super().truncate
        done: int = self._tape.do(op, lambda _: truncate(size))
        return done


@contextmanager
def recording(tape: Tape) -> Iterator[Tape]:
    """What this process does below the folder of `tape` goes onto it."""
    real_open, real_fsync = builtins.open, os.fsync

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        writes = set(mode) & set("wax+")
        name = None if not writes or isinstance(file, int) else tape.inside(file)
        if name is None:
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _File(tape, name, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffer
        return io.TextIOWrapper(buffer, encoding, errors, newline)

    def named(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            name = tape.inside(path)
            if name is None:
                return real(path, *args, **options)
            return tape.do(Op(kind, name), lambda _: real(path, *args, **options))

        return call

    def rename(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, to: Any) -> Any:
            name, target = tape.inside(path), tape.inside(to)
            if name is None or target is None:
                return real(path, to)
            return tape.do(Op("rename", name, target), lambda _: real(path, to))

        return call

    def fsync(descriptor: int) -> None:
        name = tape.inside(descriptor)
        if name is None:
            real_fsync(descriptor)
        else:
            tape.do(Op("fsync", name), lambda _: None)  # no test waits for a real disk

    with (
        mock.patch.object(builtins, "open", opened),
        mock.patch.object(io, "open", opened),
        mock.patch.object(os, "fsync", fsync),
        mock.patch.object(os, "rename", rename(os.rename)),
        mock.patch.object(os, "replace", rename(os.replace)),
        mock.patch.object(os, "mkdir", named("mkdir", os.mkdir)),
        mock.patch.object(os, "unlink", named("unlink", os.unlink)),
        mock.patch.object(os, "rmdir", named("rmdir", os.rmdir)),
        mock.patch.object(shutil, "_use_fd_functions", False),
        mock.patch.object(shutil, "_USE_CP_SENDFILE", False),
    ):
        yield tape
