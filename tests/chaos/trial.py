"""One hit: who is killed or stopped, where it is found, and what the run must show afterwards."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from aligntune.online.ledger import LedgerError, audit
from aligntune.runs.jsonl import read_lines

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
PAUSE_S = 8.0
"""How long a driver, raylet or control service stands still; the others are stopped for ever."""

VICTIMS: dict[str, tuple[signal.Signals, ...]] = {
    "rollout": (KILL, STOP),
    "engine": (KILL, STOP),
    "reward": (KILL, STOP),
    "reward child": (KILL, STOP),
    "reference": (KILL, STOP),
    "policy": (KILL, STOP),
    "critic": (KILL, STOP),
    "driver": (KILL, STOP),
    "raylet": (KILL, STOP),
    "gcs_server": (KILL, STOP),
}
"""What may be hit, and how."""

RAY = frozenset({"raylet", "gcs_server"})
OF_THE_MACHINE = RAY | {"driver"}
"""After their death the same command goes on; who stops them lets them go on later."""

PARENTS = {"reward child": "reward", "engine": "rollout"}


@dataclass(frozen=True)
class Hit:
    """Who is hit, and how."""

    victim: str
    signal: signal.Signals

    @property
    def ends_the_command(self) -> bool:
        """Whether the command has to be given again."""
        return self.victim in OF_THE_MACHINE and self.signal == KILL

    @property
    def pauses(self) -> bool:
        """Whether the victim goes on after a while."""
        return self.victim in OF_THE_MACHINE and self.signal == STOP

    def describe(self) -> str:
        """In one line."""
        return f"{self.signal.name} to {self.victim}"


def find(victim: str, driver: psutil.Process, run: Path) -> psutil.Process | None:
    """The process of that name in a run; None where it is not there yet."""
    if victim == "driver":
        return driver
    if victim in RAY:
        below = driver.children(recursive=True)
        return next((each for each in below if _name(each) == victim), None)
    role = PARENTS.get(victim, victim)
    process = _of_role(role, run)
    if process is None or victim == role:
        return process
    if victim == "engine":  # forked as its replica is, or spawned by it
        near = [*process.parents()[0].children(), *process.children()]
        return next((each for each in near if "EngineCor" in each.name()), None)
    return next(iter(process.children(recursive=True)), None)


def role_starts(role: str, run: Path) -> int:
    """How often a process of a role has been started."""
    return len(_started(role, run))


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file, none where there is none yet."""
    return list(read_lines(path)) if path.exists() else []


def shared_memory() -> set[str]:
    """Names in the machine's shared memory."""
    folder = Path("/dev/shm")
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


def books_of(run: Path, staleness: int) -> list[str]:
    """What is wrong with the books and figures of a run that goes on, or has ended."""
    try:
        books = audit(run / "ledger.jsonl")
    except LedgerError as error:
        return [str(error)]
    problems = [] if books.balanced and not books.quarantined else [f"the books: {books}"]
    rows = lines_of(run / "metrics.jsonl")
    if [row["step"] for row in rows] != list(range(1, len(rows) + 1)):
        problems.append(f"steps {[row['step'] for row in rows]}")
    if any(row["staleness/max"] > staleness for row in rows):
        problems.append("a group was too old")
    return problems


def books_at_the_end(run: Path, steps: int, groups: int, staleness: int) -> list[str]:
    """What is wrong with a run that ended well, after so many steps of so many groups."""
    problems = books_of(run, staleness)
    if problems:
        return problems
    books = audit(run / "ledger.jsonl")
    if books.open or books.trained != steps * groups:
        problems.append(f"the books at the end: {books}")
    if len(lines_of(run / "metrics.jsonl")) != steps:
        problems.append(f"{len(lines_of(run / 'metrics.jsonl'))} steps of {steps}")
    if not (run / "model" / "model.safetensors").is_file():
        problems.append("no model")
    return problems


def _started(role: str, run: Path) -> list[int]:
    try:
        events = lines_of(run / "events.jsonl")
    except json.JSONDecodeError:  # the line that is being written
        return []
    return [
        event["pid"]
        for event in events
        if event["kind"] == "role_started" and event["role"].startswith(f"{role}-")
    ]


def _of_role(role: str, run: Path) -> psutil.Process | None:
    for pid in reversed(_started(role, run)):
        try:
            process = psutil.Process(pid)
            if process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
                return process
        except psutil.NoSuchProcess:
            pass
    return None


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""
