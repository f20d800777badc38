"""multiprocessing's spawn in a fork: what it starts is forked from the server too, where it can be.

That is so where the target lies in a module that the server imports: vLLM's engine does. All else
starts as ever, and so does what cannot be forked, saying why. A process that was forked for another
ends with it, whatever ended that.
"""

from __future__ import annotations

import io
import os
import socket
import sys
from collections.abc import Collection, Mapping
from multiprocessing import popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from cluster.forks import agree, ask, wire

UNKNOWN = 255  # the exit code of one whose end nobody saw, as of multiprocessing's own fork server


class NotForked(Exception):
    """Why a process must start by itself."""


class Origin(NamedTuple):
    """Where this process was forked, and with what."""

    path: str
    of_ray: Mapping[str, str] | None
    environment: Mapping[str, str]
    modules: Collection[str]

    def command(self, environment: Mapping[str, str], **handles: int) -> list[str]:
        """The command line of a process of `environment`. Raises NotForked."""
        if changed := agree.changed(self.environment, environment):
            raise NotForked(f"{', '.join(changed)} changed since this process started")
        if os.fsdecode(spawn.get_executable()) != sys.executable:
            raise NotForked("it has an interpreter of its own")
        line = spawn.get_command_line(**handles)
        return line[line.index("-c") :]  # options before are those of the server too


_origin: Origin | None = None


def follow(of_ray: Mapping[str, str] | None, modules: Collection[str]) -> None:
    """Have this process, just forked, fork in its turn."""
    global _origin
    path = os.environ.get(wire.SOCKET, "off")
    if path != "off":
        _origin = Origin(path, of_ray, dict(os.environ), modules)
        popen_spawn_posix.Popen = Popen  # type: ignore[misc]


class Popen(popen_spawn_posix.Popen):
    """Stands in place of multiprocessing's own."""

    _end: socket.socket | None = None

    def _launch(self, process: BaseProcess) -> None:
        target = getattr(process, "_target", None)
        if _origin is None or getattr(target, "__module__", None) not in _origin.modules:
            super()._launch(process)  # type: ignore[misc]
            return
        try:
            data, to_child = self._forked(process, _origin)
        except (NotForked, OSError) as why:
            print(f"{process.name} imports for itself: {why}", file=sys.stderr, flush=True)
            self._fds: list[int] = []
            super()._launch(process)  # type: ignore[misc]
            return
        with open(to_child, "wb", closefd=False) as file:
            file.write(data)

    def _forked(self, process: BaseProcess, origin: Origin) -> tuple[bytes, int]:
        """Have it forked; what to say to it, and where. Raises where nothing runs then."""
        tracker = resource_tracker.getfd()
        assert tracker is not None, "it runs now"
        data = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process.name), data)
            reduction.dump(process, data)
        finally:
            set_spawning_popen(None)
        environment = dict(os.environ)
        theirs, ours = os.pipe()
        try:
            command = origin.command(environment, tracker_fd=tracker, pipe_handle=theirs)
            files = sorted({0, 1, 2, tracker, theirs, *self._fds})
            self.pid, end = ask.spawn(origin.path, command, environment, files, origin.of_ray)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._end, self.sentinel = end, end.fileno()
        # It reads to the end of `ours` later: who holds that is its parent.
        self.finalizer = util.Finalize(self, _closed, (end, ours))
        return data.getvalue(), ours

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        if self._end is None:
            return super().poll(flag)
        if self.returncode is None and wait([self._end], 0 if flag == os.WNOHANG else None):
            said = self._end.recv(64, socket.MSG_PEEK)  # it stays: a sentinel stays ready
            self.returncode = int(said) if said.endswith(b"\n") else UNKNOWN
        return self.returncode

    def _send_signal(self, sig: int) -> None:
        if self._end is None or self.poll() is None:
            super()._send_signal(sig)  # type: ignore[misc]


def _closed(end: socket.socket, to_child: int) -> None:
    end.close()
    os.close(to_child)
