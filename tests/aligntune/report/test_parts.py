"""The parts of a report: which curves there are, and what a run is said to have done."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aligntune.report.curves import COMPLETIONS, LEARNING, SPEED, parts
from aligntune.report.figures import (
    columns,
    histogram,
    of_few_replicas,
    quarters,
    rounded,
    thinned,
)
from aligntune.report.summary import duration, evaluated, sessions, stages, summary
from aligntune.runs.measure import KEY
from aligntune.runs.reading import open_run
from tests.aligntune.report.written import lines, online_run, sft_run

KNOWN = sorted({c.metric for chart in (*LEARNING, *COMPLETIONS, *SPEED) for c in chart.curves})


OWN = [
    *(f"reward/{name}/mean" for name in ("a b", "a-b", "a_b", "正确", "错误", "C", "c", "C++")),
    "eval/reward/x/mean",
    "new/metric",
    "new/métric",
]


@pytest.mark.slow
@given(st.sets(st.sampled_from([*KNOWN, *OWN])))
def test_every_metric_is_in_one_chart_and_every_chart_has_a_name_of_its_own(
    metrics: set[str],
) -> None:
    charts = [chart for part in parts(metrics) for chart in part.charts]
    assert len({chart.id for chart in charts}) == len(charts)
    drawn = [curve.metric for chart in charts for curve in chart.curves]
    assert sorted(drawn) == sorted(metrics)


def test_a_criterion_has_its_training_and_held_out_curve_in_one_picture() -> None:
    found = parts(["reward/mean", "reward/format/mean", "eval/reward/format/mean"])
    assert [chart.title for chart in found[0].charts] == ["Reward", "Reward: format"]
    assert [curve.label for curve in found[0].charts[1].curves] == ["training", "held-out"]


@pytest.mark.parametrize("replicas", [1, 8, 9])
def test_figures_of_each_of_many_replicas_are_left_out(replicas: int) -> None:
    each = {f"rollout/rollout-{place}/queue": 1.0 for place in range(replicas)}
    rows = [{"step": 1, "rollout/queue": 1.0, **each}]
    assert of_few_replicas(rows) == (rows if replicas < 9 else [{"step": 1, "rollout/queue": 1.0}])


def test_figures_are_thinned_to_the_last() -> None:
    rows = [{"step": step, "a/b": step / 3} for step in range(1, 1001)]
    few = thinned(rows, 30)
    assert len(few) <= 30
    assert few[-1]["step"] == 1000
    assert thinned(rows, 5000) == rows


def test_a_figure_that_a_row_has_not_is_a_gap() -> None:
    rows = [{"step": 1, "version": 1, KEY: "0123", "a/b": 1.0}, {"step": 2, "a/c": 0.123456789}]
    assert columns(rows) == {
        "steps": [1, 2],
        "values": {"a/b": [1, None], "a/c": [None, 0.12346]},
    }
    assert rounded(1e-300) == 1e-300
    assert rounded("text") is None
    assert (rounded(sys.float_info.max), rounded(float("nan"))) == (None, None)


def test_lengths_are_counted_as_shares_of_their_completions() -> None:
    rows = [{"step": n, "completions": [{"tokens": 10 * n}, {"tokens": 0}]} for n in range(1, 9)]
    first, last = quarters(rows)
    assert ({r["step"] for r in first}, {r["step"] for r in last}) == ({1, 2}, {7, 8})
    found = histogram({"first": first, "last": last})
    assert found is not None
    assert found["edges"][-1] > 80
    assert all(sum(counts) == pytest.approx(1) for counts in found["counts"].values())
    assert found["counts"]["first"][0] == 0.5
    assert histogram({"none": []}) is None


def test_before_and_after_are_told_of_two_evaluations_and_not_of_one() -> None:
    rows = [
        {"step": step, "eval/reward/mean": value, "eval/reward/std": 0.1}
        for step, value in ((0, 0.2), (10, 0.9), (20, 0.7))
    ]
    (change,) = evaluated(rows)
    assert (change.before, change.after, change.best, change.best_step) == (0.2, 0.7, 0.9, 10)
    assert evaluated(rows[:1]) == []


@pytest.mark.parametrize(
    ("figure", "best"),
    [
        ("eval/loss", 0.4),
        ("eval/reward/rejected", 0.4),
        ("eval/reward/chosen", 0.7),
        ("eval/reward/mean", 0.7),
        ("eval/reward/correct/mean", 0.7),
        ("eval/reward/too long/mean", 0.4),
        ("eval/reward/chatty/mean", 0.4),
        ("eval/reward/toxic/mean", 0.4),
        ("eval/reward/judge/mean", 0.4),
    ],
)
def test_the_best_is_the_lowest_of_a_loss_of_the_rejected_side_and_of_a_penalty(
    tmp_path: Path, figure: str, best: float
) -> None:
    run = online_run(tmp_path / "run", steps=2)
    rewards = [
        {"function": "correct", "weight": 1.0},
        {"function": "length", "name": "too long", "weight": -0.1},
        {"function": "mine.py:chatty", "weight": -1},
        {"model": "models/toxic/", "weight": -1.0},
        {"url": "http://judge:8000/score", "weight": -1.0},
    ]
    with (run / "config.yaml").open("a") as file:
        yaml.safe_dump({"rewards": rewards}, file)
    lines(run / "evals.jsonl", [{"step": 0, figure: 0.7}, {"step": 5, figure: 0.4}])
    (change,) = summary(open_run(run)).changes
    assert (change.best, change.best_step) == (best, 0 if best == 0.7 else 5)


def test_a_reward_that_is_called_reward_is_told_apart_from_the_sum() -> None:
    names = ("eval/reward/mean", "eval/reward/reward/mean", "eval/reward/math/mean")
    changes = evaluated([{"step": step, **dict.fromkeys(names, 0.5)} for step in (0, 1)])
    assert sorted(change.label for change in changes) == ["math", "reward", "reward/reward"]


def test_rewards_that_overflow_have_a_report(tmp_path: Path) -> None:
    run = online_run(tmp_path / "run", steps=2)
    (run / "evals.jsonl").unlink()
    largest = sys.float_info.max
    lines(run / "metrics.jsonl", [{"step": n, "reward/mean": largest} for n in range(1, 41)])
    assert "Training reward went from" in summary(open_run(run)).sentences[1]


def test_a_job_of_sft_is_told_by_its_token_accuracy(tmp_path: Path) -> None:
    told = summary(open_run(sft_run(tmp_path / "sft")))
    assert told.sentences[1] == "Held-out token accuracy went from 0.250 to 0.750."
    assert [(change.label, change.after) for change in told.changes] == [
        ("token_accuracy", 0.75),
        ("loss", 1.1),
    ]


def test_the_times_of_every_start_are_added_and_not_those_between() -> None:
    events = [
        {"time": 100.0, "kind": "run_started"},
        {"time": 160.0, "kind": "checkpoint_saved"},  # and then it was killed
        {"time": 1000.0, "kind": "run_started"},
        {"time": 1010.0, "kind": "run_finished"},
    ]
    assert sessions(events) == [60.0, 10.0]
    assert sessions(events[:3], last_sign=3400.0) == [60.0, 2400.0]
    assert sessions(events, last_sign=1005.0) == [60.0, 10.0]


@pytest.mark.parametrize(
    ("held", "copied", "queued", "told"),
    [
        (True, False, 0, "all steps 38 min 20 s, the run 40 min 0 s."),  # it goes on
        (False, False, 0, "all steps 38 min 20 s, the run 39 min 0 s."),  # after its last step
        (False, False, 300, "all steps 38 min 20 s, the run 39 min 0 s."),  # on a slow disk
        (False, True, 0, "all steps 38 min 20 s."),  # so long ago it was copied, not killed
    ],
)
def test_a_run_without_an_end_has_lasted_until_its_last_step_or_until_now(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    held: bool,
    copied: bool,
    queued: int,
    told: str,
) -> None:
    run, begun = online_run(tmp_path / "run", ended=""), 1_795_000_000.0
    lines(run / "metrics.jsonl", [{"step": n, "time/step": 23.0} for n in range(1, 101)])
    events: list[dict[str, Any]] = [{"kind": "run_started"}, {"kind": "role_started"}]
    lines(run / "events.jsonl", [{"time": begun + 45 * n, **e} for n, e in enumerate(events)])
    for name, seconds in (
        ("config.yaml", 44),
        ("events.jsonl", 45 + queued),
        ("metrics.jsonl", 2340),
    ):
        at = begun + (86400 if copied else seconds)
        os.utime(run / name, (at, at))
    monkeypatch.setattr("aligntune.runs.reading._is_held", lambda _: held)
    monkeypatch.setattr("aligntune.runs.reading.time.time", lambda: begun + 2400)
    assert summary(open_run(run)).sentences[-1].endswith(told)


def test_a_stage_is_a_share_of_the_steps_and_idle_comes_last() -> None:
    row = {"step": 1, "time/step": 10.0, "time/rollout": 4.0, "time/idle_policy": 9.0}
    rows = [row | {"time/tools": 25.0}] * 2  # of an episode, of which many are played at once
    assert [(s.name, s.seconds, s.share) for s in stages(rows)] == [
        ("rollout", 8.0, 0.4),
        ("trainer idle", 18.0, 0.9),
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (9.97, "10 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.8, "1 h 0 min"),
        (90061, "25 h 1 min"),
    ],
)
def test_times_are_read_easily(seconds: float, text: str) -> None:
    assert duration(seconds) == text
