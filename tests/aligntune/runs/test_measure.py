"""Held-out figures are compared where they were made by the same prompts, rewards and decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aligntune.config.online import load_online_config
from aligntune.online.evaluation import Evaluation
from aligntune.online.recorder import OnlineRecorder
from aligntune.report.summary import evaluated
from aligntune.runs.best import Best
from aligntune.runs.jsonl import read_lines
from aligntune.runs.measure import comparable, measure, scored_by
from aligntune.runs.rundir import RunDir
from aligntune.tracking.ending import ending

REWARD = "eval/reward/mean"


def rows(*measures: str | None) -> list[dict[str, Any]]:
    """An evaluation a step, each worse than the one before."""
    made = [{"step": step, REWARD: -float(step)} for step in range(len(measures))]
    return [
        row | ({} if by is None else {"measure": by})
        for row, by in zip(made, measures, strict=True)
    ]


@pytest.mark.parametrize(
    ("measures", "steps"),
    [
        ("", []),
        ("aa", [0, 1]),
        ("aab", [2]),
        ("abba", [0, 3]),
        ((None, None), [0, 1]),  # of an earlier version
        ((None, None, "a"), [0, 1, 2]),
        ((None, "a", "b", "b"), [2, 3]),
    ],
)
def test_rows_are_compared_that_were_made_by_what_the_last_one_was(
    measures: tuple[str | None, ...], steps: list[int], tmp_path: Path
) -> None:
    given = rows(*measures)
    assert [row["step"] for row in comparable(given)] == steps
    assert [*Best(REWARD).values(given)] == steps
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    (tmp_path / "metrics.jsonl").write_text("")
    told = [line for line in ending(tmp_path, tmp_path) if line.startswith("held-out")]
    span = f"(step {steps[0]} -> {steps[-1]})" if len(steps) > 1 else ""
    assert [line[line.index("(") :] for line in told] == ([span] if span else [])
    assert bool(evaluated(comparable(given))) == bool(span)


@pytest.mark.parametrize(
    ("function", "options", "alike"),
    [
        ("judge", {"retries": 6, "request_timeout_s": 90.0}, True),
        ("judge", {"rubric": "another"}, False),
        ("mine:judge", {"retries": 6}, False),  # it may mean anything there
    ],
)
def test_a_judge_that_has_more_time_or_tries_measures_as_before(
    function: str, options: dict[str, Any], alike: bool
) -> None:
    before = {"function": function, "options": {"rubric": "How kind?"}, "weight": 0.5}
    after = before | {"options": {"rubric": "How kind?"} | options, "timeout_s": 900.0}
    assert (measure("", scored_by(before)) == measure("", scored_by(after))) == alike
    without = {key: value for key, value in before.items() if key != "options"}
    more = without | {"options": {"retries": 6}}
    if function == "judge":
        assert scored_by(more) == scored_by(without)


def test_what_is_measured_anew_is_evaluated_again_where_the_run_stands(tmp_path: Path) -> None:
    config = load_online_config(
        {
            "algorithm": "grpo",
            "model": {"name": "m"},
            "data": {"path": "d", "eval_path": "e"},
            "rewards": ["math"],
            "tracking": {"trackers": []},
            "output_dir": str(tmp_path),
        }
    )
    prompts: Any = ["a prompt"]

    def due(records: OnlineRecorder, version: int) -> bool:
        rolling: Any = None
        return Evaluation(config, 4, prompts, rolling, records).due(version)

    def start(measure: str, after: int) -> OnlineRecorder:
        return OnlineRecorder(config, RunDir(tmp_path), 4, after, None, measure)

    with start("a", 0) as records:
        assert not records.measured_anew
        assert [version for version in range(5) if due(records, version)] == [0, 4]
        for version in (0, 4):
            records.evaluation(version, {REWARD: 1.0})
            assert not due(records, version)
    with start("a", 4) as records:
        assert not records.measured_anew
        assert not due(records, 4)
    with start("b", 4) as records:
        assert records.measured_anew
        assert due(records, 2), "as at the start of a run"
        assert due(records, 4)
        records.eval_samples(4, [])
        records.evaluation(4, {REWARD: 2.0})
        assert not records.measured_anew
        assert not due(records, 4)
    assert [
        (row["step"], row["measure"], row[REWARD]) for row in read_lines(tmp_path / "evals.jsonl")
    ] == [
        (0, "a", 1.0),
        (4, "b", 2.0),
    ]
