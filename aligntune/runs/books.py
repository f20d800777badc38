"""What became of every group, read from a run's ledger.jsonl: its states, and its replay.

Invariant: the log alone proves the books, whatever was killed meanwhile: it is believed as far as
every record of it can have happened after those before it. One pass, in memory that goes with open
groups and checkpoints, and not with groups that have ended.
"""

from __future__ import annotations

import gc
import json
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from operator import sub
from pathlib import Path
from typing import Any

from aligntune.errors import printable

CHUNK = 2**16  # bytes of the log that are parsed at once


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

# By plain strings, whose hashes are kept: the hash of an enum's member is computed each time.
_BEFORE = {
    to.value: frozenset(state.value for state, next_ones in MOVES.items() if to in next_ones)
    for to in State
}
_ENDS = frozenset(state.value for state in ENDS)


class LedgerError(RuntimeError):
    """The books do not balance; always a defect of aligntune or a damaged log."""

    def __init__(self, message: str) -> None:
        """What a damaged log holds is shown as characters that a terminal shows."""
        super().__init__(printable(message))


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


@dataclass(frozen=True)
class Replay:
    """A log as far as it can be believed."""

    books: Books
    steps: frozenset[int]  # whose checkpoints it can go back to
    size: int  # bytes of it
    wrong: str | None  # with what comes after, where it is a whole line; with file and line


def check(group_id: int, current: State | None, to: State) -> None:
    """Raises LedgerError where a group may not go there."""
    if current is None:
        raise LedgerError(f"group {group_id} is not open and cannot become {to}")
    if to not in MOVES[current]:
        raise LedgerError(f"group {group_id} is {current} and cannot become {to}")


@dataclass(frozen=True, slots=True)
class _Mark:
    """The books at the end of a step. A long run has one for each, with thousands of groups open,
    so these are packed."""

    next_group: int
    open: bytes  # see `_packed`
    ended: dict[str, int]


def _packed(groups: Iterable[int]) -> bytes:
    """Groups, in their order, in a fraction of a byte each where they follow one another closely.
    Raises OverflowError for an id of more than 64 bits."""
    ids = array("q", groups)
    return zlib.compress(array("q", map(sub, ids, (0, *ids))).tobytes(), 1)


def _unpacked(packed: bytes) -> Iterator[int]:
    return accumulate(array("q", zlib.decompress(packed)))


class _Reader:
    """The books so far."""

    def __init__(self) -> None:
        self.seq = 0
        self.size = 0
        self._next = 0
        self._open: dict[int, str] = {}  # group: State
        self._ended = dict.fromkeys(_ENDS, 0)
        self.marks = {0: self._mark()}  # in the order of the log

    def _mark(self) -> _Mark:
        return _Mark(self._next, _packed(self._open), dict(self._ended))

    @property
    def books(self) -> Books:
        return Books(
            admitted=self._next,
            trained=self._ended["TRAINED"],
            filtered=self._ended["FILTERED"],
            quarantined=self._ended["QUARANTINED"],
            open=len(self._open),
        )

    def take(self, records: Iterable[tuple[bytes, Any]]) -> None:
        """Follow (line, record) in order. Raises LedgerError, or what Python raises where one is
        no record; `seq` and `size` are of those before it then."""
        for line, record in records:
            if record["seq"] != self.seq:
                raise LedgerError(f"record {record['seq']} where {self.seq} is due")
            event = record["event"]
            if event == "move":
                self._move(record["groups"], record["to"])
            elif event == "admit":
                if record["group"] != self._next:
                    raise LedgerError(f"group {record['group']} out of order")
                self._open[self._next] = "WAITING"
                self._next += 1
            else:
                self._seldom(event, record)
            self.seq += 1
            self.size += len(line)

    def _move(self, groups: list[int], to: str) -> None:
        states, before = self._open, _BEFORE[to]
        for group_id in groups:
            current = states.get(group_id)
            if current not in before:
                check(group_id, State(current) if current else None, State(to))
        if to in _ENDS:
            if len(groups) > 1 and len(set(groups)) != len(groups):
                raise LedgerError(f"a group of {groups} cannot become {to} twice")
            for group_id in groups:
                del states[group_id]
            self._ended[to] += len(groups)
        else:
            for group_id in groups:
                states[group_id] = to

    def _seldom(self, event: Any, record: dict[str, Any]) -> None:
        if event == "checkpoint":
            step = int(record["step"])
            self.marks.pop(step, None)
            self.marks[step] = self._mark()
        elif event == "restore":
            step = record["step"]
            if step not in self.marks:
                raise LedgerError(f"restored from step {step}, which has no checkpoint in this log")
            self._back_to(self.marks[step])
            for later in reversed(list(self.marks)):
                if later == step:
                    break
                del self.marks[later]
        elif event == "adopt":
            ended = {state: int(record["ended"][state]) for state in _ENDS}
            mark = _Mark(int(record["next"]), _packed(map(int, record["open"])), ended)
            self._back_to(mark)
            self.marks = {int(record["step"]): mark}
        else:
            raise LedgerError(f"unknown event {event!r}")

    def _back_to(self, mark: _Mark) -> None:
        self._next, self._ended = mark.next_group, dict(mark.ended)
        self._open = dict.fromkeys(_unpacked(mark.open), "WAITING")


def replay(path: Path) -> Replay:
    """Follow a log as far as it can be believed. Raises OSError where it cannot be read."""
    reader, wrong = _Reader(), None
    collects = gc.isenabled()
    gc.disable()  # records make no cycles, and to look for some takes a fifth of the time
    try:
        with path.open("rb") as file:
            while lines := file.readlines(CHUNK):
                if not lines[-1].endswith(b"\n"):
                    lines.pop()  # torn by a kill; what it would have said did not happen
                reader.take(_records(lines))
    except LedgerError as error:
        wrong = f"{path}:{reader.seq + 1}: {error}"
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as e:
        wrong = (
            f"{path}:{reader.seq + 1}: no record of a ledger ({type(e).__name__}: "
            f"{' '.join(str(e).split())[:80]}); the file is damaged: restore it from a copy"
        )
    finally:
        if collects:
            gc.enable()
    return Replay(reader.books, frozenset(reader.marks), reader.size, wrong)


def _records(lines: list[bytes]) -> Iterator[tuple[bytes, Any]]:
    """Each line with what is in it; many lines are parsed at once, which takes a third of the
    time. Raises what `json` raises for the first that cannot be parsed, when its turn comes."""
    try:
        records = json.loads("[" + b",".join(lines).decode() + "]")
    except (ValueError, RecursionError):
        records = ()
    if len(records) == len(lines):
        yield from zip(lines, records, strict=True)
    else:
        for line in lines:
            yield line, json.loads(line.decode())


def audit(path: Path) -> Books:
    """The books that a ledger log says, those of a run it goes on from among them.

    Raises LedgerError, with the line, where the log shows a move that cannot happen, a gap, or a
    restore from a checkpoint that was never made, and for a line that is no record.
    """
    found = replay(path)
    if found.wrong:
        raise LedgerError(found.wrong)
    return found.books
