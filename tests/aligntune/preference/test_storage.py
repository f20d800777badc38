"""A storage that cannot be used, or is another run's, is one clear line, and soon."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import actors.storage
from aligntune.errors import UserError
from aligntune.preference.job import Recorded
from aligntune.preference.storage import CONFIG, FOLDER, SNAPSHOT, JobStorage
from aligntune.runs import deadline as answering
from aligntune.tracking.metrics import EventKind
from tests.aligntune.config.test_preference import config


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
        JobStorage(uri, tmp_path).check(config(), "auto", fresh=True)
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
        JobStorage("s3://bucket/run", tmp_path).check(config(), "auto", fresh=True)
    assert time.monotonic() - began < 30


@pytest.fixture
def shared(tmp_path: Path) -> JobStorage:
    """A storage with a checkpoint, whose run directory is gone."""
    write_checkpoints(tmp_path / "shared", [10])
    (tmp_path / "run").mkdir()
    return JobStorage(f"file://{tmp_path}/shared/", tmp_path / "run")


def test_checkpoints_of_a_run_that_is_not_known_are_refused_by_a_new_run_only(
    shared: JobStorage,
) -> None:
    shared.check(config(), "auto", fresh=False)
    with pytest.raises(UserError, match=r"of a run that is not known \(step-000010\)"):
        shared.check(config(), "auto", fresh=True)


def test_a_run_that_lost_its_directory_goes_on_from_its_storage_and_another_does_not(
    shared: JobStorage, tmp_path: Path
) -> None:
    shared.describe(config(), "d1")
    assert (tmp_path / "shared" / CONFIG).is_file()
    now = config("train.learning_rate=1e-5", "output_dir=elsewhere")
    changed = shared.check(now, "auto", fresh=True)
    assert changed.keys() == {"train.learning_rate", "output_dir"}
    assert shared.newest_step() == 10
    with pytest.raises(UserError, match=r"holds another run: train\.seed was 0 there"):
        shared.check(config("train.seed=1"), "auto", fresh=True)
    with pytest.raises(UserError, match="holds a run and resume=never"):
        shared.check(config(), "never", fresh=True)


def test_a_run_does_not_go_on_with_the_checkpoints_of_another(shared: JobStorage) -> None:
    shared.describe(config("train.seed=1"), "d1")
    with pytest.raises(UserError, match=r"holds another run: train\.seed was 1 there"):
        shared.check(config(), "auto", fresh=False)
    shared.check(config("train.seed=1", "train.learning_rate=1e-5"), "auto", fresh=False)


@pytest.mark.parametrize("uri", [None, "file://{}/shared"])
def test_rows_are_compared_with_those_of_the_checkpoints_wherever_a_run_has_left_them(
    uri: str | None, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    storage = JobStorage(uri and uri.format(tmp_path), tmp_path / "run")
    storage.check_rows("d1", 10, fresh=False)  # a run of before there were digests
    storage.describe(config(), "d1")
    storage.check_rows("d1", 10, fresh=False)
    with pytest.raises(UserError, match=r"have changed since the checkpoint of step 10"):
        storage.check_rows("d2", 10, fresh=False)
    # A copy of the checkpoints alone has no digest, and the run directory has.
    with pytest.raises(UserError, match=r"have changed since the checkpoint of step 10"):
        JobStorage(f"file://{tmp_path}/copy", tmp_path / "run").check_rows("d2", 10, fresh=False)


def test_rows_are_compared_where_the_run_directory_is_gone(
    shared: JobStorage, tmp_path: Path
) -> None:
    shared.describe(config(), "d1")
    (tmp_path / "new").mkdir()
    new = JobStorage(f"file://{tmp_path}/shared", tmp_path / "new")
    new.check_rows("d1", 10, fresh=True)
    with pytest.raises(UserError, match="have changed since"):
        new.check_rows("d2", 10, fresh=True)


def test_a_storage_that_is_not_there_yet_is_made_for_the_config(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    JobStorage(f"file://{tmp_path}/new/run", tmp_path / "run").describe(config(), "d1")
    assert (tmp_path / "new" / "run" / CONFIG).is_file()


def test_a_named_checkpoint_becomes_the_newest(run: JobStorage, tmp_path: Path) -> None:
    name = run.named(str(tmp_path / FOLDER / "step-000020") + "/")
    run.rewind(name)
    assert run.names() == ["step-000010", "step-000020"]
    assert sorted(p.name for p in (tmp_path / FOLDER).glob("step-*")) == run.names()
    snapshot = json.loads((tmp_path / FOLDER / SNAPSHOT).read_text())
    assert snapshot["latest_checkpoint_result"]["metrics"] == {"step": 20}
    assert snapshot["checkpoint_report_indices"] == [0, 1]
    assert snapshot["current_report_index"] == 3


@pytest.mark.parametrize("uri", [None, "file://{}"])
def test_the_checkpoint_before_one_is_as_resume_takes_it(tmp_path: Path, uri: str | None) -> None:
    write_checkpoints(tmp_path, [10, 20, 30])
    run = JobStorage(uri and uri.format(tmp_path), tmp_path)
    older = run.before("step-000030")
    assert older is not None
    assert run.named(older) == "step-000020"
    assert run.before("step-000010") is None


@pytest.mark.parametrize("uri", [None, "file://{}/shared"])
def test_the_model_is_on_disk_before_it_has_its_name(
    tmp_path: Path, uri: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = JobStorage(uri and uri.format(tmp_path), tmp_path)
    left = Path(run.export.removeprefix("file://"))
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"weights")
    done: list[str] = []

    def fsync(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def rename(old: Path, new: Path) -> None:
        done.append("rename")
        real(old, new)

    real = os.rename
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    run.fetch(tmp_path / "model")
    assert done == ["model.safetensors", "model.partial", "rename", tmp_path.name]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == b"weights"


def test_an_older_model_that_cannot_be_removed_is_out_of_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file that somebody reads keeps its folder."""
    run = JobStorage(None, tmp_path)
    for folder, content in ((Path(run.export), b"new"), (tmp_path / "model", b"old")):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(content)
    real = os.rmdir

    def rmdir(path: Any, **more: Any) -> None:
        if str(path).startswith(str(tmp_path)):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(path, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", rmdir)
        run.fetch(tmp_path / "model")
    assert [path.read_bytes() for path in (tmp_path / "model").iterdir()] == [b"new"]
    Path(run.export).mkdir()
    run.fetch(tmp_path / "model")
    assert not list(tmp_path.glob(".model-*")), "the next one removes what is left"


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


def damage(root: Path, how: str) -> None:
    path = root / FOLDER / SNAPSHOT
    whole = path.read_bytes()
    match how:
        case "empty":
            path.write_bytes(b"")
        case "torn":
            path.write_bytes(whole[: len(whole) // 2])
        case "zeros":
            path.write_bytes(bytes(len(whole)))
        case "another":
            path.write_bytes(b"[1]")


@pytest.mark.parametrize("how", ["empty", "torn", "zeros", "another"])
def test_a_list_of_checkpoints_that_a_crash_has_torn_is_that_of_the_report_before(
    run: JobStorage, tmp_path: Path, how: str
) -> None:
    assert run.mend() is None
    run.keep_list()
    shutil.rmtree(tmp_path / FOLDER / "step-000010")  # forgotten since
    (tmp_path / FOLDER / "step-000040").mkdir()
    damage(tmp_path, how)
    run.keep_list()  # of a list that is being written there is no copy
    assert run.names() == ["step-000020", "step-000030"]
    assert run.newest_step() == 30
    assert run.mend() == str(tmp_path / FOLDER / SNAPSHOT)
    snapshot = json.loads((tmp_path / FOLDER / SNAPSHOT).read_text())
    assert snapshot["checkpoint_report_indices"] == [1, 2]
    assert snapshot["latest_checkpoint_result"]["metrics"] == {"step": 30}
    assert snapshot["current_report_index"] == 3
    assert run.mend() is None


@pytest.mark.parametrize("uri", [None, "file://{}"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_list_without_a_copy_is_named_with_its_cure_alone(
    tmp_path: Path, uri: str | None, kept: bool
) -> None:
    write_checkpoints(tmp_path, [10])
    run = JobStorage(uri and uri.format(tmp_path), tmp_path)
    if kept:  # of checkpoints that are all gone
        run.keep_list()
        shutil.rmtree(tmp_path / FOLDER / "step-000010")
    damage(tmp_path, "torn")
    for ask in (run.newest_step, run.mend):
        with pytest.raises(UserError) as said:
            ask()
        assert f"{tmp_path}/{FOLDER}/{SNAPSHOT}, which lists" in str(said.value)
        assert str(said.value).endswith(f"{tmp_path}/{FOLDER} to begin again")


def test_a_copy_is_made_beside_the_job_and_one_that_fails_is_an_event() -> None:
    events: list[tuple[EventKind, dict[str, Any]]] = []
    asked, free, told = threading.Event(), threading.Event(), threading.Event()

    def saved() -> None:
        asked.set()
        assert free.wait(60)
        raise OSError("no space left")

    def event(kind: EventKind, **fields: Any) -> None:
        events.append((kind, fields))
        if kind is EventKind.NOT_COPIED:
            told.set()

    recorder: Any = SimpleNamespace(event=event)
    recorded = Recorded(recorder, -1, saved)
    for step in (1, 2):  # the second comes while the disk is slow, and waits for nothing
        recorded.event(EventKind.CHECKPOINT_SAVED, step=step)
    assert asked.wait(60)
    free.set()
    assert told.wait(60)
    assert [kind for kind, _ in events].count(EventKind.NOT_COPIED) == 1
    assert events[-1][1]["reason"] == "no space left"
