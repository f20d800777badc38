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
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aligntune.online.staleness import Cohort
from aligntune.runs import writer
from aligntune.runs.books import ENDS, Books, LedgerError, State, audit, check, replay
from aligntune.runs.disk import Appended, is_full, sync
from aligntune.runs.jsonl import cut_torn_line, last_row

__all__ = ["Books", "Ledger", "LedgerError", "LedgerLog", "State", "adopt", "audit", "take_up"]

_AGELESS = ENDS | {State.WAITING, State.TRAINING}


@dataclass
class _Entry:
    state: State
    version: int  # of the policy, when it was admitted or, later, dispatched


@dataclass
class _Cohort:
    """The groups dispatched at one version of the policy that are not being trained on."""

    size: int = 0
    ready: set[int] = field(default_factory=set)


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
            check(group_id, self.state(group_id), to)
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

    A line torn by a kill is cut off when the log is opened again. On a disk without room records
    wait, up to `writer.SECONDS`, and no checkpoint is complete meanwhile; after any other failed
    write every call raises its OSError, so that a run does not go on without its books.
    """

    def __init__(
        self, path: Path, later: Callable[[Callable[[], None]], None] | None = None
    ) -> None:
        cut_torn_line(path)
        self._seq = _records_in(path)
        self._file = Appended(path)
        self._later = later
        self._ticking = False
        self._lines: list[str] = []
        self._error: OSError | None = None
        self._full_since: float | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        if self._error is not None:
            raise self._error
        self._lines.append(json.dumps({"seq": self._seq, **record}) + "\n")
        self._seq += 1
        on_its_way = record["event"] == "admit" or (
            record["event"] == "move" and record["to"] != State.TRAINED
        )
        if self._later is None or not on_its_way:
            self._flush_or_wait()
        elif not self._ticking:
            self._ticking = True
            self._later(self._tick)

    def _tick(self) -> None:
        self._ticking = False
        with suppress(OSError):  # there is no caller here; the next one hears of it
            self._flush_or_wait()

    def _flush_or_wait(self) -> None:
        try:
            self.flush()
        except OSError:
            if self._error is not None:
                raise

    def flush(self) -> None:
        """Hand what was recorded to the operating system. Raises OSError; what there was no room
        for is tried again with the next."""
        if self._error is not None:
            raise self._error
        try:
            self._file.write("".join(self._lines).encode())
        except OSError as error:
            now = time.monotonic()
            self._full_since = self._full_since or now
            if not is_full(error) or now - self._full_since > writer.SECONDS:
                self._error = error
            raise
        self._full_since = None
        self._lines.clear()

    def to_disk(self) -> None:
        """Force what was handed over to disk; a thread may do this while records are written."""
        self._file.sync()

    def sync(self) -> None:
        """Force everything recorded to disk."""
        self.flush()
        self.to_disk()

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            self._file.close()


def _records_in(path: Path) -> int:
    """How many records a log without a torn line has. The last one says so; where that is damaged
    its lines are counted."""
    if not path.exists():
        return 0
    try:
        last = last_row(path)
        return 0 if last is None else int(last["seq"]) + 1
    except (LookupError, RecursionError, TypeError, ValueError):
        with path.open("rb") as file:
            return sum(1 for _ in file)


def adopt(path: Path, snapshot: dict[str, Any], step: int) -> None:
    """Let the books of a log begin with the checkpoint of `step` that another run has made."""
    log = LedgerLog(path)
    log({"event": "adopt", "step": step, **snapshot})
    log.close()


def take_up(path: Path, snapshot: dict[str, Any], step: int) -> str | None:
    """See that a log can go back to the checkpoint of `step`; returns what was wrong with it.

    What comes after a record that cannot be is cut off. Where that takes the mark of `step`, or
    the log is gone, a new one begins with the checkpoint; the old one is kept as `NAME.damaged`.
    """
    if not path.exists() or not path.stat().st_size:
        if not step:
            return None
        adopt(path, snapshot, step)
        return f"{path} is gone; its books begin with the checkpoint of step {step}"
    found = replay(path)
    if step in found.steps:
        if found.wrong:
            with path.open("r+b") as file:
                file.truncate(found.size)
            sync(path)
        return found.wrong
    aside = path.with_name(path.name + ".damaged")
    os.replace(path, aside)
    adopt(path, snapshot, step)
    reason = found.wrong or f"{path} has no checkpoint of step {step}"
    return f"{reason}; it is kept as {aside.name}, and the books begin with step {step}"
