"""Random histories of the real controller: a part of what `make histories` plays, the same each
time, and those that once showed a fault."""

from __future__ import annotations

import functools
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from aligntune.runs import recorder as recorders
from aligntune.runs.jsonl import read_lines
from aligntune.tracking.progress import Progress
from tests.aligntune.tracking.test_output import Full
from tests.histories.cast import Wrong
from tests.histories.history import DEFAULT, Fault, History, drawn
from tests.histories.play import Process, play

FOUND = {
    "a stop in the last update": History(
        seed=476,
        algorithm="gspo",
        settings={**DEFAULT, "steps": 6, "staleness": 1, "beta": 0.1, "replicas": 3, "grow": 1}
        | {"save_every": 2, "ranks": 2},
        faults=(
            Fault(process=2, place="policy.update", number=3, kind="stop"),
            Fault(process=None, place="policy.snapshot", number=3, kind="stop"),
            Fault(process=0, place="policy.export_weights", number=0, kind="kill"),
        ),
    ),
    "a kill after a checkpoint, while the evaluation of a version before it runs": History(
        seed=2523,
        algorithm="ppo",
        settings={**DEFAULT, "groups": 3, "staleness": 4, "beta": 0.1, "replicas": 1}
        | {"at_once": 3, "evaluate_every": None},
        faults=(Fault(process=None, place="critic.values", number=1, kind="kill"),),
    ),
    "a run that goes on with less staleness": History(
        seed=545,
        algorithm="grpo",
        settings={**DEFAULT, "staleness": 4, "ranks": 2},
        changes=({"staleness": 0},),
        faults=(Fault(process=None, place="any", number=28, kind="stop"),),
    ),
    "a stop and a lost rank while the evaluation of a version before runs": History(
        seed=404,
        algorithm="ppo",
        settings={**DEFAULT, "steps": 4, "groups": 1, "staleness": 3, "replicas": 3}
        | {"evaluate_every": None},
        faults=(
            Fault(process=None, place="policy.update", number=1, kind="lose its node"),
            Fault(process=None, place="critic.values", number=1, kind="stop"),
        ),
    ),
    "episodes that hang soon after others have ended": History(
        seed=23,
        algorithm="dapo",
        settings={**DEFAULT, "environments": 1},
        faults=(Fault(process=0, place="episode.tool", number=0, kind="hang"),),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 40, 10))
def test_whatever_breaks_every_group_ends_once_and_nothing_waits_for_ever(
    first: int, tmp_path: Path
) -> None:
    for number in range(first, first + 10):
        folder = tmp_path / str(number)
        folder.mkdir()
        play(drawn(number), folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [17, 31, 48, 59])  # with episodes, some on two ranks
def test_a_history_is_the_same_each_time(number: int, tmp_path: Path) -> None:
    books = []
    for time in range(2):
        folder = tmp_path / str(time)
        folder.mkdir()
        play(drawn(number), folder)
        kept = [folder / "run" / name for name in ("ledger.jsonl", "evals.jsonl")]
        books.append([path.read_text(encoding="utf-8") for path in kept if path.exists()])
    assert books[0] == books[1]


@pytest.mark.slow
@pytest.mark.parametrize("history", FOUND.values(), ids=FOUND)
def test_a_history_that_once_showed_a_fault(history: History, tmp_path: Path) -> None:
    assert play(history, tmp_path)[-1] == "finished"


def test_a_group_that_is_trained_twice_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The histories can fail: here a checkpoint forgets that its newest step was trained."""
    from aligntune.online import keeper

    boundary = keeper.Boundary

    def forgets(step: int, ledger: object, algorithm: object) -> object:
        return boundary(max(0, step - 1), ledger, algorithm)  # type: ignore[arg-type]

    monkeypatch.setattr("aligntune.online.controller.Boundary", forgets)
    kill = Fault(process=0, place="policy.update", number=2, kind="kill")
    with pytest.raises(AssertionError):
        play(History(0, "grpo", dict(DEFAULT), faults=(kill,)), tmp_path)


@pytest.mark.slow
def test_a_wait_without_end_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The histories can fail: here nobody tells the loop that groups have come to an end."""
    monkeypatch.setattr(
        "aligntune.online.pipeline.Pipeline._finished",
        lambda self, group, task: self._tasks.pop(group, None),
    )
    with pytest.raises(Wrong, match=r"had no batch within|nothing has moved"):
        play(History(0, "grpo", dict(DEFAULT)), tmp_path)


def test_episodes_of_one_group_that_are_taken_for_those_of_another_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aligntune.online.playing.uuid.uuid4", lambda: uuid.UUID(int=0))
    with pytest.raises(Wrong, match=r"group \d+ has the prompt \d+"):
        play(History(0, "grpo", {**DEFAULT, "environments": 1}), tmp_path)


@pytest.mark.slow
def test_a_history_without_episodes_is_the_same_each_time(tmp_path: Path) -> None:
    drew = drawn(3)
    history = replace(drew, faults=(), settings={**drew.settings, "environments": 0})
    files = []
    for name in ("one", "other"):
        folder = tmp_path / name
        folder.mkdir()
        play(history, folder)
        files.append((folder / "run" / "ledger.jsonl").read_text())
    assert files[0] == files[1]
    assert Process(history, 0, tmp_path, []).settings == history.settings


def test_a_run_whose_output_goes_nowhere_replaces_what_it_loses_and_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorders, "Progress", functools.partial(Progress, stream=Full()))
    faults = (
        Fault(process=0, place="rollout.generate", number=0, kind="die"),
        Fault(process=0, place="disk.commit", number=0, kind="disk"),
    )
    settings = {**DEFAULT, "replicas": 1}
    fired: list[Fault] = []
    assert play(History(0, "grpo", settings, faults=faults), tmp_path, fired) == ["finished"]
    assert len(fired) == 2
    events = read_lines(tmp_path / "run" / "events.jsonl")
    kinds = [event["kind"] for event in events]
    assert {"replica_restarted", "checkpoint_failed", "run_finished"} <= {*kinds}
    assert kinds.count("not_shown") == 1, "told once"
    (reason,) = [event["reason"] for event in events if event["kind"] == "not_shown"]
    assert "No space left on device" in reason
