"""What two places hold that can be compared: evaluations, or those of a run's own training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aligntune.errors import UserError
from aligntune.evaluation.compare import PASSED
from aligntune.evaluation.store import SUMMARY, evaluations_of, read_rows, read_summary
from aligntune.evaluation.summary import Row, Success
from aligntune.runs.reading import EVAL_SAMPLES, open_run

TRAINING = "eval of training"
"""The decoding of evaluations that a run makes beside training."""


@dataclass(frozen=True)
class Evaluated:
    """The rows of one evaluation."""

    name: str
    seed: int
    all_rows: Sequence[Row]
    success: Success | None = None  # when a completion passed; None: none was judged

    @property
    def decodings(self) -> list[str]:
        """Those that it has rows of."""
        return list(dict.fromkeys(row["decoding"] for row in self.all_rows))

    def rows(self, decoding: str) -> list[Row]:
        """Those of one decoding."""
        return [row for row in self.all_rows if row["decoding"] == decoding]


def read_evaluated(place: Path) -> Evaluated:
    """An evaluation's folder; or a run's newest one, else the last of its training. Raises
    UserError."""
    if (place / SUMMARY).is_file():
        summary = read_summary(place)
        return Evaluated(str(place), summary.seed, read_rows(place), summary.success)
    run = open_run(place)
    if folders := evaluations_of(place):
        return read_evaluated(folders[-1])
    rows = run.last_groups(EVAL_SAMPLES)
    if not rows:
        raise UserError(f"{place} has no evaluation; make one: aligntune evaluate {place}")
    step = rows[0]["step"]
    kept = [{**row, "decoding": TRAINING} for row in rows]
    return Evaluated(f"{place}, evaluation of step {step} in training", 0, kept)


def both(a: Path, b: Path, decoding: str | None, metric: str) -> tuple[Evaluated, Evaluated, str]:
    """Two evaluations, and the decoding to compare them by: greedy where both have it. Raises
    UserError where they have none in common, or `metric` is verdicts by different rules."""
    first, second = read_evaluated(a), read_evaluated(b)
    common = [way for way in first.decodings if way in second.decodings]
    if not common or (decoding is not None and decoding not in common):
        raise UserError(
            f"no {'common' if decoding is None else decoding} completions: {first.name} has "
            f"{', '.join(first.decodings)}, {second.name} has {', '.join(second.decodings)}"
        )
    rules = first.success, second.success
    if metric == PASSED and None not in rules and rules[0] != rules[1]:
        raise UserError(
            f"a completion passed by {rules[0]} in {first.name} and by {rules[1]} in "
            f"{second.name}; evaluate one of them again with the other's --success, or compare by "
            "a reward"
        )
    return first, second, decoding or common[0]
