"""Models by URI: fetched once a node, whole or not at all, and again when they change."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
from pathlib import Path

import pytest

from actors.models import staging
from actors.models.staging import StagingFailed, on_this_node, staged
from actors.specs import ModelSpec


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ALIGNTUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "remote" / "my-model.0.6"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "weights").write_bytes(b"12345")
    staged.cache_clear()
    return folder.as_uri()


def fetch_in_a_process(uri: str, log: str, start: object) -> None:
    original = staging._fetch

    def counted(uri: str, target: Path) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        original(uri, target)

    staging._fetch = counted
    start.wait()  # type: ignore[attr-defined]
    assert (staged(uri) / "sub" / "weights").read_bytes() == b"12345"


def test_what_is_at_a_uri_lies_in_a_folder_of_this_node(model: str) -> None:
    spec = on_this_node(ModelSpec(name=model, revision="main"))
    assert (Path(spec.name) / "sub" / "weights").read_bytes() == b"12345"
    assert Path(spec.name).name.startswith("my-model.0.6-")
    assert spec.revision is None
    named = ModelSpec(name="org/model")
    assert on_this_node(named) is named


@pytest.mark.slow
def test_of_the_processes_of_a_node_one_fetches(model: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    log = tmp_path / "fetched"
    processes = [
        context.Process(target=fetch_in_a_process, args=(model, str(log), start)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(log.read_text().splitlines()) == 1


def test_a_fetch_that_died_leaves_nothing_that_is_taken_for_the_model(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(StagingFailed, match=r"cannot be brought to this node: disk full"):
            staged(model)
    assert (staged(model) / "config.json").is_file()


def test_a_model_that_changed_is_fetched_again(model: str, tmp_path: Path) -> None:
    first = staged(model)
    staged.cache_clear()
    assert staged(model) == first
    (tmp_path / "remote" / "my-model.0.6" / "sub" / "weights").write_bytes(b"123456")
    staged.cache_clear()
    second = staged(model)
    assert second != first
    assert (second / "sub" / "weights").read_bytes() == b"123456"


@pytest.mark.parametrize(
    ("uri", "message"),
    [("file:///nowhere/model", "nowhere/model"), ("teleport://bucket/model", "teleport")],
)
def test_a_uri_that_gives_nothing_is_one_clear_error(
    uri: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNTUNE_CACHE", str(tmp_path))
    with pytest.raises(StagingFailed, match=message) as failed:
        staged(uri)
    assert "\n" not in str(failed.value)


def test_a_cache_on_a_file_system_without_locks_is_refused_with_its_cure(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        StagingFailed, match=r"does not lock files .* elsewhere with ALIGNTUNE_CACHE"
    ):
        staged(model)
