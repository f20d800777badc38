"""A run writes its report when it ends, however that is, and a report that fails ends no run."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from aligntune.errors import Interrupted, RunFailed
from aligntune.runs.books import Books
from aligntune.runs.jsonl import read_lines
from aligntune.runs.lifecycle import recorded
from aligntune.runs.recorder import Recorder
from aligntune.runs.rundir import RunDir
from tests.aligntune.config.test_preference import config


def train(path: Path, ends: Exception | None = None, books: Books | None = None) -> RunDir:
    """A run of one step that ends well, or with an error; it knows its `books`, or has none."""
    job = config(f"output_dir={path}", "tracking.trackers=[]")
    rundir = RunDir(path)
    rundir.claim()
    rundir.describe(job)
    with recorded(Recorder(job, job.tracking, rundir, 1, 0), rundir, last_step=1) as records:
        if books is not None:
            records.books = lambda: books
        records.step(1, {"loss/total": 0.5})
        if ends is not None:
            raise ends
    rundir.release()
    return rundir


class View:
    """A tracker's, which hears how the run ended."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def close(self, ended: str) -> None:
        self.ended.append(ended)


@pytest.mark.parametrize(
    ("ends", "told", "ended"),
    [
        (None, "The run finished after 1 step.", "finished"),
        (Interrupted(15), "The run stopped after step 1: stopped by signal 15", "stopped"),
        (RunFailed("no node is left"), "The run stopped after step 1: no node is left", "failed"),
        (OSError("disk is gone"), "The run stopped after step 1: OSError: disk is gone", "failed"),
    ],
)
def test_the_report_and_the_trackers_hear_how_the_run_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends: Exception | None,
    told: str,
    ended: str,
) -> None:
    view = View()
    monkeypatch.setattr("aligntune.runs.recorder.open_views", lambda *_: [view])
    if ends is None:
        train(tmp_path / "run")
    else:
        with pytest.raises(Interrupted if isinstance(ends, Interrupted) else RunFailed):
            train(tmp_path / "run", ends)
    assert view.ended == [ended]
    assert told in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_a_report_that_fails_is_an_event_and_the_run_ends_as_it_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("aligntune.report.write.write_report", fails)
    rundir = train(tmp_path / "well")
    kinds = [event["kind"] for event in read_lines(rundir.file("events.jsonl"))]
    assert kinds == ["run_started", "run_finished", "report_failed"]
    with pytest.raises(RunFailed, match="no node is left"):
        train(tmp_path / "badly", RunFailed("no node is left"))
    last = read_lines(tmp_path / "badly" / "events.jsonl")[-1]
    assert (last["kind"], last["reason"]) == ("report_failed", "OSError: no space left")


def test_the_books_of_a_report_are_those_that_the_run_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def takes_minutes(path: Path) -> Books:
        raise AssertionError(path)

    monkeypatch.setattr("aligntune.runs.reading.audit", takes_minutes)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ledger.jsonl").write_text("much\n")
    train(tmp_path / "run", books=Books(9, trained=7, filtered=2, quarantined=0, open=0))
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Groups: 7 trained on, 2 filtered." in text


def test_a_report_that_takes_too_long_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr("aligntune.runs.recorder.REPORT_SECONDS", 0.01)
    monkeypatch.setattr("aligntune.report.write.write_report", lambda *_, **__: go.wait(30))
    rundir = train(tmp_path / "a run")
    go.set()
    reason = read_lines(rundir.file("events.jsonl"))[-1]["reason"]
    assert reason == f"not written within 0.01 s; make it with `aligntune report '{rundir.path}'`"
