"""Where every prompt group is: a pure state machine and its append-only log.

Invariant: every admitted group ends once, as TRAINED, FILTERED or QUARANTINED. The log alone
proves it, whatever was killed meanwhile: `audit` replays it, undoing what a restore from a
checkpoint undid, and refuses any move the machine does not allow.

        admit                  +--> FILTERED
          |                    |
          v                    |
       WAITING --> ROLLING --> SCORING --> READY --> TRAINING --> TRAINED
          ^           |          | |
          +-----------+----------+ |   lost: again, from the start
                                   |
                                   +--> QUARANTINED   failed too often, or lost too often
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from aligntune.online.staleness import Cohort
from aligntune.runs.jsonl import cut_torn_line


class State(StrEnum):
    """Where a group is."""

    WAITING = "WAITING"
    ROLLING = "ROLLING"
    SCORING = "SCORING"
    READY = "READY"
    TRAINING = "TRAINING"
    TRAINED = "TRAINED"
    FILTERED = "FILTERED"
    QUARANTINED = "QUARANTINED"


ENDS = frozenset({State.TRAINED, State.FILTERED, State.QUARANTINED})
_AGELESS = ENDS | {State.WAITING, State.TRAINING}

MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.ROLLING, State.QUARANTINED}),
    State.ROLLING: frozenset({State.SCORING, State.WAITING, State.QUARANTINED}),
    State.SCORING: frozenset({State.READY, State.FILTERED, State.WAITING, State.QUARANTINED}),
    State.READY: frozenset({State.TRAINING, State.WAITING}),
    State.TRAINING: frozenset({State.TRAINED, State.READY, State.WAITING}),
}


class LedgerError(RuntimeError):
    """The books do not balance; always a defect of aligntune or a damaged log."""


@dataclass
class _Entry:
    state: State
    version: int  # of the policy, when it was admitted or, later, dispatched


@dataclass
class _Cohort:
    """The groups dispatched at one version of the policy that are not being trained on."""

    size: int = 0
    ready: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Books:
    """What became of every group ever admitted (and not undone by a restore)."""

    admitted: int
    trained: int
    filtered: int
    quarantined: int
    open: int

    @property
    def balanced(self) -> bool:
        """Whether every admitted group is in exactly one place."""
        return self.admitted == self.trained + self.filtered + self.quarantined + self.open


class Ledger:
    """The state machine. `record` receives each log record, in order, before the state changes."""

    def __init__(self, record: Callable[[dict[str, Any]], None]) -> None:
        self._record = record
        self._open: dict[int, _Entry] = {}
        self._cohorts: dict[int, _Cohort] = {}
        self._ended = dict.fromkeys(sorted(ENDS), 0)
        self._lost = 0
        self._next = 0

    @property
    def books(self) -> Books:
        """The current balance."""
        return Books(
            admitted=self._next,
            trained=self._ended[State.TRAINED],
            filtered=self._ended[State.FILTERED],
            quarantined=self._ended[State.QUARANTINED],
            open=len(self._open),
        )

    @property
    def bad(self) -> int:
        """Groups quarantined for what they are, and not for replicas that died under them."""
        return self._ended[State.QUARANTINED] - self._lost

    @property
    def in_flight(self) -> int:
        """Groups admitted and not ended."""
        return len(self._open)

    def cohorts(self) -> list[Cohort]:
        """Every group that was dispatched, has not ended and is not in a running update, by the
        version at its dispatch. One that waits has no tokens, and so no age."""
        return [Cohort(version, own.size, own.ready) for version, own in self._cohorts.items()]

    def states(self) -> Counter[State]:
        """How many open groups are in each state."""
        return Counter(entry.state for entry in self._open.values())

    def state(self, group_id: int) -> State | None:
        """The state of an open group; None once it ended."""
        entry = self._open.get(group_id)
        return entry.state if entry else None

    def admit(self, version: int) -> int:
        """Admit the next group; returns its id."""
        group_id = self._next
        self._record({"event": "admit", "group": group_id, "version": version})
        self._open[group_id] = _Entry(State.WAITING, version)
        self._next += 1
        return group_id

    def move(self, groups: Iterable[int], to: State, **why: Any) -> None:
        """Move groups, all or none; `why` (step, reason, replica, ...) goes to the log. `lost` says
        that replicas died, see `bad`; `version` is the policy's at a dispatch, where it is not that
        of the admission any more.

        Raises LedgerError where a group is not open or may not go there.
        """
        groups = list(groups)
        for group_id in groups:
            _check(group_id, self.state(group_id), to)
        self._record({"event": "move", "groups": groups, "to": to.value, **why})
        self._lost += len(groups) if why.get("lost") else 0
        for group_id in groups:
            entry = self._open[group_id]
            self._count(group_id, entry, -1)
            entry.state, entry.version = to, why.get("version", entry.version)
            self._count(group_id, entry, +1)
            if to in ENDS:
                del self._open[group_id]
                self._ended[to] += 1

    def _count(self, group_id: int, entry: _Entry, times: int) -> None:
        """A group comes to (`times` 1) or leaves (-1) the cohort of its version, where it has an
        age: it was dispatched and may still be trained on."""
        if entry.state in _AGELESS:
            return
        cohort = self._cohorts.setdefault(entry.version, _Cohort())
        cohort.size += times
        if entry.state is State.READY:
            (cohort.ready.add if times > 0 else cohort.ready.discard)(group_id)
        if not cohort.size:
            del self._cohorts[entry.version]

    @staticmethod
    def beginning() -> dict[str, Any]:
        """The snapshot of a run that has done nothing, which every log may go back to as step 0."""
        return {"next": 0, "ended": {state.value: 0 for state in sorted(ENDS)}, "open": []}

    def snapshot(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps, and a mark in the log; open groups start again from it."""
        self._record({"event": "checkpoint", "step": step})
        return {
            "next": self._next,
            "ended": {state.value: count for state, count in self._ended.items()},
            "lost": self._lost,
            "open": sorted(self._open),
        }

    def restore(self, snapshot: dict[str, Any], step: int, version: int) -> list[int]:
        """Go back to the checkpoint of `step`; returns the open groups, all WAITING."""
        self._record({"event": "restore", "step": step, "version": version})
        self._next = snapshot["next"]
        self._lost = snapshot.get("lost", 0)  # checkpoints before it was counted have none
        self._ended = {State(name): count for name, count in snapshot["ended"].items()}
        self._cohorts = {}
        self._open = {i: _Entry(State.WAITING, version) for i in sorted(snapshot["open"])}
        return list(self._open)


