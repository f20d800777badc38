"""Programs that nobody has read, such as a model's, run where they can do little: `run`; and
processes of the user's code, where the user wants that: `held`.

With bubblewrap: no network, a read-only root without home folders, a scratch folder, its own
process numbers. Without it: limits alone, and what this user may read and reach, the program may
too. Either way its own environment holds no secret, CPU time, memory, processes, files and output
are bounded, and all that the program started ends with it.
Standard library only: a reward's child imports this.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from actors import wrapping
from actors.room import no_room, tells_no_room
from actors.scratch import OwnedFolder

Mode = Literal["auto", "required", "off"]
VARIABLE = "ALIGNTUNE_SANDBOX"
"""Holds the mode in the processes that an actor starts for user code."""

CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_NET_ADMIN")
"""What a process needs to make namespaces inside a sandbox; none outside of it."""

_NOTHING = (sys.executable, "-I", "-S", "-c", "")  # what programs need most must be there inside
_RUNNER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from actors.sandbox_runner import main; main(sys.argv[2])"
)
START_SECONDS = 10.0  # for the runner beside the program's own time
TRY_SECONDS = 20.0  # for the first uses of bwrap


class SandboxMissing(RuntimeError):
    """There can be no sandbox as it is wanted: `required`, and bubblewrap is not here or may not
    work, or it would hide nothing. The message says why."""


class SandboxFailed(RuntimeError):
    """The program was never run, so that its end says nothing of it. The message says why."""


class SandboxBusy(SandboxFailed):
    """The machine had no process, memory or open file left for it. That may pass."""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_s: float = 5.0
    wall_s: float = 30.0  # for one that sleeps; a busy one ends by its CPU time
    memory_mib: int = 1024
    processes: int = 64
    file_mib: int = 16
    output_kib: int = 256


@dataclass(frozen=True)
class Ran:
    """How a program ended. `status` is its exit code, negative for a signal."""

    status: int
    stdout: bytes
    stderr: bytes
    over: Literal["", "time", "output"] = ""  # the limit that ended it, where `run` did

    @property
    def well(self) -> bool:
        """Whether it ended by itself, with exit code 0."""
        return self.status == 0 and not self.over


Answer = Callable[[bytes], bytes | None]
"""What a program is told for a line that it has written to standard output; None: nothing more."""


def mode_here() -> Mode:
    """The mode that the actor has set for this process; auto where none has."""
    said = os.environ.get(VARIABLE, "auto")
    return "required" if said == "required" else "off" if said == "off" else "auto"


@functools.cache
def bubblewrap() -> tuple[str | None, str]:
    """The program bwrap, where it works here, and else why not.

    Raises SandboxBusy where that cannot be told now; the next call asks again.
    """
    program = shutil.which("bwrap")
    if program is None:
        return None, "bwrap is not installed (package bubblewrap)"
    with tempfile.TemporaryDirectory(prefix="aligntune-") as scratch:
        try:
            before = wrapping.wrapped(program, scratch)[1:]
            done = _tried([program, "--json-status-fd", "2", *before, *_NOTHING])
        except OSError as error:
            return None, f"bwrap does not work here: {error}"
    if done.returncode:
        return None, f"bwrap does not work here: {done.stderr.decode(errors='replace').strip()}"
    return program, ""


def _tried(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """How a first use of bwrap ended. What is kept for the life of the process must not hang on
    what the machine had left at that moment: SandboxBusy says that nothing is known."""
    try:
        with _busy_without_room():
            done = subprocess.run(command, capture_output=True, timeout=TRY_SECONDS, check=False)
    except subprocess.TimeoutExpired as late:
        raise SandboxBusy(f"bwrap has not ended within {TRY_SECONDS:g} s") from late
    said = done.stderr.decode(errors="replace")
    if done.returncode and tells_no_room(said):
        raise SandboxBusy(f"bwrap could not be started: {said.strip()}")
    return done


@contextlib.contextmanager
def _busy_without_room() -> Iterator[None]:
    """SandboxBusy for what is raised where the machine has no room for a process."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if no_room(error):
            raise SandboxBusy(f"no process could be started: {error}") from error
        raise


