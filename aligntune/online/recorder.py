"""What an online run writes besides: evaluations, groups of samples, and a trace."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from actors.timeline import Span
from aligntune.config.online import RunConfig
from aligntune.runs.jsonl import last_row, long_read, read_lines
from aligntune.runs.measure import KEY
from aligntune.runs.recorder import Recorder
from aligntune.runs.rundir import RunDir
from aligntune.tracking import lines
from aligntune.tracking.metrics import EventKind, MetricsFile, SamplesFile, held
from aligntune.tracking.tables import GROUPS
from aligntune.tracking.trace import Trace


class OnlineRecorder(Recorder):
    """The run's files are open while this is entered."""

    def __init__(
        self,
        config: RunConfig,
        rundir: RunDir,
        total_steps: int,
        after_step: int,
        since: float | None = None,
        measure: str = "",
    ) -> None:
        """`after_step` is the step of the checkpoint the run starts from, 0 at the beginning;
        `since` is when the run was called; `measure` is what its evaluations are made by, as
        `runs.measure` has it."""
        super().__init__(config, config.tracking, rundir, total_steps, after_step, since)
        self._evals = MetricsFile(rundir.file("evals.jsonl"))
        if (told := long_read("the samples", rundir.file("samples.jsonl"))) is not None:
            self.stage(told)
        self._samples = SamplesFile(rundir.file("samples.jsonl"))
        self._eval_samples = SamplesFile(rundir.file("eval_samples.jsonl"))
        self._steps += (self._evals, self._samples, self._eval_samples)
        self._evaluated = {row["step"]: row for row in read_lines(self._evals.path)}
        self._measure = measure
        self._asked: list[str] = []  # a group of the last evaluation, for a person
        self._trace = Trace(rundir.file("trace.json")) if config.tracking.profile else None

    def __exit__(self, *exc: object) -> None:
        try:
            super().__exit__(*exc)
        finally:
            if self._trace is not None:
                self._trace.close()

    def call(self, span: Span) -> None:
        """A remote call that is over."""
        if self._trace is not None:
            self._writer.do(partial(self._trace.add, span))

    @property
    def last_evaluation(self) -> int:
        """The step of the last evaluation written by what this start measures by; -1 where there
        is none."""
        rows = self._evaluated.items()
        return max((step for step, row in rows if self._is_own(row)), default=-1)

    @property
    def measured_anew(self) -> bool:
        """Whether there are next evaluations, and all before were made by something else."""
        return bool(self._measure and self._evaluated) and self.last_evaluation < 0

    def _is_own(self, row: Mapping[str, Any]) -> bool:
        return row.get(KEY, self._measure) == self._measure

    @property
    def evaluations(self) -> Sequence[Mapping[str, Any]]:
        """The figures of every evaluation written, with their `step`; any thread may ask."""
        return [*self._evaluated.values()]

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last step, and those of its evaluation; for the end of a run."""
        self.wait()
        found = last_row(self._metrics.path) or {"step": 0}
        evaluated = last_row(self._evals.path)
        if evaluated and evaluated["step"] == found["step"]:
            found |= evaluated
        return {name: value for name, value in found.items() if "/" in name}

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of a step. The loss and its gradient were finite, or the update would not
        have been applied: a figure that overflows is told as an event and held."""
        super().step(step, self._held(step, metrics))

    def _held(self, step: int, figures: Mapping[str, float]) -> dict[str, float]:
        odd = sorted(name for name, value in figures.items() if not math.isfinite(value))
        if odd:
            self.event(EventKind.FIGURES_OVERFLOWED, step=step, figures=", ".join(odd))
        return held(figures)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """The figures of an evaluation of the weights of `step`."""
        figures = self._held(step, figures)
        labels = {KEY: self._measure} if self._measure else {}
        if step in self._evaluated:  # by something else, before what is measured changed
            self._writer.do(partial(self._evals.truncate_after, step - 1))
        self._writer.do(partial(self._evals.append, step, figures, version=step, **labels))
        self._evaluated = {**self._evaluated, step: {"step": step, **labels, **figures}}
        self._log(step, figures)
        self._progress.evaluation(figures)
        said = {"reward": f"{figures['eval/reward/mean']:.3f}"}
        said |= {name: f"{x:.3f}" for name, x in lines.criteria(figures, "eval/").items()}
        self._progress.note(f"evaluation after step {step}: {lines.fitted(said, None)}")
        for line in self._asked:
            self._progress.note(line)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Groups of a step."""
        self._writer.do(partial(self._samples.append, step, rows))

    def eval_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Groups of an evaluation."""
        if step in self._evaluated:
            self._writer.do(partial(self._eval_samples.truncate_after, step - 1))
        self._writer.do(partial(self._eval_samples.append, step, rows))
        for view in self._views:
            view.samples(step, rows[:GROUPS])
        # The first prompt of each evaluation: the same one, so that its answers can be compared.
        self._asked = lines.sample(rows[0], self._progress.width) if rows else []

    def truncate_after(self, step: int) -> None:
        """Forget what was written of later steps, which will come again."""
        super().truncate_after(step)
        self._evaluated = {known: row for known, row in self._evaluated.items() if known <= step}
        self.last_evaluated(self._evaluated.get(self.last_evaluation, {}))
        if step not in self._evaluated:
            # Samples come before their figures: where a kill came between, both come again.
            self._writer.do(partial(self._eval_samples.truncate_after, step - 1))
