"""From the rows of an evaluation to its figures. Pure.

A row is one prompt under one decoding, with its completions; one that has none because it could not
be scored says why in `failed`, and enters no figure. A completion without a score (its reward
abstained) is neither a pass nor a failure: it is left out of the figures of that criterion.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from actors.messages import FinishReason
from actors.scoring.said import text_of, with_thoughts
from aligntune.errors import UserError
from aligntune.evaluation.statistics import (
    Estimate,
    bootstrap,
    majority_at_k,
    pass_at_k,
    wilson,
)

Row = dict[str, Any]
REWARD = "reward"
"""The name of the weighted sum of all criteria. A criterion that is called so is `reward/reward`,
as it is in the figures."""


def path_of(criterion: str) -> str:
    """What a criterion is called where `reward` is the weighted sum."""
    return f"{REWARD}/{criterion}" if criterion == REWARD else criterion


def criterion_of(name: str, criteria: Collection[str]) -> str | None:
    """The criterion that is meant by its name or by `reward/NAME`; None where there is none, and
    for `reward`, which is the weighted sum."""
    plain = name.removeprefix(f"{REWARD}/")
    return next((own for own in (name, plain) if own in criteria and name != REWARD), None)


class Success(BaseModel):
    """When a completion passes."""

    model_config = ConfigDict(frozen=True)

    criterion: str = Field(
        description="a reward's name, or `reward` for the weighted sum of all; of a reward that is "
        "called so itself `reward/reward`"
    )
    at_least: float

    def __str__(self) -> str:
        return f"{self.criterion} >= {self.at_least:g}"

    def passes(self, completion: Mapping[str, Any]) -> bool | None:
        """Whether it passes; None where it has no such score."""
        score = score_of(completion, self.criterion)
        return None if score is None else score >= self.at_least


def read_success(text: str | None, names: Sequence[str]) -> Success:
    """`NAME=X` or `X`, of criteria `names`; by default the first of them at 1. Raises UserError."""
    if text is None:
        return Success(criterion=path_of(names[0]), at_least=1.0)
    name, _, number = text.rpartition("=")
    name = name.rstrip(">").strip() or path_of(names[0])
    criterion = criterion_of(name, names)
    if criterion is None and name != REWARD:
        raise UserError(
            f"--success {text}: there is no criterion {name!r}; there are "
            f"{', '.join(map(path_of, names))}, and {REWARD} for the weighted sum"
        )
    try:
        return Success(
            criterion=REWARD if criterion is None else path_of(criterion), at_least=float(number)
        )
    except ValueError as error:
        raise UserError(f"--success {text}: {number!r} is no number; as in math=1") from error


def score_of(completion: Mapping[str, Any], name: str) -> float | None:
    """A completion's score of a criterion, by its name or as `reward/NAME`, or its reward."""
    scores = completion["scores"]
    found = completion[REWARD] if name == REWARD else scores.get(criterion_of(name, scores))
    return None if found is None else float(found)


def judged(row: Row, success: Success, answer_of: Callable[[str], str]) -> Row:
    """A row whose completions say whether they passed, and which answer they gave."""
    if "failed" in row:
        return row
    completions = [
        {
            **said,
            "passed": success.passes(said),
            "answer": None if (text := _text(said, row["prompt"])) is None else answer_of(text),
        }
        for said in row["completions"]
    ]
    return {**row, "completions": completions}


def _text(completion: Mapping[str, Any], prompt: str) -> str | None:
    """What a completion says, with the `<think>` that its prompt ends with; of an episode what the
    model says last; None where it is lost."""
    if completion.get("messages"):
        return text_of(completion["messages"])
    text: str | None = completion["text"]
    return None if text is None else with_thoughts(prompt, text)


def sizes(most: int) -> list[int]:
    """The k of pass@k and maj@k: powers of two up to the completions of a prompt, and all."""
    powers = [2**n for n in range(most.bit_length()) if 2**n <= most]
    return sorted({*powers, most})


def figures(rows: Sequence[Row], seed: int = 0) -> dict[str, Estimate]:
    """The figures of judged rows of one decoding. Means are over prompts, of each prompt's own."""
    scored = [row["completions"] for row in rows if "failed" not in row]
    if not scored:
        return {}
    columns = {REWARD: [[said[REWARD] for said in each] for each in scored]} | {
        f"{REWARD}/{name}": [[said["scores"].get(name) for said in each] for each in scored]
        for name in scored[0][0]["scores"]
    }
    found: dict[str, Estimate] = {}
    for name, column in columns.items():
        given = [[float(score) for score in each if score is not None] for each in column]
        if values := [statistics.fmean(scores) for scores in given if scores]:
            found[name] = bootstrap(values, seed)
    found |= _passes(scored, seed)
    lengths = [statistics.fmean(said["tokens"] for said in each) for each in scored]
    cut = [statistics.fmean(map(_truncated, each)) for each in scored]
    return found | {
        "completions/tokens": bootstrap(lengths, seed),
        "completions/truncated": bootstrap(cut, seed),
    }


def _truncated(said: Mapping[str, Any]) -> float:
    return float(FinishReason(said["finish_reason"]).truncated)


def _passes(scored: Sequence[Sequence[Row]], seed: int) -> dict[str, Estimate]:
    """pass@k and maj@k over the prompts that have k completions with a verdict."""
    found: dict[str, Estimate] = {}
    judged = [[said for said in each if said["passed"] is not None] for each in scored]
    most = max(map(len, scored))
    for k in sizes(most):
        those = [each for each in judged if len(each) >= k]
        if not those:
            continue
        if most == 1:
            found["pass@1"] = wilson(sum(each[0]["passed"] for each in those), len(those))
            continue
        found[f"pass@{k}"] = bootstrap(
            [pass_at_k(len(each), sum(said["passed"] for said in each), k) for each in those], seed
        )
        if k > 1 and all(said["answer"] is not None for each in those for said in each):
            votes = [
                majority_at_k(
                    [said["answer"] for said in each], [said["passed"] for said in each], k
                )
                for each in those
            ]
            found[f"maj@{k}"] = bootstrap(votes, seed)
    return found