@functools.cache
def _grants(program: str) -> tuple[str, ...]:
    """`CAPABILITIES` where bwrap gives them to what it starts; it does not where it is setuid."""
    with tempfile.TemporaryDirectory(prefix="aligntune-") as scratch:
        done = _tried([*wrapping.wrapped(program, scratch, granted=CAPABILITIES), *_NOTHING])
    return () if done.returncode else CAPABILITIES


@functools.cache
def _sizes(program: str) -> bool:
    """Whether this version of bwrap bounds a file system in memory."""
    return b"--size" in _tried([program, "--help"]).stdout


def in_force(mode: Mode, key: str = "reward.sandbox") -> str:
    """What holds programs in `mode` on this machine, for a person; `key` is the mode's setting.

    Raises SandboxMissing, and SandboxBusy where that cannot be told now.
    """
    if mode == "off":
        return "off"
    program, why = bubblewrap()
    if program is not None:
        return "bubblewrap" if _sizes(program) else "bubblewrap (too old to bound files in memory)"
    if mode == "required":
        raise SandboxMissing(f"{key} is required, and {why}; install it, or set auto")
    return f"limits alone, with the network and all that this user may read ({why})"


@dataclass(frozen=True)
class Held:
    """How a process is started: what stands before its command, and its environment."""

    before: tuple[str, ...] = ()
    environment: Mapping[str, str] | None = None  # None: that of this process


def held(mode: Mode, key: str, scratch: str, imports: Sequence[str], log: str | None) -> Held:
    """A process that runs the user's code as `run` runs programs, without its limits. It sees the
    folders that it `imports` from too, writes to `scratch` and `log`, and has `CAPABILITIES` where
    bwrap gives them, by which it keeps its own processes apart.

    Raises SandboxMissing, SandboxFailed.
    """
    in_force(mode, key)
    if mode == "off":
        return Held()
    program = bubblewrap()[0]
    if program is None:
        return Held((), _environment(scratch))
    shown = [os.path.abspath(place) for place in (*imports, str(Path(__file__).parents[1]))]
    home, empty = Path(wrapping.HOME), wrapping.hidden()
    if whole := [p for p in shown if home.is_relative_to(p) or os.path.realpath(p) in empty]:
        what = "holds the home folder" if home.is_relative_to(whole[0]) else "is for others' files"
        raise SandboxMissing(
            f"{key} is {mode}, and {whole[0]}, which the user's code is imported from, {what}, "
            "which would be seen whole; start in a folder of the project's own"
        )
    if log is not None:
        Path(log).touch()
    before = wrapping.wrapped(program, scratch, shown, log, granted=_grants(program))
    return Held(tuple(before), _environment(scratch))


async def run(
    command: Sequence[str],
    *,
    files: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    answer: Answer | None = None,
    limits: Limits | None = None,
    mode: Mode | None = None,
) -> Ran:
    """Run `command` in a scratch folder that holds `files`, to its end or to a limit.

    With `answer` its standard input stays open after `stdin` and has what that returns, until it
    returns None. Cancelling ends it with all that it has started.

    Raises:
        SandboxMissing: as the mode says.
        SandboxFailed: `command` could not be started; SandboxBusy where that may pass.
    """
    mode, limits = mode or mode_here(), limits or Limits()
    in_force(mode)
    program = None if mode == "off" else bubblewrap()[0]
    with _busy_without_room():
        folder = await asyncio.to_thread(_scratch, files or {})
    scratch = folder.path
    try:
        most = limits.memory_mib * 2**20 if program and _sizes(program) else None
        before = wrapping.wrapped(program, scratch, most=most) if program else []
        told = {"command": [*before, *command], "folder": scratch, "wrapped": program is not None}
        return await _run(told | {"held": mode != "off"}, scratch, stdin, limits, answer)
    finally:
        try:
            await asyncio.to_thread(folder.remove)
        except RuntimeError:  # no thread can be started
            folder.remove()


