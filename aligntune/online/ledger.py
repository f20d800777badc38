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

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from aligntune.online.staleness import OpenGroup
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

MOVES: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.ROLLING, State.QUARANTINED}),
    State.ROLLING: frozenset({State.SCORING, State.WAITING, State.QUARANTINED}),
    State.SCORING: frozenset({State.READY, State.FILTERED, State.WAITING, State.QUARANTINED}),
    State.READY: frozenset({State.TRAINING, State.WAITING}),
    State.TRAINING: frozenset({State.TRAINED, State.WAITING}),
}


class LedgerError(RuntimeError):
    """The books do not balance; always a defect of aligntune or a damaged log."""


@dataclass
class _Entry:
    version: int  # the policy's at admission
    state: State


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
        self._ended = dict.fromkeys(sorted(ENDS), 0)
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
    def next_group(self) -> int:
        """The id the next admitted group gets; also the position in the order of prompts."""
        return self._next

    @property
    def in_flight(self) -> int:
        """Groups admitted and not ended."""
        return len(self._open)

    def open_groups(self) -> list[OpenGroup]:
        """Every group that has not ended and is not in a running update."""
        return [
            OpenGroup(group_id, entry.version, entry.state is State.READY)
            for group_id, entry in self._open.items()
            if entry.state is not State.TRAINING
        ]

    def state(self, group_id: int) -> State | None:
        """The state of an open group; None once it ended."""
        entry = self._open.get(group_id)
        return entry.state if entry else None

    def version(self, group_id: int) -> int:
        """The policy version at the admission of an open group."""
        return self._open[group_id].version

    def admit(self, version: int) -> int:
        """Admit the next group; returns its id."""
        group_id = self._next
        self._record({"event": "admit", "group": group_id, "version": version})
        self._open[group_id] = _Entry(version, State.WAITING)
        self._next += 1
        return group_id

    def move(self, groups: Iterable[int], to: State, **why: Any) -> None:
        """Move groups, all or none; `why` (step, reason, replica, ...) goes to the log.

        Raises LedgerError where a group is not open or may not go there.
        """
        groups = list(groups)
        for group_id in groups:
            _check(group_id, self.state(group_id), to)
        self._record({"event": "move", "groups": groups, "to": to.value, **why})
        for group_id in groups:
            if to in ENDS:
                del self._open[group_id]
                self._ended[to] += 1
            else:
                self._open[group_id].state = to

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
            "open": sorted(self._open),
        }

    def restore(self, snapshot: dict[str, Any], step: int, version: int) -> list[int]:
        """Go back to the checkpoint of `step`; returns the open groups, all WAITING."""
        self._record({"event": "restore", "step": step, "version": version})
        self._next = snapshot["next"]
        self._ended = {State(name): count for name, count in snapshot["ended"].items()}
        self._open = {group: _Entry(version, State.WAITING) for group in snapshot["open"]}
        return sorted(self._open)


def _check(group_id: int, current: State | None, to: State) -> None:
    if current is None:
        raise LedgerError(f"group {group_id} is not open and cannot become {to}")
    if to not in MOVES[current]:
        raise LedgerError(f"group {group_id} is {current} and cannot become {to}")


class LedgerLog:
    """`ledger.jsonl`: one record a line, flushed as written, on disk at `sync`.

    A line torn by a kill is cut off when the log is opened again.
    """

    def __init__(self, path: Path) -> None:
        self._seq = cut_torn_line(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def __call__(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({"seq": self._seq, **record}) + "\n")
        self._file.flush()
        self._seq += 1

    def sync(self) -> None:
        """Force what was written to disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


def adopt(path: Path, snapshot: dict[str, Any], step: int) -> None:
    """Let the books of a log begin with the checkpoint of `step` that another run has made."""
    log = LedgerLog(path)
    log({"event": "adopt", "step": step, **snapshot})
    log.close()


def audit(path: Path) -> Books:
    """Replay a ledger log and return its books, those of a run it goes on from among them.

    Raises LedgerError, with the line, where the log shows a move that cannot happen, a gap, or a
    restore from a checkpoint that was never made.
    """
    open_groups: dict[int, State] = {}
    ended: dict[int, tuple[int, State]] = {}  # group -> (seq of its end, how)
    marks: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (-1, 0, ())}  # step: seq, next, open
    brought = dict.fromkeys(ENDS, 0)  # ended groups of another run
    next_group = 0
    with path.open("rb") as file:
        for seq, line in enumerate(file):
            if not line.endswith(b"\n"):
                break  # torn by a kill; what it would have said did not happen
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
