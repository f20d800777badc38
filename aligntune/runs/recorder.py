"""What any run writes for people and programs: figures, events, trackers, progress.

Invariant: nothing here waits for a disk or a service. Lines go to their files in a thread, in the
order they were given; trackers have threads of their own and never end a run.
"""

from __future__ import annotations

import shlex
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import wait
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from aligntune.config.records import TrackingSpec
from aligntune.errors import Interrupted, RunFailed
from aligntune.runs.books import Books
from aligntune.runs.deadline import asked
from aligntune.runs.jsonl import lines_from_end, readable
from aligntune.runs.rundir import RunDir
from aligntune.runs.writer import Joined, Writer
from aligntune.tracking.advice import RECENT, STILL, Adviser
from aligntune.tracking.metrics import (
    EventKind,
    EventsFile,
    MetricsFile,
    StepsFile,
    check_finite,
    event_line,
)
from aligntune.tracking.progress import Progress
from aligntune.tracking.trackers import Ended
from aligntune.tracking.views import open_views

SHOWN = {
    EventKind.RESUMED,
    EventKind.GROUP_QUARANTINED,
    EventKind.REPLICA_LOST,
    EventKind.REPLICA_JOINED,
    EventKind.POLICY_REBUILT,
    EventKind.CHECKPOINT_FAILED,
    EventKind.CHECKPOINT_DAMAGED,
    EventKind.LINES_DAMAGED,
    EventKind.LEDGER_DAMAGED,
    EventKind.FIGURES_OVERFLOWED,
    EventKind.NOT_COPIED,
    EventKind.NOT_EVALUATED,
    EventKind.TRACKER_FAILED,
    EventKind.REPORT_FAILED,
    EventKind.CARD_FAILED,
    EventKind.NOT_PUSHED,
}
REPORT_SECONDS = 60.0  # a report that takes longer is left behind
LONG = 200  # characters of a field that is told once
TOLD = 500  # such fields that are kept: those that were told last


def _ended(error: object = None) -> Ended:
    """How a run ended that left its records by `error`; None is no error."""
    if error is None:
        return "finished"
    stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
    return "stopped" if stopped else "failed"


def last_step(metrics: Path) -> int:
    """The last step whose figures are in `metrics.jsonl`; -1 where there is none."""
    steps = (row["step"] for row in readable(metrics) if type(row.get("step")) is int)
    return max(steps, default=-1)


def _steps_before(metrics: Path, step: int) -> list[tuple[int, Mapping[str, float]]]:
    """The steps of `metrics.jsonl` up to `step` that an `Adviser` is to know, ascending. No more is
    read than the two ends of the file."""
    if step <= 0:
        return []
    first = islice(readable(metrics), RECENT + 1)  # one may be step 0
    last = (row for _, row in lines_from_end(metrics) if row["step"] <= step)
    found = {row["step"]: row for row in (*first, *islice(last, STILL))}
    return [(known, found[known]) for known in sorted(found) if 0 < known <= step]