def _scratch(files: Mapping[str, str]) -> OwnedFolder:
    folder = OwnedFolder("aligntune-code-")
    for name, text in files.items():
        (Path(folder.path) / name).write_text(text, encoding="utf-8", errors="replace")
    return folder


async def _run(
    told: dict[str, Any], scratch: str, stdin: bytes, limits: Limits, answer: Answer | None
) -> Ran:
    given = json.dumps([entry or "." for entry in sys.path]), json.dumps(told | asdict(limits))
    with _busy_without_room():
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-S", "-E", "-c", _RUNNER, *given),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env=_environment(scratch),
        )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    over: Literal["", "time", "output"] = ""
    try:
        most = limits.output_kib * 1024
        feeding = asyncio.ensure_future(_feed(process.stdin, stdin, more=answer is not None))
        enough = partial(_end, process)
        heard = None if answer is None else partial(_answer, process.stdin, answer)
        reading = asyncio.gather(
            _read(process.stdout, most, enough, heard), _read(process.stderr, most, enough)
        )
        try:
            async with asyncio.timeout(limits.wall_s + START_SECONDS):
                (out, much), (err, more) = await reading
                over = "output" if much or more else ""
                code = await process.wait()
        except TimeoutError:  # the runner ends the program at wall_s; this is for a stuck machine
            out, err, over, code = b"", b"", "time", -9
        finally:
            feeding.cancel()
    finally:
        _end(process)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(5):
                await process.wait()
        if process.returncode is None:
            process.kill()
    err, _, report = err.rpartition(b"\x1e")
    if not over and code == 0:  # else the program has ended its runner, and may have written this
        told_back = json.loads(report)
        if told_back.get("failed"):
            raise _never_ran(told_back["failed"], err)
        return Ran(int(told_back["status"]), out, err, "time" if told_back["late"] else "")
    if not over and code > 0:
        raise _never_ran(f"its runner ended with {code}", err + report)
    return Ran(code or -9, out, err, over or "time")


def _never_ran(why: str, err: bytes) -> SandboxFailed:
    said = " ".join(err.decode(errors="replace").split())[-400:]
    told = f"the sandbox did not run the program: {why}" + (f": {said}" if said else "")
    return SandboxBusy(told) if tells_no_room(told) else SandboxFailed(told)


async def _feed(writer: asyncio.StreamWriter, data: bytes, more: bool) -> None:
    with contextlib.suppress(OSError):
        writer.write(data)
        await writer.drain()
        if not more:
            writer.close()


def _answer(writer: asyncio.StreamWriter, answer: Answer, line: bytes) -> None:
    if writer.is_closing():
        return
    if (said := answer(line)) is None:
        writer.close()
    else:
        writer.write(said)


async def _read(
    reader: asyncio.StreamReader,
    most: int,
    enough: Callable[[], None],
    heard: Callable[[bytes], None] | None = None,
) -> tuple[bytes, bool]:
    """What is written until the end, and whether it was more than `most` bytes; then `enough` is
    called and the rest is left out. `heard` is called with each line as it comes."""
    data, much, begun = b"", False, 0  # where the line begins that has not ended
    while piece := await reader.read(65536):
        if much:
            continue
        data += piece
        if len(data) > most:
            data, much = data[:most], True
            enough()
        elif heard is not None and b"\n" in piece:
            *lines, rest = data[begun:].split(b"\n")
            begun = len(data) - len(rest)
            for line in lines:
                heard(line)
    return data, much


def _end(process: asyncio.subprocess.Process) -> None:
    """Have the runner end all that is below it."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()


def _environment(scratch: str) -> dict[str, str]:
    """Nothing of this process's environment: no key, no token, no path into a home. It sees no more
    GPUs than this process does."""
    gpus = "CUDA_VISIBLE_DEVICES"
    return {
        **({gpus: os.environ[gpus]} if gpus in os.environ else {}),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
    }
