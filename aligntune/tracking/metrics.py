"""metrics.jsonl, evals.jsonl, samples.jsonl and events.jsonl: figures, samples and events.

Invariant: every complete line is one JSON object any parser reads, so NaN and infinities are
refused; a line torn by a kill is cut off when the file is opened again, and a damaged one taken
out; after `truncate_after(step)` there is nothing of a later step, so that a resumed run writes
each step once.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from aligntune.runs.disk import Appended
from aligntune.runs.jsonl import lines_from_end, mend


class EventKind(StrEnum):
    """What can happen to a run beside its steps."""

    RUN_STARTED = "run_started"
    SETTLED = "settled"  # `path` was left open by the user and got `value`; `why`
    ROWS_DROPPED = "rows_dropped"  # of `data`: counts by reason, and two examples of each
    ROLE_STARTED = "role_started"  # what the actor said of itself: engine, device, process, node
    RESUMED = "resumed"
    RUN_STOPPED = "run_stopped"  # before its last step; `reason` says why
    RUN_FINISHED = "run_finished"
    GROUP_RETRIED = "group_retried"
    GROUP_QUARANTINED = "group_quarantined"
    REPLICA_SILENT = "replica_silent"  # no sign of life for `seconds`: it gets no new call
    REPLICA_LOST = "replica_lost"
    REPLICA_RESTARTED = "replica_restarted"
    REPLICA_JOINED = "replica_joined"  # beyond rollout.replicas, on what the cluster has to spare
    WEIGHTS_REFUSED = "weights_refused"  # changes did not go with a replica's; it gets all
    POLICY_LOST = "policy_lost"  # a rank died or hangs; all ranks are started anew
    POLICY_REBUILT = "policy_rebuilt"  # from a checkpoint, to which the run goes back
    STALLED = "stalled"  # nothing moved for `seconds`: for what the run `waits`; more is at `path`
    NOT_EVALUATED = "not_evaluated"  # the version of `step`, of a run that stops; `reason` says why
    CHECKPOINT_SAVED = "checkpoint_saved"
    CHECKPOINT_FAILED = "checkpoint_failed"  # the disk did not take it; tried at the next step
    CHECKPOINT_DAMAGED = "checkpoint_damaged"  # it was passed over for an older one
    LINES_DAMAGED = "lines_damaged"  # so many `lines` of a `file` were no records and are left out
    LEDGER_DAMAGED = "ledger_damaged"  # where and how, and what became of it
    TRACKER_FAILED = "tracker_failed"  # it is tried again with the next figures
    NOT_SHOWN = "not_shown"  # standard output takes nothing any more; `reason` says why
    TROUBLE = "trouble"  # what the figures of the last steps say is wrong, and what to try
    CARD_FAILED = "card_failed"  # the model's README.md could not be written; `reason` says why
    PUSHED = "pushed"  # the model is on the hub, at `url`
    NOT_PUSHED = "not_pushed"  # the hub did not take the model; `reason` says why
    REPORT_FAILED = "report_failed"  # report.html could not be written; `reason` says why
    FIGURES_OVERFLOWED = "figures_overflowed"  # `figures` of a step, held at the largest number
    NOT_COPIED = "not_copied"  # checkpoint.storage did not take something; `reason` says why


WENT_WRONG = frozenset(
    {
        EventKind.GROUP_RETRIED,
        EventKind.GROUP_QUARANTINED,
        EventKind.REPLICA_SILENT,
        EventKind.REPLICA_LOST,
        EventKind.WEIGHTS_REFUSED,
        EventKind.POLICY_LOST,
        EventKind.STALLED,
        EventKind.NOT_EVALUATED,
        EventKind.CHECKPOINT_FAILED,
        EventKind.CHECKPOINT_DAMAGED,
        EventKind.LINES_DAMAGED,
        EventKind.LEDGER_DAMAGED,
        EventKind.TRACKER_FAILED,
        EventKind.NOT_SHOWN,
        EventKind.TROUBLE,
        EventKind.CARD_FAILED,
        EventKind.NOT_PUSHED,
        EventKind.REPORT_FAILED,
        EventKind.FIGURES_OVERFLOWED,
        EventKind.NOT_COPIED,
    }
)
"""The events that a report marks."""


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def event_line(kind: EventKind | str, **fields: Any) -> str:
    """An event of now, as a line of `EventsFile`. ValueError for a kind that is no `EventKind` and
    for a number that is not finite, TypeError for a value that is no JSON."""
    return _line({"time": time.time(), "kind": EventKind(kind).value, **fields})


class NotFinite(ValueError):
    """A figure is NaN or infinite; the message names it and its step."""


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Raises NotFinite, with the name, where a figure is NaN or infinite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NotFinite(
                f"metric {name!r} of step {step} is {value}: the run has diverged, or the "
                "figure is computed wrongly. Lower the learning rate or resume from an "
                "earlier checkpoint"
            )


def held(metrics: Mapping[str, float]) -> dict[str, float]:
    """The figures with those that overflowed held at the largest number; NaN, which is no size at
    all, left out. For figures of an update that was applied: none of them is a reason to end."""
    largest = sys.float_info.max
    return {
        name: min(max(value, -largest), largest)
        for name, value in metrics.items()
        if not math.isnan(value)
    }


def mean(values: Sequence[float]) -> float:
    """Of figures that may be `held`: their sum is beyond the largest number, where
    `statistics.fmean` raises."""
    return sum(value / len(values) for value in values)


class _Lines:
    """A JSONL file that grows at its end; an appended line is on disk when `append` returns, and
    where it raises none of it is. `damaged` lines were no records when it was opened."""

    def __init__(self, path: Path) -> None:
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        self.damaged = mend(path, self._fits)
        self.path = path
        self._file = Appended(path)

    def _fits(self, record: Mapping[str, Any]) -> bool:
        return isinstance(record.get("kind"), str)

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._append(map(_line, records))

    def _append(self, lines: Iterable[str]) -> None:
        self._file.append("".join(lines).encode())

    def close(self) -> None:
        """Close the file; everything in it is on disk already."""
        self._file.close()


class StepsFile(_Lines):
    """A JSONL file whose objects have a `step`, ascending; `known` are those it was opened with."""

    def __init__(self, path: Path) -> None:
        self.known: set[int] = set()
        super().__init__(path)

    def _fits(self, record: Mapping[str, Any]) -> bool:
        step = record.get("step")
        if type(step) is not int:
            return False
        self.known.add(step)
        return True

    def truncate_after(self, step: int) -> None:
        """Forget every object of a step after `step`. No more is read than these, and nothing is
        copied: the file may be larger than memory, and than the room on its disk."""
        end: int | None = None
        for start, row in lines_from_end(self.path):
            if row["step"] <= step:
                break
            end = start
        if end is not None:
            self._file.shorten(end)


class MetricsFile(StepsFile):
    """`metrics.jsonl` and `evals.jsonl`: one object a step, its figures beside `step`."""

    def append(self, step: int, metrics: Mapping[str, float], **labels: int | str) -> None:
        """Write the figures of `step`, and the `labels` before them.

        Raises:
            NotFinite: a figure is NaN or infinite; nothing is written.
        """
        check_finite(step, metrics)
        figures = {name: float(value) for name, value in metrics.items()}
        self._write([{"step": step, **labels, **figures}])


class SamplesFile(StepsFile):
    """`samples.jsonl` and `eval_samples.jsonl`: some groups of each step."""

    def append(self, step: int, samples: Iterable[Mapping[str, Any]]) -> None:
        """Write samples of `step`, one object each. ValueError where a number is not finite."""
        self._write({"step": step, **sample} for sample in samples)


class EventsFile(_Lines):
    """`events.jsonl`: what happened, when (seconds since 1970), and why. Never truncated: what was
    rolled back did happen."""

    def append(self, kind: EventKind | str, **fields: Any) -> None:
        """Write one event. Raises as `event_line`."""
        self.append_all([event_line(kind, **fields)])

    def append_all(self, events: Iterable[str]) -> None:
        """Write events, each of `event_line`, at once: all are on disk then, or none."""
        self._append(events)