class Recorder:
    """The run's files are open while this is entered."""

    def __init__(
        self,
        config: BaseModel,
        tracking: TrackingSpec,
        rundir: RunDir,
        total_steps: int,
        after_step: int,
        since: float | None = None,
    ) -> None:
        """`after_step` is the last step that trackers already know, 0 at the beginning; `since` is
        when the run was called, by time.monotonic; default: now."""
        self.since = time.monotonic() if since is None else since
        self._rundir = rundir
        self._config = config
        self._metrics = MetricsFile(rundir.file("metrics.jsonl"))
        self._events = EventsFile(rundir.file("events.jsonl"))
        self._steps: tuple[StepsFile, ...] = (self._metrics,)
        self._writer = Writer(f"the files of {rundir.path}")
        self._progress = Progress(
            total_steps, since=self.since, lost=partial(self.event, EventKind.NOT_SHOWN)
        )
        self._views = open_views(
            rundir.path,
            tracking,
            config.model_dump(mode="json"),
            after_step,
            partial(self.event, EventKind.TRACKER_FAILED),
        )
        self._logged = after_step
        self._adviser = Adviser(_steps_before(self._metrics.path, after_step))
        self.cures: dict[str, str] = {}  # by trouble, what else helps in this run
        self._awaited: dict[str, int] = {}  # how many of each role have not started yet
        self._stopping = False
        self._seen: OrderedDict[str, None] = OrderedDict()  # what was told, if it was long
        self.books: Callable[[], Books] | None = None
        """What has become of the groups; set by who counts them, once they know all of the run: to
        read it takes minutes."""
        self.ran: dict[str, str] = {}  # the rollout `engine` and `backend` that really run

    def __enter__(self) -> Self:
        for file in (*self._steps, self._events):
            if file.damaged:
                self.event(EventKind.LINES_DAMAGED, file=file.path.name, lines=file.damaged)
        return self

    def __exit__(self, *exc: object) -> None:
        ended = _ended(*exc[1:2])
        with ExitStack() as ending:  # all of it, the last given first, whatever of it fails
            for file in (*self._steps, self._events):
                ending.callback(file.close)
            ending.callback(self._writer.close)
            ending.callback(self._progress.close)  # a terminal may hold it up for hours
            for view in reversed(self._views):
                ending.callback(view.close, ended)
            self._report()

    def _report(self) -> None:
        """Write report.html, however the run has ended. Where that fails it is an event: a report
        neither ends a run nor hides why it ended."""
        if not self._rundir.config.is_file():
            return
        from aligntune.report.write import write_report

        try:
            self.wait()
            books = None if self.books is None else self.books()
            answer = asked(lambda: write_report([self._rundir.path], books=books))
            wait({answer}, REPORT_SECONDS)
            if answer.done():
                self.note(f"report: {answer.result()}")
                return
            path = shlex.quote(str(self._rundir.path))
            reason = (
                f"not written within {REPORT_SECONDS:g} s; make it with `aligntune report {path}`"
            )
            self.event(EventKind.REPORT_FAILED, reason=reason)
        except Exception as error:  # noqa: BLE001 - of a view on a run that is over
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            with suppress(RunFailed):  # the disk takes nothing any more, which the run has told
                self.event(EventKind.REPORT_FAILED, reason=reason)

    @property
    def known(self) -> Collection[int]:
        """The steps whose figures were written before."""
        return self._metrics.known

    def wait(self) -> None:
        """Until all that was recorded is on disk; for a thread of its own, or the end of a run.

        Raises RunFailed where the disk does not take it.
        """
        self._writer.wait()

    def event(self, kind: EventKind | str, **fields: Any) -> None:
        """Write an event; those a person should see at once are shown too. Raises as `event_line`,
        for this event alone."""
        kind = EventKind(kind)
        self._writer.do(Joined(self._events.append_all, event_line(kind, **fields)))
        if kind is EventKind.CHECKPOINT_SAVED and self._stopping:
            self._progress.note(f"the checkpoint of step {fields['step']} is written")
        if kind in SHOWN:
            self._progress.note(f"{kind}: " + ", ".join(self._told(fields)))

    def _told(self, fields: Mapping[str, Any]) -> Iterator[str]:
        """An event's fields for a person; a long one, such as a traceback, is told once as long as
        it is among the last `TOLD` ones."""
        for name, value in fields.items():
            text = f"{name} {value}"
            if len(text) <= LONG:
                yield text
                continue
            known = text in self._seen
            self._seen[text] = None
            self._seen.move_to_end(text)
            if len(self._seen) > TOLD:
                self._seen.popitem(last=False)
            yield f"{text[: LONG // 2].splitlines()[0]}... (as before)" if known else text

    def note(self, text: str) -> None:
        """Show something to the person who watches."""
        self._progress.note(text)

    def stage(self, text: str) -> None:
        """Something of the start is done: shown with the time."""
        self._progress.stage(text)

    def starting(self, roles: Mapping[str, tuple[int, str]]) -> None:
        """Roles start: how many of each, and what they do until they are ready."""
        self._awaited = {role: size for role, (size, _) in roles.items()}
        self._progress.starting({role: does for role, (_, does) in roles.items()})

    def watch(self, activity: Callable[[], Mapping[str, str]]) -> None:
        """`activity()` says what each role does now."""
        self._progress.watch(activity)

    def stopping(self, text: str) -> None:
        """The run was asked to stop: it is said at once, and so is its last checkpoint."""
        self._stopping = True
        self.note(text)

    def role(self, name: str, info: Mapping[str, Any]) -> None:
        """What an actor said of itself when it started."""
        self.event(EventKind.ROLE_STARTED, role=name, **info)
        said = {key: str(info[key]) for key in ("engine", "backend") if key in info}
        where = f" on {info['device']}" if "engine" not in said and "device" in info else ""
        what = ", ".join(said.values()) + where if said else ""
        new = not said.items() <= self.ran.items()
        if new:
            self.ran |= said
            self._writer.do(partial(self._rundir.describe, self._config, dict(self.ran)))
        role = name if name in self._awaited else name.rpartition("-")[0]
        if self._awaited.get(role, 0) > 0:
            self._awaited[role] -= 1
            if self._awaited[role] == 0:
                self._progress.ready(role, what)
        elif new:
            self._progress.note(f"{name}: {what}")

    @property
    def engine(self) -> str:
        """The rollout engine that really runs."""
        return self.ran.get("engine", "")

    @property
    def backend(self) -> str:
        """What really loads and steps the policy, with versions."""
        return self.ran.get("backend", "")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of a step; 0 is before the first. Raises NotFinite for one that is none."""
        check_finite(step, metrics)
        self._writer.do(partial(self._metrics.append, step, metrics))
        self._log(step, metrics)
        if step:
            self._progress.step(step, metrics)
            for name, said in self._adviser.hear(step, metrics).items():
                said += f"; {self.cures[name]}" if name in self.cures else ""
                self.event(EventKind.TROUBLE, step=step, name=name, advice=said)
                self._progress.note(f"warning: {said}")
        else:
            self._progress.evaluation(metrics)

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        self._logged = max(self._logged, step)
        for view in self._views:
            view.log(step, figures)

    def written(self, step: int) -> dict[str, float]:
        """The figures of `step` as they are on disk; none where there are none."""
        self.wait()
        for _, row in lines_from_end(self._metrics.path):
            if row["step"] == step:
                return {name: value for name, value in row.items() if name != "step"}
        return {}

    def last_evaluated(self, figures: Mapping[str, float]) -> None:
        """A start or a rollback has these `eval/*` figures before it, none where they are none."""
        self._progress.last_evaluated(figures)

    def truncate_after(self, step: int) -> None:
        """Forget what was written of later steps, which will come again."""
        for file in self._steps:
            self._writer.do(partial(file.truncate_after, step))
        self._adviser.back_to(step)
        if self._logged > step:
            self._logged = step
            for view in self._views:
                view.truncate_after(step)
