"""Programs that tests start: as forks of the process that has imported for all, where there is one.

A program that is forked has used no processor time for its imports. Where it cannot be forked, or
Linux tells its exit code to its parent alone (before 6.15), it starts as Python starts it.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from cluster.forks import ask, wire

_GET_INFO = 0xC040FF0B  # ioctl PIDFD_GET_INFO with 64 bytes
_EXIT = 8  # PIDFD_INFO_EXIT
_EXIT_CODE_AT = 60


class Forked:
    """A program that is no child of this process, with what `subprocess.Popen` has."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._file = os.pidfd_open(pid)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and (status := _status(self._file)) is not None:
            self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                assert timeout is not None
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            if select.select([self._file], [], [], left)[0]:
                time.sleep(0.002)  # until its parent has taken note
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            signal.pidfd_send_signal(self._file, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def __del__(self) -> None:
        os.close(self._file)


def start(
    line: Sequence[str],
    *,
    env: Mapping[str, str],
    output: IO[bytes],
    errors: IO[bytes] | None = None,
    given: IO[bytes] | None = None,
    cwd: Path | None = None,
    exact: bool = True,
) -> Forked | subprocess.Popen[bytes]:
    """`python LINE`, which prints into `output` and reads `given`; errors go there too, without a
    place of their own. Not `exact`, its environment has what the imports of a fork have set, as
    where it has imported: what it spawns may be forked then."""
    errors = errors or output
    if env.get(wire.SOCKET, "off") != "off" and _tells_exit_codes():
        with open(os.devnull, "rb") as nothing:
            files = {0: (given or nothing).fileno(), 1: output.fileno(), 2: errors.fileno()}
            try:
                own = {"files": files, "folder": cwd, "exact": exact}
                return Forked(ask.fork(env[wire.SOCKET], list(line), dict(env), ray=True, **own))
            except OSError as why:
                print(f"a program imports for itself: {why}")
    return subprocess.Popen(
        [sys.executable, *line],
        env=dict(env),
        stdin=given or subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        cwd=cwd,
    )


def run(
    line: Sequence[str],
    *,
    env: Mapping[str, str],
    timeout: float,
    cwd: Path | None = None,
    given: str = "",
    exact: bool = True,
) -> subprocess.CompletedProcess[str]:
    """`python LINE` to its end. Raises subprocess.TimeoutExpired, and it is killed."""
    with (
        tempfile.TemporaryFile() as said,
        tempfile.TemporaryFile() as errors,
        tempfile.TemporaryFile() as asked,
    ):
        asked.write(given.encode())
        asked.seek(0)
        process = start(
            line, env=env, output=said, errors=errors, given=asked, cwd=cwd, exact=exact
        )
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        texts = []
        for file in (said, errors):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(list(line), code, *texts)


def _status(file: int) -> int | None:
    """The wait status of a process that has ended and that its parent knows of; or None."""
    info = bytearray(64)
    struct.pack_into("Q", info, 0, _EXIT)
    fcntl.ioctl(file, _GET_INFO, info)
    (found,) = struct.unpack_from("Q", info, 0)
    return struct.unpack_from("i", info, _EXIT_CODE_AT)[0] if found & _EXIT else None


def _tells_exit_codes() -> bool:
    """Whether any process may ask for another's exit code here."""
    version = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
    return sys.platform == "linux" and version >= (6, 15)