def _check(group_id: int, current: State | None, to: State) -> None:
    if current is None:
        raise LedgerError(f"group {group_id} is not open and cannot become {to}")
    if to not in MOVES[current]:
        raise LedgerError(f"group {group_id} is {current} and cannot become {to}")


def at_end_of_tick(flush: Callable[[], None]) -> None:
    """Have `flush` called when the running event loop has gone round once."""
    asyncio.get_running_loop().call_soon(flush)


class LedgerLog:
    """`ledger.jsonl`: one record a line.

    The rule of what is where when: records are written in order, and those of one turn of the
    event loop together (`later`); without it each at once. What others build on is written before
    the call returns, with all that came before it: a checkpoint's mark, a restore, and TRAINED,
    which metrics and samples follow. `sync` forces what was written to disk; only after that is a
    checkpoint complete. A kill takes at most one turn's moves of groups that were still on their
    way, and a resumed run, which starts from a checkpoint, undoes these anyway.

    A line torn by a kill is cut off when the log is opened again. After a failed write every call
    raises its OSError, so that a run does not go on without its books.
    """

    def __init__(
        self, path: Path, later: Callable[[Callable[[], None]], None] | None = None
    ) -> None:
        self._seq = cut_torn_line(path)
        self._file = path.open("ab", buffering=0)
        self._later = later
        self._lines: list[str] = []
        self._error: OSError | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        if self._error is not None:
            raise self._error
        self._lines.append(json.dumps({"seq": self._seq, **record}) + "\n")
        self._seq += 1
        on_its_way = record["event"] == "admit" or (
            record["event"] == "move" and record["to"] != State.TRAINED
        )
        if self._later is None or not on_its_way:
            self.flush()
        elif len(self._lines) == 1:
            self._later(self._tick)

    def _tick(self) -> None:
        try:
            self.flush()
        except OSError as error:
            self._error = error  # there is no caller here; the next one hears of it

    def flush(self) -> None:
        """Hand what was recorded to the operating system."""
        if self._error is not None:
            raise self._error
        data = memoryview("".join(self._lines).encode())
        self._lines.clear()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._error = error
            raise

    def to_disk(self) -> None:
        """Force what was handed over to disk; a thread may do this while records are written."""
        os.fsync(self._file.fileno())

    def sync(self) -> None:
        """Force everything recorded to disk."""
        self.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            self._file.close()


