"""What a fork spawns is forked too, where it can be, and is to its parent as any other."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing import popen_spawn_posix, spawn
from pathlib import Path

import psutil
import pytest

from cluster.forks import agree, ask, owner, spawned, wire
from tests.cluster.forks.test_server import gone, until

REPOSITORY = Path(__file__).parents[3]
WAS = {"HOME": "/home", "OMP_NUM_THREADS": "1", "RAY_JOB_ID": "1"}


@pytest.mark.parametrize("name", ["HF_HOME", "RAY_JOB_ID", "TORCHDYNAMO_DISABLE", "VLLM_USE_X"])
def test_what_a_fork_has_set_since_counts_where_an_import_may_read_it(name: str) -> None:
    assert agree.changed(WAS, WAS | {name: "other"}) == [name]
    assert agree.changed(WAS | {name: "other"}, WAS) == [name]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "RAY_ADDRESS", "VLLM_NO_USAGE_STATS", "PWD"])
def test_what_is_read_when_it_is_used_may_have_been_set_since(name: str) -> None:
    assert agree.changed(WAS, WAS | {name: "other"}) == []


def test_a_command_line_is_pythons_own_without_the_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    origin = spawned.Origin("/socket", None, WAS, ())
    code = "from multiprocessing.spawn import spawn_main; spawn_main(tracker_fd=4, pipe_handle=7)"
    found = origin.command(WAS, tracker_fd=4, pipe_handle=7)
    assert found == ["-c", code, "--multiprocessing-fork"]
    with pytest.raises(spawned.NotForked, match="HF_HOME changed"):
        origin.command(WAS | {"HF_HOME": "/x"}, tracker_fd=4, pipe_handle=7)
    monkeypatch.setattr(spawn, "_python_exe", b"/bin/numactl-python")
    with pytest.raises(spawned.NotForked, match="interpreter of its own"):
        origin.command(WAS, tracker_fd=4, pipe_handle=7)


@pytest.fixture
def server() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(wire.SOCKET, raising=False)
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        with owner.server(["statistics", "time", "tests.cluster.forks.spawning"]):
            path = os.environ[wire.SOCKET]
            until(lambda: os.path.exists(path), "a socket")
            yield path


def running(what: str, server: str, folder: Path) -> int:
    code = f"import sys; from tests.cluster.forks import spawning; spawning.{what}(sys.argv[1])"
    command = ["-c", code, str(folder / "saw")]
    return ask.fork(server, command, dict(os.environ), ray=False)


@pytest.mark.slow
def test_a_spawned_process_is_forked_and_is_as_any_other_to_its_parent(
    server: str, tmp_path: Path
) -> None:
    output = (tmp_path / "output").open("w+")
    before = os.dup(2)
    os.dup2(output.fileno(), 2)
    try:
        pid = running("main", server, tmp_path)
    finally:
        os.dup2(before, 2)
        os.close(before)
    until(lambda: (tmp_path / "saw").exists() or gone(pid), "an answer")
    errors = (tmp_path / "output").read_text()
    assert (tmp_path / "saw").exists(), errors
    saw = json.loads((tmp_path / "saw").read_text())
    ran = not gone(saw["last"])
    os.kill(pid, signal.SIGKILL)
    assert ran
    until(lambda: gone(saw["last"]), "the end of what the killed process had started")
    (process,) = [p for p in psutil.Process().children() if server in p.cmdline()]

    said = saw["said"]
    assert saw["pid"] == pid
    assert said["parent"] == saw["parent"] == saw["sleeper_parent"] == process.pid
    assert said["starter"] == pid
    assert said["imported"]
    assert (said["name"], said["variable"]) == ("told", "1")
    assert (said["processors"], said["badness"]) == (1, "1000")
    assert not [where for where in said["files"].values() if server in where]
    assert saw["code"] == [7, False, True]
    assert saw["before"] == [None, True, None]
    assert saw["terminated"] == -signal.SIGTERM
    assert saw["killed"] == -signal.SIGKILL

    assert saw["other_parent"] == pid
    assert saw["changed"]["parent"] == pid
    assert not saw["changed"]["imported"]
    assert saw["changed_code"] == 3
    assert "told imports for itself: HF_HOME changed since this process started" in errors
    assert "resource_tracker" not in errors


@pytest.mark.slow
def test_where_the_server_is_killed_a_process_goes_on_and_its_end_is_seen(
    server: str, tmp_path: Path
) -> None:
    running("without_server", server, tmp_path)
    until((tmp_path / "saw").exists, "an answer")
    assert json.loads((tmp_path / "saw").read_text()) == [True, False, spawned.UNKNOWN]


def test_where_the_server_has_ended_a_process_is_spawned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    origin = spawned.Origin(str(tmp_path / "gone"), None, dict(os.environ), {"time"})
    monkeypatch.setattr(spawned, "_origin", origin)
    monkeypatch.setattr(popen_spawn_posix, "Popen", spawned.Popen)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", None, raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,), name="x")
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert "x imports for itself: [Errno 2]" in capfd.readouterr().err
