"""What became of every group, read from a run's ledger.jsonl: its states, and its replay.

Invariant: the log alone proves the books, whatever was killed meanwhile. `audit` undoes what a
restore from a checkpoint undid, and refuses any move that the states do not allow.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


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
    State.TRAINING: frozenset({State.TRAINED, State.READY, State.WAITING}),
}


class LedgerError(RuntimeError):
    """The books do not balance; always a defect of aligntune or a damaged log."""


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


def check(group_id: int, current: State | None, to: State) -> None:
    """Raises LedgerError where a group, None: one that is not open, may not go to a state."""
    if current is None:
        raise LedgerError(f"group {group_id} is not open and cannot become {to}")
    if to not in MOVES[current]:
        raise LedgerError(f"group {group_id} is {current} and cannot become {to}")


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
                        check(group_id, open_groups.get(group_id), to)
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
