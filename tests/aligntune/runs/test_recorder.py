"""What a run's records tell the person who watches."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from aligntune.config.load import load_config
from aligntune.config.online import RunConfig
from aligntune.online.recorder import OnlineRecorder
from aligntune.runs.jsonl import read_lines
from aligntune.runs.rundir import RunDir
from aligntune.tracking.metrics import EventKind
from tests.aligntune.tracking.test_output import HeldUp


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    made.path.mkdir()
    return made


def recorded(rundir: RunDir, after_step: int = 0) -> OnlineRecorder:
    """Its records, which write to the standard output of now."""
    config = load_config(
        {
            "algorithm": "grpo",
            "model": {"name": "m"},
            "data": {"path": "d"},
            "rewards": ["length"],
            "output_dir": str(rundir.path),
            "tracking": {"trackers": []},
        }
    )
    assert isinstance(config, RunConfig)
    return OnlineRecorder(config, rundir, 100, after_step)


Lines = list[str]


def said(capsys: pytest.CaptureFixture[str]) -> Lines:
    return [line.partition(" ")[2] if line[0] == "0" else line for line in _lines(capsys)]


def _lines(capsys: pytest.CaptureFixture[str]) -> Lines:
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_a_role_is_ready_when_its_last_replica_or_rank_is(
    rundir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded(rundir) as recorder:
        recorder.starting({"rollout": (2, "vLLM is loading"), "policy": (1, "")})
        recorder.role("rollout-1.0", {"engine": "vllm"})
        recorder.role("policy-0", {"backend": "trl 1.13.0", "device": "cpu"})
        recorder.role("rollout-0.0", {"engine": "vllm"})
        recorder.role("rollout-0.1", {"engine": "vllm"})  # in the place of one that was lost
        recorder.role("policy-0", {"backend": "trl 9", "device": "cpu"})
    assert said(capsys) == [
        "policy ready (trl 1.13.0 on cpu); waiting for: rollout (vLLM is loading)",
        "rollout ready (vllm); all are",
        "policy-0: trl 9 on cpu",
    ]
    started = [e for e in read_lines(rundir.file("events.jsonl")) if e["kind"] == "role_started"]
    assert len(started) == 5


def test_a_traceback_is_told_once_however_many_groups_it_ends(
    rundir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "reward 'mine' failed (raised):\n" + "  File x\n" * 40
    with recorded(rundir) as recorder:
        for group in range(3):
            recorder.event(EventKind.GROUP_QUARANTINED, group=group, reason=reason)
    shown = "\n".join(_lines(capsys))
    assert shown.count("  File x") == 40
    assert "group 2, reason reward 'mine' failed (raised):... (as before)" in shown


def test_of_long_texts_the_last_ones_are_kept(
    rundir: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aligntune.runs.recorder.TOLD", 2)
    with recorded(rundir) as recorder:
        for number in (1, 2, 1, 3, 1, 2):
            reason = f"{number} " + "so it is " * 30
            recorder.event(EventKind.GROUP_QUARANTINED, reason=reason)
            assert len(recorder._seen) <= 2
    whole = ["before" not in line for line in _lines(capsys)]
    assert whole == [True, True, False, True, False, True]


def test_the_checkpoint_of_a_run_that_stops_is_told_and_no_other(
    rundir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded(rundir) as recorder:
        recorder.event(EventKind.CHECKPOINT_SAVED, step=50)
        recorder.stopping("stopping")
        recorder.event(EventKind.CHECKPOINT_SAVED, step=79)
    assert _lines(capsys) == ["stopping", "the checkpoint of step 79 is written"]


def test_a_trouble_is_a_warning_and_an_event(
    rundir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded(rundir) as recorder:
        recorder.cures = {"truncated": "this helps too", "kl": "that does not"}
        for step in range(1, 8):
            recorder.step(step, {"completions/truncated_fraction": 0.5})
    (warning,) = [line for line in _lines(capsys) if line.startswith("warning: ")]
    assert "rollout.max_completion_length" in warning
    assert warning.endswith("; this helps too")
    (event,) = [e for e in read_lines(rundir.file("events.jsonl")) if e["kind"] == "trouble"]
    assert (event["step"], event["name"]) == (5, "truncated")


def test_a_run_that_goes_on_is_judged_by_its_first_steps_and_shows_its_last_evaluation(
    rundir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    with recorded(rundir) as recorder:
        for step in range(61):
            recorder.step(step, {"policy/entropy": 0.8 if step < 30 else 0.01})
            if step % 20 == 0:
                recorder.evaluation(step, {"eval/reward/mean": step / 100})
    capsys.readouterr()
    with recorded(rundir, 50) as recorder:
        recorder.truncate_after(50)
        recorder.step(51, {"policy/entropy": 0.01})
        recorder.truncate_after(39)
        recorder.step(40, {"policy/entropy": 0.01})
        recorder.truncate_after(-1)
        recorder.step(1, {"policy/entropy": 0.01})
    lines = [line for line in _lines(capsys) if line.startswith(("step", "warning"))]
    warned = "warning: the entropy fell from 0.800 to 0.010"
    shown = ["step 51/100  eval 0.400", warned, "step 40/100  eval 0.200", warned, "step 1/100"]
    assert [line[: len(told)] for line, told in zip(lines, shown, strict=True)] == shown
    assert "eval" not in lines[-1]


def test_an_evaluation_shows_each_criterion_and_what_the_model_said(
    rundir: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "1+1=", "completions": [{"text": "2", "reward": 1.0}]}
    figures = {
        "eval/reward/mean": 1.0,
        "eval/reward/math/mean": 1.0,
        "eval/reward/concise/mean": 0.5,
    }
    with recorded(rundir) as recorder:
        recorder.eval_samples(10, [row])
        recorder.evaluation(10, figures)
        recorder.evaluation(20, figures | {"eval/reward/reward/mean": 0.25})
    assert _lines(capsys) == [
        "evaluation after step 10: reward 1.000  math 1.000  concise 0.500",
        "  asked  1+1=",
        "  1.000  2",
        "evaluation after step 20: reward 1.000  math 1.000  concise 0.500  reward/reward 0.250",
        "  asked  1+1=",
        "  1.000  2",
    ]


def test_an_event_that_is_no_json_is_refused_and_those_before_it_are_written(
    rundir: RunDir,
) -> None:
    go = threading.Event()
    with recorded(rundir) as recorder:
        recorder._writer.do(lambda: go.wait(30))
        for group in range(2):
            recorder.event(EventKind.GROUP_RETRIED, group=group, reason="why")
        with pytest.raises(ValueError, match="not JSON compliant"):
            recorder.event(EventKind.STALLED, seconds=float("nan"))
        with pytest.raises(TypeError, match="not JSON serializable"):
            recorder.event(EventKind.STALLED, seconds=object())
        go.set()
    assert [e["group"] for e in read_lines(rundir.file("events.jsonl"))] == [0, 1]


def test_trackers_hear_of_the_end_before_a_terminal_that_is_held_up_has_taken_all(
    rundir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, told = HeldUp(terminal=False), []

    def close(ended: str) -> None:
        told.append((ended, stream.getvalue()))
        stream.free.set()

    monkeypatch.setattr(sys, "stdout", stream)
    view = SimpleNamespace(close=close)
    monkeypatch.setattr("aligntune.runs.recorder.open_views", lambda *_: [view])
    with recorded(rundir) as recorder:
        recorder.note("the run is done")
    assert told == [("finished", "")]
    assert stream.getvalue() == "the run is done\n"
