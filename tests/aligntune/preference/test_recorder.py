"""What a preference job writes down, and that its trackers are views of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from aligntune.preference.job import PreferenceRecorder
from aligntune.runs.jsonl import read_lines
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
    with PreferenceRecorder(config("tracking.trackers=[wandb]"), RunDir(tmp_path), 3) as recorder:
        for step in (1, 2, 3):
            recorder.step(step, {"loss": 0.5})
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    first, last = read_lines(tmp_path / "events.jsonl")
    assert (first["kind"], first["reason"]) == ("tracker_failed", "ConnectionError: gone")
    assert last["reason"] == "3 steps were never taken"
