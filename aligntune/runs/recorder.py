"""What any run writes for people and programs: figures, events, trackers, progress.

Invariant: nothing here waits for a disk or a service. Lines go to their files in a thread, in the
order they were given; trackers have threads of their own and never end a run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel

from aligntune.config.online import TrackingSpec
from aligntune.runs.jsonl import read_lines
from aligntune.runs.rundir import RunDir
from aligntune.runs.writer import Writer
from aligntune.tracking.metrics import EventKind, EventsFile, MetricsFile, StepsFile, check_finite
from aligntune.tracking.progress import Progress
from aligntune.tracking.views import open_views

SHOWN = {
    EventKind.RESUMED,
    EventKind.GROUP_QUARANTINED,
    EventKind.REPLICA_LOST,
    EventKind.REPLICA_JOINED,
    EventKind.POLICY_REBUILT,
    EventKind.CHECKPOINT_FAILED,
    EventKind.CHECKPOINT_DAMAGED,
    EventKind.FIGURES_OVERFLOWED,
    EventKind.NOT_COPIED,
    EventKind.TRACKER_FAILED,
}


def last_step(metrics: Path) -> int:
    """The last step whose figures are in `metrics.jsonl`; -1 where there is none."""
    rows = read_lines(metrics) if metrics.exists() else []
    return max((int(row["step"]) for row in rows), default=-1)


class Recorder:
    """The run's files are open while this is entered."""

    def __init__(
        self,
        config: BaseModel,
        tracking: TrackingSpec,
        rundir: RunDir,
        total_steps: int,
        after_step: int,
    ) -> None:
        """`after_step` is the last step that trackers already know, 0 at the beginning."""
        self._rundir = rundir
        self._config = config
        self._metrics = MetricsFile(rundir.file("metrics.jsonl"))
        self._events = EventsFile(rundir.file("events.jsonl"))
        self._steps: tuple[StepsFile, ...] = (self._metrics,)
        self._writer = Writer(f"the files of {rundir.path}")
        self._progress = Progress(total_steps)
        self._views = open_views(
            tracking.trackers,
            rundir.path,
            tracking.project,
            config.model_dump(mode="json"),
            after_step,
            partial(self.event, EventKind.TRACKER_FAILED),
        )
        self._logged = after_step
        self.ran: dict[str, str] = {}  # the rollout `engine` and `backend` that really run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.close()
        for view in self._views:
            view.close()
        try:
            self._writer.close()
        finally:
            for file in (*self._steps, self._events):
                file.close()

    def wait(self) -> None:
        """Until all that was recorded is on disk; for a thread of its own, or the end of a run.

        Raises RunFailed where the disk does not take it.
        """
        self._writer.wait()

    def event(self, kind: EventKind | str, **fields: Any) -> None:
        """Write an event; those a person should see at once are shown too."""
        kind = EventKind(kind)
        self._writer.do(partial(self._events.append, kind, time=time.time(), **fields))
        if kind in SHOWN:
            self._progress.note(f"{kind}: " + ", ".join(f"{k} {v}" for k, v in fields.items()))

    def note(self, text: str) -> None:
        """Show something to the person who watches."""
        self._progress.note(text)

    def role(self, name: str, info: Mapping[str, Any]) -> None:
        """What an actor said of itself when it started."""
        self.event(EventKind.ROLE_STARTED, role=name, **info)
        said = {key: str(info[key]) for key in ("engine", "backend") if key in info}
        if not said.items() <= self.ran.items():
            self.ran |= said
            self._writer.do(partial(self._rundir.describe, self._config, dict(self.ran)))
            where = f" on {info['device']}" if "engine" not in said and "device" in info else ""
            self._progress.note(
                f"{name}: " + ", ".join(f"{k} {v}" for k, v in said.items()) + where
            )

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
        else:
            self._progress.evaluation(metrics)

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        self._logged = max(self._logged, step)
        for view in self._views:
            view.log(step, figures)

    def written(self, step: int) -> dict[str, float]:
        """The figures of `step` as they are on disk; none where there are none."""
        self.wait()
        rows = {row.pop("step"): row for row in read_lines(self._metrics.path)}
        return rows.get(step, {})

    def truncate_after(self, step: int) -> None:
        """Forget what was written of later steps, which will come again."""
        for file in self._steps:
            self._writer.do(partial(file.truncate_after, step))
        if self._logged > step:
            self._logged = step
            for view in self._views:
                view.truncate_after(step)