def adopt(path: Path, snapshot: dict[str, Any], step: int) -> None:
    """Let the books of a log begin with the checkpoint of `step` that another run has made."""
    log = LedgerLog(path)
    log({"event": "adopt", "step": step, **snapshot})
    log.close()


def is_lost(path: Path) -> bool:
    """Whether the log of a run that has a checkpoint is gone, or empty: its books cannot go on."""
    return not path.exists() or path.stat().st_size == 0


def audit(path: Path) -> Books:
    """Replay a ledger log and return its books, those of a run it goes on from among them.

    Raises LedgerError, with the line, where the log shows a move that cannot happen, a gap, or a
    restore from a checkpoint that was never made, and for a line that is no record.
    """
    at = [0]
    try:
        return _replayed(path, at)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise LedgerError(
            f"{path}:{at[0] + 1}: no record of a ledger ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:80]}); the file is damaged: restore it from a copy"
        ) from error


def _replayed(path: Path, at: list[int]) -> Books:
    """The books; `at` holds the line, counted from 0, that is being read."""
    open_groups: dict[int, State] = {}
    ended: dict[int, tuple[int, State]] = {}  # group -> (seq of its end, how)
    marks: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (-1, 0, ())}  # step: seq, next, open
    brought = dict.fromkeys(ENDS, 0)  # ended groups of another run
    next_group = 0
    with path.open("rb") as file:
        for seq, line in enumerate(file):
            if not line.endswith(b"\n"):
                break  # torn by a kill; what it would have said did not happen
            at[0] = seq
            record = json.loads(line)
            if record["seq"] != seq:
                raise LedgerError(f"{path}:{seq + 1}: record {record['seq']} where {seq} is due")
            match record["event"]:
                case "admit":
                    if record["group"] != next_group:
                        raise LedgerError(f"{path}:{seq + 1}: group {record['group']} out of order")
                    open_groups[next_group] = State.WAITING
                    next_group += 1
                case "move":
                    to = State(record["to"])
                    for group_id in record["groups"]:
                        _check(group_id, open_groups.get(group_id), to)
                        if to in ENDS:
                            del open_groups[group_id]
                            ended[group_id] = (seq, to)
                        else:
                            open_groups[group_id] = to
                case "checkpoint":
                    marks[record["step"]] = (seq, next_group, tuple(open_groups))
                case "restore":
                    if record["step"] not in marks:
                        raise LedgerError(
                            f"{path}:{seq + 1}: restored from step {record['step']}, "
                            "which has no checkpoint in this log"
                        )
                    mark, next_group, still_open = marks[record["step"]]
                    ended = {g: end for g, end in ended.items() if end[0] < mark}
                    open_groups = dict.fromkeys(still_open, State.WAITING)
                    marks = {step: m for step, m in marks.items() if m[0] <= mark}
                case "adopt":
                    brought = {state: record["ended"][state] for state in ENDS}
                    next_group, ended = record["next"], {}
                    open_groups = dict.fromkeys(record["open"], State.WAITING)
                    marks = {record["step"]: (seq, next_group, tuple(open_groups))}
                case event:
                    raise LedgerError(f"{path}:{seq + 1}: unknown event {event!r}")
    counts = Counter(brought)
    counts.update(how for _, how in ended.values())
    return Books(
        admitted=next_group,
        trained=counts[State.TRAINED],
        filtered=counts[State.FILTERED],
        quarantined=counts[State.QUARANTINED],
        open=len(open_groups),
    )
