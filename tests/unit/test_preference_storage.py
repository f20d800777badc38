"""A storage that cannot be used, or is another run's, is one clear line, and soon."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import actors.storage
from aligntune import storage as answering
from aligntune.errors import UserError
from aligntune.preference_storage import FOLDER, SNAPSHOT, JobStorage


def write_checkpoints(root: Path, steps: list[int]) -> None:
    """Checkpoints and their list as Ray Train leaves them."""
    names = [f"step-{step:06d}" for step in steps]
    for name in names:
        (root / FOLDER / name).mkdir(parents=True)
    results = [
        {"version": 0, "checkpoint_dir_name": name, "metrics": {"step": step}}
        for name, step in zip(names, steps, strict=True)
    ]
    snapshot = {
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(steps))),
        "latest_checkpoint_result": results[-1],
        "current_report_index": len(steps),
    }
    (root / FOLDER / SNAPSHOT).write_text(json.dumps(snapshot))


@pytest.fixture
def run(tmp_path: Path) -> JobStorage:
    write_checkpoints(tmp_path, [10, 20, 30])
    return JobStorage(None, tmp_path)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("nosuch://bucket/run", "nosuch"),
        ("file://runs/here", "is absolute"),
        ("gcs-of-nobody://x", "Protocol not known"),
    ],
)
def test_a_uri_that_nothing_here_understands_is_refused(
    uri: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason) as said:
        JobStorage(uri, tmp_path).check(fresh=True)
    assert f"checkpoint.storage {uri} cannot be used" in str(said.value)
    assert "\n" not in str(said.value)


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A storage that never answers."""
    done = threading.Event()
    monkeypatch.setattr(actors.storage, "filesystem_of", lambda _: done.wait(60))
    monkeypatch.setattr(answering, "ANSWER_SECONDS", 0.2)
    yield
    done.set()


@pytest.mark.usefixtures("silence")
def test_a_storage_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=r"no answer within 0\.2 s"):
        JobStorage("s3://bucket/run", tmp_path).check(fresh=True)
    assert time.monotonic() - began < 30


def test_another_run_s_storage_is_refused_by_a_new_run_only(tmp_path: Path) -> None:
    write_checkpoints(tmp_path / "shared", [10])
    storage = JobStorage(f"file://{tmp_path}/shared/", tmp_path / "run")
    storage.check(fresh=False)
    with pytest.raises(UserError, match=r"holds another run's checkpoints \(step-000010\)"):
        storage.check(fresh=True)


def test_a_named_checkpoint_becomes_the_newest(run: JobStorage, tmp_path: Path) -> None:
    name = run.named(str(tmp_path / FOLDER / "step-000020") + "/")
    run.rewind(name)
    assert run.names() == ["step-000010", "step-000020"]
    assert sorted(p.name for p in (tmp_path / FOLDER).glob("step-*")) == run.names()
    snapshot = json.loads((tmp_path / FOLDER / SNAPSHOT).read_text())
    assert snapshot["latest_checkpoint_result"]["metrics"] == {"step": 20}
    assert snapshot["checkpoint_report_indices"] == [0, 1]
    assert snapshot["current_report_index"] == 3


@pytest.mark.parametrize("resume", ["step-000020", "elsewhere/step-000020", "nosuch://x/y"])
def test_a_folder_that_is_no_checkpoint_of_the_run_is_refused(run: JobStorage, resume: str) -> None:
    with pytest.raises(UserError, match="--resume: ") as said:
        run.named(resume)
    assert "\n" not in str(said.value)


def test_a_checkpoint_that_was_not_finished_is_refused(run: JobStorage, tmp_path: Path) -> None:
    (tmp_path / FOLDER / "step-000040").mkdir()
    with pytest.raises(UserError, match="there are step-000010, step-000020, step-000030"):
        run.named(str(tmp_path / FOLDER / "step-000040"))


def test_without_any_checkpoint_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is none yet"):
        JobStorage(None, tmp_path).named(str(tmp_path / FOLDER / "step-000010"))
