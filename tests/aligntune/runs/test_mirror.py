"""The copy of a run on storage: whole or not named, no older than allowed, fetched when ahead."""

from __future__ import annotations

import json
import shutil
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from actors.storage import Store
from aligntune.errors import UserError
from aligntune.runs import segments
from aligntune.runs.best import Best
from aligntune.runs.checkpoint import Checkpoints, intact
from aligntune.runs.mirror import Mirror
from tests.aligntune.runs.test_checkpoint import save


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("train:\n  seed: 3\n")
    (folder / "ledger.jsonl").write_text("{}\n")
    return folder


def push(home: Path, mirror: Mirror, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(home / "checkpoints", keep_last=2)
    for step in steps:
        save(checkpoints, step)
        mirror.push(home / "checkpoints" / f"step-{step:06d}")
    return checkpoints


@pytest.mark.parametrize("as_uri", [True, False])
def test_what_was_pushed_is_fetched_into_an_empty_run_directory(
    home: Path, tmp_path: Path, as_uri: bool
) -> None:
    storage = tmp_path / "bucket"
    uri = storage.as_uri() if as_uri else str(storage)
    push(home, Mirror(uri, home, 2, 60), 8, 9, 10, 100)
    there = {path.name for path in (storage / "checkpoints").iterdir()}
    assert there == {"latest", "step-000010", "step-000100"}

    new = tmp_path / "new"
    checkpoints = Checkpoints(new / "checkpoints", keep_last=2)
    mirror = Mirror(uri, new, 2, 60)
    assert mirror.is_ahead_of(checkpoints, "auto")
    assert mirror.config() == {"train": {"seed": 3}}
    assert mirror.fetch(checkpoints) == []
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 100
    assert (latest.path / "policy" / "weights").read_bytes() == bytes([100]) * 100
    assert (new / "ledger.jsonl").read_text() == "{}\n"
    assert not mirror.is_ahead_of(checkpoints, "auto"), "both are at 100 now"


@pytest.mark.parametrize("keep_last", [1, 2, 5])
def test_as_many_copies_are_kept_as_checkpoints(home: Path, tmp_path: Path, keep_last: int) -> None:
    mirror = Mirror(str(tmp_path / "bucket"), home, keep_last, 60)
    checkpoints = Checkpoints(home / "checkpoints", keep_last)
    for step in range(1, 9):
        save(checkpoints, step)
        mirror.push(home / "checkpoints" / f"step-{step:06d}")
        there = {p.name for p in (tmp_path / "bucket" / "checkpoints").glob("step-*")}
        assert there == {p.name for p in (home / "checkpoints").glob("step-*")}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("removed", [False, True])
def test_the_best_copy_stays_as_it_was_where_the_checkpoint_here_is_damaged_or_gone(
    home: Path, tmp_path: Path, removed: bool, restarted: bool
) -> None:
    best = Best("eval/reward/mean")
    storage = tmp_path / "bucket"
    rows = [{"step": step, "eval/reward/mean": 1 / step} for step in range(1, 6)]
    (home / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mirror = Mirror(str(storage), home, 2, 60, best)
    push(home, mirror, 1)
    local = home / "checkpoints" / "step-000001"
    if removed:
        shutil.rmtree(local)
    else:
        (local / "policy" / "weights").write_bytes(bytes(100))
    for step in range(2, 6):
        push(home, Mirror(str(storage), home, 2, 60, best) if restarted else mirror, step)
        assert intact(storage / "checkpoints" / "step-000001"), step
    assert not local.exists()
    there = {path.name for path in (storage / "checkpoints").glob("step-*")}
    assert there == {"step-000001", "step-000004", "step-000005"}


def test_a_step_that_comes_again_takes_the_place_of_later_ones(home: Path, tmp_path: Path) -> None:
    mirror = Mirror(str(tmp_path / "bucket"), home, 2, 60)
    push(home, mirror, 8, 10)
    shutil.rmtree(home / "checkpoints" / "step-000010")
    push(home, mirror, 9)
    there = {path.name for path in (tmp_path / "bucket" / "checkpoints").iterdir()}
    assert there == {"latest", "step-000008", "step-000009"}


def test_whose_checkpoint_it_goes_back_to_is_alone_there_if_it_is_of_another_folder(
    home: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "bucket" / "checkpoints"
    mirror = Mirror(str(tmp_path / "bucket"), home, 3, 60)
    checkpoints = push(home, mirror, 1, 2)
    newest = checkpoints.latest()
    assert newest is not None
    mirror.go_back(newest, alone=False)
    assert {path.name for path in storage.glob("step-*")} == {"step-000001", "step-000002"}
    mirror.go_back(newest, alone=True)
    assert {path.name for path in storage.glob("step-*")} == {"step-000002"}
    first = checkpoints.of(1)
    assert first is not None
    mirror.go_back(first, alone=False)
    assert {path.name for path in storage.iterdir()} == {"latest", "step-000001"}
    assert (storage / "latest").read_text() == "step-000001"


def test_logs_that_are_larger_than_memory_are_fetched_a_piece_at_a_time(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "PIECE", 2**16)
    line = b'{"text": "' + b"x" * 1000 + b'"}\n'
    for name in ("samples.jsonl", "eval_samples.jsonl"):
        (home / name).write_bytes(line * 8000)
    push(home, Mirror(str(tmp_path / "bucket"), home, 2, 60), 1)
    new = tmp_path / "new"
    mirror, checkpoints = (
        Mirror(str(tmp_path / "bucket"), new, 2, 60),
        Checkpoints(new / "checkpoints", 2),
    )
    tracemalloc.start()
    try:
        mirror.fetch(checkpoints)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 6 * 2**20, "the logs have 8 MB each"
    for name in ("samples.jsonl", "eval_samples.jsonl", "ledger.jsonl"):
        assert (new / name).read_bytes() == (home / name).read_bytes()
    assert not list(new.glob("*.partial"))


def test_an_empty_storage_is_ahead_of_nothing_and_never_is_refused_where_there_is_a_run(
    home: Path, tmp_path: Path
) -> None:
    mirror = Mirror(str(tmp_path / "bucket"), home, 2, 60)
    assert not mirror.is_ahead_of(Checkpoints(home / "checkpoints", 2), "never")
    checkpoints = push(home, mirror, 1)
    with pytest.raises(UserError, match="holds a run and resume=never"):
        mirror.is_ahead_of(checkpoints, "never")


def test_a_copy_that_broke_off_is_not_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.fs

    mirror = Mirror(str(tmp_path / "bucket"), home, 2, 60)
    checkpoints = push(home, mirror, 1)
    save(checkpoints, 2)

    def broken(*paths: Any, **options: Any) -> None:
        raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(pyarrow.fs, "copy_files", broken)
        with pytest.raises(OSError, match="connection reset"):
            mirror.push(home / "checkpoints" / "step-000002")
    assert (tmp_path / "bucket" / "checkpoints" / "latest").read_text() == "step-000001"
    mirror.push(home / "checkpoints" / "step-000002")
    assert (tmp_path / "bucket" / "checkpoints" / "latest").read_text() == "step-000002"


def test_a_storage_that_cannot_be_used_is_one_clear_line(home: Path) -> None:
    mirror = Mirror("teleport://bucket/run", home, 2, 60)
    with pytest.raises(UserError, match=r"checkpoint.storage teleport://bucket/run cannot be used"):
        mirror.is_ahead_of(Checkpoints(home / "checkpoints", 2), "auto")


def test_a_fetch_that_does_not_end_is_given_up_and_the_next_start_fetches_again(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(home, Mirror(str(tmp_path / "bucket"), home, 2, 60), 3)
    new = tmp_path / "new"
    mirror, checkpoints = (
        Mirror(str(tmp_path / "bucket"), new, 2, 0.2),
        Checkpoints(new / "checkpoints", 2),
    )
    done = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(Store, "get", lambda *_: done.wait(60))
        with pytest.raises(UserError, match=r"no answer within 0\.2 s"):
            mirror.fetch(checkpoints)
        done.set()
    assert checkpoints.latest() is None
    assert mirror.is_ahead_of(checkpoints, "auto")


def test_a_copy_that_was_damaged_there_is_passed_over_for_an_older_one_if_there_is_one(
    home: Path, tmp_path: Path
) -> None:
    storage = tmp_path / "bucket"
    push(home, Mirror(str(storage), home, 2, 60), 1, 2)
    new = tmp_path / "new"
    checkpoints = Checkpoints(new / "checkpoints", 2)
    for step, whole in ((2, 1), (1, None)):
        weights = storage / "checkpoints" / f"step-{step:06d}" / "policy" / "weights"
        content = bytearray(weights.read_bytes())
        content[50] ^= 4
        weights.write_bytes(content)
        mirror = Mirror(str(storage), new, 2, 60)
        if whole:
            assert mirror.fetch(checkpoints) == [f"{storage}/checkpoints/step-000002"]
            assert checkpoints.latest().step == whole  # type: ignore[union-attr]
            assert mirror.is_ahead_of(checkpoints, "auto")
            assert len(mirror.fetch(checkpoints)) == 1, "and what is here already is left alone"
            shutil.rmtree(new)
    with pytest.raises(UserError, match="step-000002 there is damaged, with all others"):
        Mirror(str(storage), new, 2, 60).fetch(checkpoints)
    assert not list(new.rglob("step-*"))


@pytest.mark.parametrize("latest", [b"", b"step-x\n", b"\xff\xfe", b"../../etc\n"])
def test_a_name_of_no_checkpoint_is_refused_in_one_line(
    home: Path, tmp_path: Path, latest: bytes
) -> None:
    storage = tmp_path / "bucket"
    checkpoints = push(home, Mirror(str(storage), home, 2, 60), 1)
    (storage / "checkpoints" / "latest").write_bytes(latest)
    mirror = Mirror(str(storage), home, 2, 60)
    if latest:
        with pytest.raises(UserError, match="names no checkpoint"):
            mirror.is_ahead_of(checkpoints, "auto")
    else:
        assert not mirror.is_ahead_of(checkpoints, "auto")
