"""The best checkpoint of a run, by a figure of its evaluations.

Invariant: nothing is written down that could be torn or contradict the run. The best one is the
whole checkpoint with the best figure in `evals.jsonl`; a run keeps it beside the newest ones, and a
rollback that takes either away has taken the best too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aligntune.config.records import OnlineCheckpointSpec
from aligntune.errors import UserError
from aligntune.runs.checkpoint import Checkpoint, Checkpoints
from aligntune.runs.jsonl import readable
from aligntune.runs.measure import comparable
from aligntune.runs.rundir import RunDir

EVALS = "evals.jsonl"


@dataclass(frozen=True)
class Best:
    """What is best: the highest or the lowest value of a figure; of equal ones the earliest."""

    metric: str
    mode: Literal["max", "min"] = "max"

    def values(self, rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
        """The figure of each evaluated step that has one and can be compared with the last; `rows`
        are those of evals.jsonl, in order."""
        return {
            row["step"]: float(row[self.metric])
            for row in comparable([*rows])
            if type(row.get("step")) is int and isinstance(row.get(self.metric), int | float)
        }

    def ranked(self, values: Mapping[int, float]) -> list[int]:
        """Steps, the best first."""
        sign = -1 if self.mode == "max" else 1
        return sorted(values, key=lambda step: (sign * values[step], step))

    def among(
        self, values: Mapping[int, float], steps: Sequence[int], whole: Callable[[int], bool]
    ) -> int | None:
        """The best of `steps` that is whole and has a value; those behind it are not looked at."""
        own = [step for step in self.ranked(values) if step in set(steps)]
        return next((step for step in own if whole(step)), None)


def best_of(spec: OnlineCheckpointSpec) -> Best | None:
    """What a config says is best."""
    return None if spec.best is None else Best(spec.best.metric, spec.best.mode)


def best_checkpoint(rundir: RunDir, best: Best | None) -> tuple[Checkpoint, str]:
    """The best checkpoint of the run, and what it is in words. Raises UserError where the run keeps
    none, or has none yet."""
    if best is None:
        raise UserError(
            f"the run in {rundir.path} keeps no best checkpoint; set checkpoint.best.metric and "
            "eval.every_steps when it is trained, as in checkpoint.best.metric=eval/reward/mean "
            "eval.every_steps=20"
        )
    checkpoints = Checkpoints(rundir.file("checkpoints"), keep_last=1, to_read=True)
    values = best.values(readable(rundir.file(EVALS)))
    step = best.among(values, checkpoints.folders(), checkpoints.exists)
    checkpoint = None if step is None else checkpoints.of(step)
    if step is None or checkpoint is None:
        raise UserError(
            f"no whole checkpoint in {checkpoints.directory} is of an evaluated step: evaluations "
            f"with {best.metric} are of the steps {_steps(values)}, checkpoints of "
            f"{_steps(checkpoints.folders())}"
        )
    said = f"{best.metric} {values[step]:.4g}"
    first = best.ranked(values)[0]
    if first != step:
        said += f"; step {first} had {values[first]:.4g}, and there is no whole checkpoint of it"
    return checkpoint, said


def _steps(steps: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(steps))) or "none"
