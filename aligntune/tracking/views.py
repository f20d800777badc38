"""Trackers beside the run, each in a thread of its own: they are views and never end it.

What a tracker does not take is an event, is kept, and is tried again with the next figures. A
table of samples that it refuses while it takes figures is left out: it holds up none of them. A
tracker that does not answer holds up nobody: at most `KEPT` things wait for it, and it is left
behind when the run ends.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aligntune.config.records import TrackingSpec
from aligntune.runs.deadline import THREAD
from aligntune.tracking.trackers import Ended, Tracker, open_tracker

KEPT = 1000  # that a tracker may be behind: figures, samples, rollbacks; the oldest are dropped
CLOSE_SECONDS = 30.0  # for sending what is left at the end of a run


@dataclass(frozen=True)
class _Figures:
    step: int
    figures: dict[str, float]


@dataclass(frozen=True)
class _Samples:
    step: int
    rows: list[Mapping[str, Any]]


@dataclass(frozen=True)
class _Forget:
    after: int


_Given = _Figures | _Samples | _Forget
_Refused = list[tuple[_Samples, Exception]]


class View:
    """One tracker; `open_tracker()` makes it, in its thread. `failed(**fields)` hears of what it
    does not take, once until it takes something again; of tables once until it takes a table."""

    def __init__(
        self, name: str, open_tracker: Callable[[], Tracker], failed: Callable[..., None]
    ) -> None:
        self.name = name
        self._open = open_tracker
        self._failed = failed
        self._tracker: Tracker | None = None
        self._failing = False
        self._refusing = False  # it takes figures, but no tables
        self._changed = threading.Condition()
        self._pending: deque[_Given] = deque()  # at most KEPT
        self._left_out = 0  # steps that were dropped
        self._new = False  # something was given since the last try
        self._ended: Ended | None = None
        self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the figures of `step`, some time."""
        self._give(_Figures(step, dict(figures)))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show groups of an evaluation at `step`, some time."""
        self._give(_Samples(step, [*rows]))

    def truncate_after(self, step: int) -> None:
        """Steps after `step` were rolled back and will come again."""
        self._give(_Forget(step))

    def close(self, ended: Ended) -> None:
        """Try what is left once more, say how the run ended, and end; a view that does not is left
        behind."""
        with self._changed:
            self._ended = ended
            self._changed.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._failed(tracker=self.name, reason=f"no end within {CLOSE_SECONDS:g} s")
        elif steps := sum(isinstance(each, _Figures) for each in self._pending):
            self._failed(tracker=self.name, reason=f"{steps} steps were never taken")
        if self._left_out:
            reason = f"{self._left_out} steps were left out, for it was more than {KEPT} behind"
            self._failed(tracker=self.name, reason=reason)

    def _give(self, given: _Given) -> None:
        with self._changed:
            self._pending.append(given)
            if len(self._pending) > KEPT:
                self._drop()
            self._new = True
            self._changed.notify()

    def _drop(self) -> None:
        """Forget the oldest, but not a rollback, without which steps would be shown twice: it stays
        the first, and of two the one that goes back further."""
        dropped = self._pending.popleft()
        if isinstance(dropped, _Forget):
            forget, dropped = dropped, self._pending.popleft()
            if isinstance(dropped, _Forget):
                forget = min(forget, dropped, key=lambda each: each.after)
            self._pending.appendleft(forget)
        self._left_out += isinstance(dropped, _Figures)

    def _run(self) -> None:
        ended: Ended | None = None
        while ended is None:
            with self._changed:
                self._changed.wait_for(lambda: self._new or self._ended is not None)
                self._new, ended = False, self._ended
            self._send(last=ended is not None)
        try:
            if self._tracker is not None:
                self._tracker.close(ended)
        except Exception as error:  # noqa: BLE001 - of whatever client the tracker has
            self._fails(error)

    def _send(self, last: bool) -> None:
        """Give what is pending, in order, as far as the tracker takes it. Nothing follows where it
        is the `last` time."""
        refused: _Refused = []  # whether the service is away or dislikes tables, figures say
        try:
            if self._tracker is None:
                self._tracker = self._open()
            while (oldest := self._oldest()) is not None:
                match oldest:
                    case _Figures(step, figures):
                        self._tracker.log(step, figures)
                        self._failing = False
                        self._leave_out(refused)
                    case _Samples():
                        self._give_table(self._tracker, oldest, refused)
                    case _Forget(after):
                        self._tracker.truncate_after(after)
                        refused[:] = [each for each in refused if each[0].step <= after]
                self._taken(oldest)
            if last:
                self._leave_out(refused)
        except Exception as error:  # noqa: BLE001 - of whatever client the tracker has
            self._fails(error)
        self._keep(refused)

    def _give_table(self, tracker: Tracker, table: _Samples, refused: _Refused) -> None:
        try:
            tracker.samples(table.step, table.rows)
            self._failing = self._refusing = False
        except Exception as error:  # noqa: BLE001 - of whatever client the tracker has
            refused.append((table, error))

    def _leave_out(self, refused: _Refused) -> None:
        """The tracker refuses these tables, and not for want of its service."""
        for _, error in refused:
            self._refusing = self._told(error, self._refusing)
        refused.clear()

    def _keep(self, refused: _Refused) -> None:
        """Try these tables again with the next figures."""
        with self._changed:
            self._pending.extendleft(table for table, _ in reversed(refused))
            while len(self._pending) > KEPT:
                self._drop()

    def _oldest(self) -> _Given | None:
        with self._changed:
            return self._pending[0] if self._pending else None

    def _taken(self, given: _Given) -> None:
        """`given` is with the tracker; meanwhile it may have been dropped here."""
        with self._changed:
            if self._pending and self._pending[0] is given:
                self._pending.popleft()
            else:
                self._left_out -= isinstance(given, _Figures)

    def _fails(self, error: Exception) -> None:
        self._failing = self._told(error, self._failing)

    def _told(self, error: Exception, known: bool) -> bool:
        """Tell the reason, unless it is `known`; now it is."""
        if not known:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._failed(tracker=self.name, reason=reason)
        return True


def open_views(
    folder: Path,
    tracking: TrackingSpec,
    config: Mapping[str, Any],
    after_step: int,
    failed: Callable[..., None],
) -> list[View]:
    """Views of the run in `folder` by its trackers; its next step is `after_step` + 1."""
    return [
        View(name, partial(open_tracker, name, folder, tracking, config, after_step), failed)
        for name in tracking.trackers
    ]
