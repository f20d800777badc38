"""Everything a run writes for people and programs: figures, samples, events, trackers, progress.

Invariant: nothing here waits for a disk or a service. Lines go to their files in a thread, in the
order they were given; trackers have threads of their own and never end a run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from actors.timeline import Span
from aligntune.config.online import RunConfig
from aligntune.runs.jsonl import read_lines
from aligntune.runs.rundir import RunDir
from aligntune.runs.writer import Writer
from aligntune.tracking.metrics import (
    EventKind,
    EventsFile,
    MetricsFile,
    SamplesFile,
    check_finite,
)
from aligntune.tracking.progress import Progress
from aligntune.tracking.trace import Trace
from aligntune.tracking.views import open_views

SHOWN = {
    EventKind.RESUMED,
    EventKind.GROUP_QUARANTINED,
    EventKind.REPLICA_LOST,
    EventKind.REPLICA_JOINED,
    EventKind.POLICY_REBUILT,
    EventKind.CHECKPOINT_DAMAGED,
    EventKind.NOT_COPIED,
    EventKind.TRACKER_FAILED,
}


class Recorder(AbstractContextManager["Recorder"]):
    """The run's files are open while this is entered."""

    def __init__(
        self, config: RunConfig, rundir: RunDir, total_steps: int, after_step: int
    ) -> None:
        """`after_step` is the step of the checkpoint the run starts from, 0 at the beginning."""
        self._rundir = rundir
        self._config = config
        self._metrics = MetricsFile(rundir.file("metrics.jsonl"))
        self._evals = MetricsFile(rundir.file("evals.jsonl"))
        self._samples = SamplesFile(rundir.file("samples.jsonl"))
        self._eval_samples = SamplesFile(rundir.file("eval_samples.jsonl"))
        self._events = EventsFile(rundir.file("events.jsonl"))
        self._steps = (self._metrics, self._evals, self._samples, self._eval_samples)
        self._evaluated = {row["step"] for row in read_lines(self._evals.path)}
        self._writer = Writer(f"the files of {rundir.path}")
        self._progress = Progress(total_steps)
        tracking = config.tracking
        self._views = open_views(
            tracking.trackers,
            rundir.path,
            tracking.project,
            config.model_dump(mode="json"),
            after_step,
            partial(self.event, EventKind.TRACKER_FAILED),
        )
        self._trace = Trace(rundir.file("trace.json")) if tracking.profile else None
        self._logged = 0
        self.ran: dict[str, str] = {}  # the rollout `engine` and `backend` that really run

    def __exit__(self, *exc: object) -> None:
        self._progress.close()
        for view in self._views:
            view.close()
        try:
            self._writer.close()
        finally:
            for file in (*self._steps, self._events):
                file.close()
            if self._trace is not None:
                self._trace.close()

    def wait(self) -> None:
        """Until all that was recorded is on disk; for a thread of its own, or the end of a run.

        Raises RunFailed where the disk does not take it.
        """
        self._writer.wait()

    def call(self, span: Span) -> None:
        """A remote call that is over."""
        if self._trace is not None:
            self._writer.do(partial(self._trace.add, span))

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
            self._progress.note(f"{name}: " + ", ".join(f"{k} {v}" for k, v in said.items()))

    @property
    def engine(self) -> str:
        """The rollout engine that really runs."""
        return self.ran.get("engine", "")

    @property
    def backend(self) -> str:
        """What really loads and steps the policy, with versions."""
        return self.ran.get("backend", "")

    @property
    def last_evaluation(self) -> int:
        """The step of the last evaluation written; -1 where there is none."""
        return max(self._evaluated, default=-1)

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last step, and those of its evaluation; for the end of a run."""
        self.wait()
        steps, evaluations = read_lines(self._metrics.path), read_lines(self._evals.path)
        found = dict(steps[-1]) if steps else {"step": 0}
        if evaluations and evaluations[-1]["step"] == found["step"]:
            found |= evaluations[-1]
        return {name: value for name, value in found.items() if "/" in name}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of a step. Raises NotFinite for a figure that is none."""
        check_finite(step, metrics)
        self._writer.do(partial(self._metrics.append, step, metrics))
        self._log(step, metrics)
        self._progress.step(step, metrics)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of an evaluation of the weights of `step`. Raises NotFinite."""
        check_finite(step, figures)
        self._writer.do(partial(self._evals.append, step, figures, version=step))
        self._evaluated.add(step)
        self._log(step, figures)
        self._progress.evaluation(figures)
        reward = figures["eval/reward/mean"]
        self._progress.note(f"evaluation after step {step}: reward {reward:.3f}")

    def _log(self, step: int, figures: Mapping[str, float]) -> None:
        self._logged = max(self._logged, step)
        for view in self._views:
            view.log(step, figures)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Groups of a step."""
        self._writer.do(partial(self._samples.append, step, rows))

    def eval_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Groups of an evaluation."""
        self._writer.do(partial(self._eval_samples.append, step, rows))

    def truncate_after(self, step: int) -> None:
        """Forget what was written of later steps, which will come again."""
        for file in self._steps:
            self._writer.do(partial(file.truncate_after, step))
        self._evaluated = {known for known in self._evaluated if known <= step}
        if self._logged > step:  # trackers were opened without what an earlier process logged
            self._logged = step
            for view in self._views:
                view.truncate_after(step)
