"""What two places hold that can be compared: evaluations, or those of a run's own training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aligntune.errors import UserError
from aligntune.evaluation.compare import PASSED
from aligntune.evaluation.store import SUMMARY, evaluations_of, read_rows, read_summary
from aligntune.evaluation.summary import REWARD, Row, Success, path_of
from aligntune.runs.reading import EVAL_SAMPLES, RunOnDisk, open_run

TRAINING = "eval of training"
"""The decoding of evaluations that a run makes beside training."""


@dataclass(frozen=True)
class Evaluated:
    """The rows of one evaluation."""

    name: str
    seed: int
    all_rows: Sequence[Row]
    success: Success | None = None  # when a completion passed; None: none was judged
    weights: Mapping[str, float] | None = None  # of each criterion in the reward; None: not known
    temperatures: Mapping[str, float] = field(default_factory=dict)  # of decodings, where known

    @property
    def criteria(self) -> list[str]:
        """What its completions are scored by."""
        said = (said for row in self.all_rows for said in row.get("completions", ()))
        return list(dict.fromkeys(name for each in said for name in each["scores"]))

    @property
    def reward(self) -> str:
        """What the reward of a completion is, for a person."""
        if self.weights is None:
            return " and ".join(self.criteria)
        return " + ".join(
            name if weight == 1 else f"{weight:g} x {name}"
            for name, weight in self.weights.items()
            if weight
        )

    def sums_as(self, other: Evaluated) -> bool:
        """Whether the reward is the same sum in both, as far as is known."""
        if self.weights is None or other.weights is None:
            return {*self.criteria} == {*other.criteria}
        own, theirs = (
            {name: weight for name, weight in weights.items() if weight}
            for weights in (self.weights, other.weights)
        )
        return own == theirs

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
        rows = read_rows(place)
        heats = {way: decoded.temperature for way, decoded in summary.decodings.items()}
        return Evaluated(str(place), summary.seed, rows, summary.success, summary.weights, heats)
    run = open_run(place)
    if folders := evaluations_of(place):
        return read_evaluated(folders[-1])
    if run.algorithm == "reward_model":
        raise UserError(f"{place} has a reward model, which writes no completions to compare")
    rows = run.last_groups(EVAL_SAMPLES)
    if not rows:
        by = " --config CONFIG.yaml, of a run with prompts and rewards" if run.is_preference else ""
        raise UserError(f"{place} has no evaluation; make one: aligntune evaluate {place}{by}")
    step = rows[0]["step"]
    asked = next((each.get("eval/prompts") for each in run.evals if each["step"] == step), None)
    of = "" if asked is None or asked <= len(rows) else f", {len(rows)} of its {asked:g} prompts"
    kept = [{**row, "decoding": TRAINING} for row in rows]
    name = f"{place}, evaluation of step {step} in training{of}"
    return Evaluated(name, 0, kept, weights=_weights(run, rows[0]), temperatures=_temperatures(run))


def _temperatures(run: RunOnDisk) -> dict[str, float]:
    """Of the evaluations in a run's training, by its config; empty where that does not say."""
    section = run.config.get("eval")
    heat = section.get("temperature") if isinstance(section, Mapping) else None
    return {TRAINING: heat} if isinstance(heat, int | float) else {}


def _weights(run: RunOnDisk, row: Row) -> dict[str, float] | None:
    """Of each criterion of a run's completions, by its config, which has them in the same order."""
    rewards, scores = run.config.get("rewards") or [], row["completions"][0]["scores"]
    if len(rewards) != len(scores):
        return None
    weights = [reward.get("weight", 1.0) if isinstance(reward, dict) else 1.0 for reward in rewards]
    return dict(zip(scores, weights, strict=True))


def both(a: Path, b: Path, decoding: str | None, metric: str) -> tuple[Evaluated, Evaluated, str]:
    """Two evaluations, and the decoding to compare them by: greedy where both have it. Raises
    UserError where they have none in common or drew it at other temperatures, or `metric` is not
    the same of both: verdicts by different rules, or sums of other criteria or weights."""
    first, second = read_evaluated(a), read_evaluated(b)
    common = [way for way in first.decodings if way in second.decodings]
    if not common or (decoding is not None and decoding not in common):
        raise UserError(
            f"no {'common' if decoding is None else decoding} completions: {first.name} has "
            f"{', '.join(first.decodings)}, {second.name} has {', '.join(second.decodings)}"
        )
    way = decoding or common[0]
    heats = first.temperatures.get(way), second.temperatures.get(way)
    if None not in heats and heats[0] != heats[1]:
        again = "evaluate one of them again with the other's --temperature"
        if way == TRAINING:
            again = "aligntune evaluate makes evaluations of both that can be compared"
        elif "greedy" in common:
            again = f"compare by --decoding greedy, or {again}"
        raise UserError(
            f"the completions ({way}) are drawn at temperature {heats[0]:g} in {first.name} and at "
            f"{heats[1]:g} in {second.name}, so their difference says nothing of the models; "
            f"{again}"
        )
    rules = first.success, second.success
    if metric == PASSED and None not in rules and rules[0] != rules[1]:
        raise UserError(
            f"a completion passed by {rules[0]} in {first.name} and by {rules[1]} in "
            f"{second.name}; evaluate one of them again with the other's --success, or compare by "
            "a reward"
        )
    by_sum = any(rule is not None and rule.criterion == REWARD for rule in rules)
    if (metric == REWARD or (metric == PASSED and by_sum)) and not first.sums_as(second):
        shared = [path_of(name) for name in first.criteria if name in second.criteria]
        by = f"compare by one criterion, as in --metric {shared[0]}, or " if shared else ""
        raise UserError(
            f"the reward is {first.reward} in {first.name} and {second.reward} in {second.name}, "
            f"so its difference says nothing of the models; {by}evaluate one of them again by the "
            "other's rewards"
        )
    return first, second, way
