"""Two evaluations of the same prompts, paired by prompt. Pure.

A prompt is won by the one whose completions of it have the higher mean score. Wins and losses are
weighed by the exact sign test, which on pass and fail of one completion a prompt is McNemar's exact
test; the mean difference has a bootstrap interval over prompts. A prompt that has no score on one
side is left out, and counted.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from aligntune.errors import UserError, closest
from aligntune.evaluation.statistics import Estimate, bootstrap, sign_test
from aligntune.evaluation.summary import REWARD, Row, criterion_of, path_of, score_of

PASSED = "passed"
Key = tuple[str, int]  # what was asked, and which time


class Side(BaseModel):
    """What one of the two made of a prompt."""

    model_config = ConfigDict(frozen=True)

    score: float  # the mean over its completions
    text: str | None  # of its first completion


class Pair(BaseModel):
    """One prompt and both sides."""

    model_config = ConfigDict(frozen=True)

    row: int
    prompt: str
    a: Side
    b: Side

    @property
    def difference(self) -> float:
        """How much better B is."""
        return self.b.score - self.a.score


class Comparison(BaseModel):
    """What B is against A."""

    model_config = ConfigDict(frozen=True)

    a: str
    b: str
    metric: str
    decoding: str
    prompts: int  # that both have a score of
    left_out: int
    wins: int  # prompts on which B is better
    losses: int
    ties: int
    p: float  # two-sided
    test: Literal["sign test", "McNemar's exact test"]
    mean_a: float
    mean_b: float
    difference: Estimate  # B - A
    examples: list[Pair]  # where they differ most

    @property
    def significant(self) -> bool:
        """At 5 %."""
        return self.p < 0.05


def compared(
    names: tuple[str, str],
    rows: tuple[Sequence[Row], Sequence[Row]],
    metric: str = REWARD,
    decoding: str = "greedy",
    examples: int = 3,
    seed: int = 0,
) -> Comparison:
    """B against A by `metric`: reward, a criterion's name, or `passed`. Raises UserError where they
    were not asked the same prompts, or one has no such figure."""
    by = "source" if all("source" in row for own in rows for row in own) else "prompt"
    sides = [_by_prompt(own, by) for own in rows]
    first, second = sides
    if first.keys() != second.keys():
        raise UserError(_different(names, first, second))
    scores = [
        {key: _score(row, metric, name) for key, row in side.items()}
        for side, name in zip(sides, names, strict=True)
    ]
    pairs = [
        Pair(row=first[key]["row"], prompt=first[key]["prompt"], a=a, b=b)
        for key in first
        if (a := scores[0][key]) is not None and (b := scores[1][key]) is not None
    ]
    if not pairs:
        raise UserError(f"{names[0]} and {names[1]} have no prompt of which both have a {metric}")
    wins = sum(pair.difference > 0 for pair in pairs)
    losses = sum(pair.difference < 0 for pair in pairs)
    single = all(len(row["completions"]) == 1 for own in rows for row in own if "failed" not in row)
    by_size = sorted(pairs, key=lambda pair: (-abs(pair.difference), pair.row))
    return Comparison(
        a=names[0],
        b=names[1],
        metric=metric,
        decoding=decoding,
        prompts=len(pairs),
        left_out=len(first) - len(pairs),
        wins=wins,
        losses=losses,
        ties=len(pairs) - wins - losses,
        p=sign_test(wins, losses),
        test="McNemar's exact test" if metric == PASSED and single else "sign test",
        mean_a=statistics.fmean(pair.a.score for pair in pairs),
        mean_b=statistics.fmean(pair.b.score for pair in pairs),
        difference=bootstrap([pair.difference for pair in pairs], seed),
        examples=[pair for pair in by_size[:examples] if pair.difference],
    )


def _by_prompt(rows: Sequence[Row], by: str) -> dict[Key, Row]:
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        asked = json.dumps(row[by], sort_keys=True)
        found[asked, seen[asked]] = row
        seen[asked] += 1
    return found


def _different(names: tuple[str, str], first: dict[Key, Row], second: dict[Key, Row]) -> str:
    only = [
        f"{len(missing)} of {name}'s {len(own)} are not in the other, as row {missing[0]['row']}"
        for name, own, other in ((names[0], first, second), (names[1], second, first))
        if (missing := [row for key, row in own.items() if key not in other])
    ]
    return f"{names[0]} and {names[1]} were not asked the same prompts: {'; '.join(only)}"


def _score(row: Row, metric: str, name: str) -> Side | None:
    if "failed" in row or not row["completions"]:
        return None
    completions = row["completions"]
    scores = [value for said in completions if (value := _value(said, metric, name)) is not None]
    if not scores:
        return None
    return Side(score=statistics.fmean(scores), text=completions[0]["text"])


def _value(said: dict[str, Any], metric: str, name: str) -> float | None:
    if metric == PASSED and PASSED in said:
        return None if said[PASSED] is None else float(said[PASSED])
    if metric != REWARD and criterion_of(metric, said["scores"]) is None:
        known = [REWARD, *map(path_of, said["scores"]), *([PASSED] if PASSED in said else [])]
        near = closest(metric, known)
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"{name} has no {metric!r}: {hint}there are {', '.join(known)}")
    return score_of(said, metric)
