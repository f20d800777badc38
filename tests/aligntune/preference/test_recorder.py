"""What a preference job writes down, and that its trackers are views of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from aligntune.preference.job import Recorded
from aligntune.runs.jsonl import read_lines
from aligntune.runs.recorder import Recorder, last_step
from aligntune.runs.rundir import RunDir
from aligntune.tracking.trackers import SERVICES
from tests.aligntune.config.test_preference import config


class Dead:
    """A tracker whose service is gone."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("gone")

    def truncate_after(self, step: int) -> None: ...

    def close(self) -> None: ...


def test_a_tracker_that_fails_is_an_event_and_every_figure_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    monkeypatch.setitem(SERVICES, "wandb", lambda *_: Dead())
    settings = config("tracking.trackers=[wandb]")
    with Recorder(settings, settings.tracking, RunDir(tmp_path), 3, 0) as recorder:
        told = Recorded(recorder, known=-1)
        for step in (1, 2, 2, 3, 1):
            told.step(step, {"loss": 0.5, "time/step": 2.0})
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    first, last = read_lines(tmp_path / "events.jsonl")
    assert (first["kind"], first["reason"]) == ("tracker_failed", "ConnectionError: gone")
    assert last["reason"] == "3 steps were never taken"


def test_an_evaluation_that_was_owed_joins_the_row_of_its_step(tmp_path: Path) -> None:
    settings = config("tracking.trackers=[]")
    with Recorder(settings, settings.tracking, RunDir(tmp_path), 5, 0) as recorder:
        told = Recorded(recorder, known=-1)
        for step in (1, 2):
            told.step(step, {"loss": float(step), "time/step": 4.0})
        for _ in range(2):  # from a checkpoint that does not have it, once and again
            told.restart(2, {1: {"loss": 1.0}, 2: {"loss": 2.0}})
            told.step(2, {"eval/loss": 0.5, "epoch": 0.1})
        whole = {"loss": 2.0, "time/step": 4.0, "eval/loss": 0.5, "epoch": 0.1}
        assert told.last == whole
        told.step(3, {"loss": 3.0})
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1] == {"step": 2, **whole}


def test_on_a_restart_later_figures_are_forgotten_and_missing_ones_come_from_the_checkpoint(
    tmp_path: Path,
) -> None:
    settings = config("tracking.trackers=[]")
    with Recorder(settings, settings.tracking, RunDir(tmp_path), 5, 0) as recorder:
        told = Recorded(recorder, known=last_step(tmp_path / "metrics.jsonl"))
        for step in (0, 1, 3, 4):
            told.step(step, {"loss": float(step), "time/step": 1.0})
        told.restart(3, {1: {"loss": 1.0}, 2: {"loss": 2.0}, 3: {"loss": 3.0}, 4: {"loss": 9.0}})
        assert told.last["time/step"] == 1.0, "as it was written, with its times"
        told.step(4, {"loss": 4.5})
    rows = read_lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 0), (1, 1), (3, 3), (4, 4.5)]
    (resumed,) = [e for e in read_lines(tmp_path / "events.jsonl") if e["kind"] == "resumed"]
    assert resumed["step"] == 3
    assert last_step(tmp_path / "metrics.jsonl") == 4


def test_a_job_that_goes_on_shows_the_last_evaluation_of_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config("tracking.trackers=[]")
    history = {0: {"eval/loss": 0.75}, 1: {"loss": 1.0}, 2: {"loss": 2.0, "eval/loss": 0.25}}
    with Recorder(settings, settings.tracking, RunDir(tmp_path), 5, 0) as recorder:
        told = Recorded(recorder, known=-1)
        for step in (2, 1):
            told.restart(step, history)
            told.step(step + 1, {"loss": 3.0})
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[line.index("eval") + 1] for line in shown if line[1] in ("2/5", "3/5")] == [
        "0.250",
        "0.250",
        "0.750",
    ]
