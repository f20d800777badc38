"""However a run fails, it is one line, an event with the reason, and how to resume it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.scoring.criteria import RewardFailed, RewardFailure
from aligntune.cli import main
from aligntune.errors import UserError
from aligntune.online import trainer as trainers
from aligntune.runs.jsonl import read_lines
from cluster.session import RayTooSlow

Train = Callable[..., tuple[int, str]]


@pytest.fixture
def train(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Train:
    """Runs `aligntune train` with a loop that raises; the exit code and what it says."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "1+1", "answer": "2"}) + "\n")

    @contextmanager
    def no_roles(*_: object) -> Iterator[None]:
        yield

    def run(error: Exception, roles: Callable[..., Any] = no_roles) -> tuple[int, str]:
        class Broken:
            def __init__(self, *_: Any) -> None: ...

            async def run(self, _: object) -> None:
                raise error

            def stop(self, number: int) -> None: ...

        monkeypatch.setattr("aligntune.online.assemble.assemble", Broken)
        monkeypatch.setattr(trainers.OnlineTrainer, "_roles", roles)
        arguments = ["--algorithm", "grpo", "--model", str(tiny_model), "--dataset", str(data)]
        with pytest.raises(SystemExit) as stopped:
            main(["train", *arguments, "--reward", "exact_match", "--out", str(tmp_path / "run")])
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, capsys.readouterr().err

    return run


def stopped(folder: Path) -> dict[str, Any]:
    (event,) = [e for e in read_lines(folder / "events.jsonl") if e["kind"] == "run_stopped"]
    return event


@pytest.mark.slow
def test_a_failure_that_nobody_foresaw(train: Train, tmp_path: Path) -> None:
    code, said = train(KeyError("an\nodd one"))
    assert code == 1
    first, second = said.splitlines()[-2:]
    assert first.startswith("aligntune: KeyError: 'an\\nodd one' (the traceback is in ")
    assert second.startswith("resume with: aligntune train --algorithm grpo")
    event = stopped(tmp_path / "run")
    assert event["reason"].startswith("KeyError")
    assert "in run" in event["traceback"]


@pytest.mark.slow
def test_a_ray_that_is_too_slow_is_no_fault_of_the_input(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def slow(*_: object, **__: object) -> Iterator[str]:
        raise RayTooSlow("Ray did not start on this machine in time")
        yield

    monkeypatch.setattr("aligntune.online.running.session", slow)
    code, said = train(KeyError("never raised"), trainers.OnlineTrainer._roles)
    assert code == 1
    assert "Ray did not start on this machine in time" in said
    assert "resume with: aligntune train" in said
    assert "in time" in stopped(tmp_path / "run")["reason"]


@pytest.mark.slow
def test_a_failure_that_is_known_needs_no_traceback(train: Train, tmp_path: Path) -> None:
    code, said = train(RewardFailed("judged", RewardFailure.RAISED, "its service is down"))
    assert code == 1
    assert "its service is down" in said
    assert "traceback" not in said
    assert "traceback" not in stopped(tmp_path / "run")


@pytest.mark.slow
def test_wrong_input_that_only_the_cluster_shows(train: Train, tmp_path: Path) -> None:
    code, said = train(UserError("output_dir is not seen by policy-1"))
    assert (code, said.splitlines()[-1]) == (2, "aligntune: output_dir is not seen by policy-1")
    assert "output_dir" in stopped(tmp_path / "run")["reason"]
