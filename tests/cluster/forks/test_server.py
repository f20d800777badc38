"""A process from the fork server is as one that Python was started for; else there is none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster.forks import ask, owner, start_worker, wire

SHOW = """
import json, os, signal, sys
with open(sys.argv[1] + ".part", "w") as file:
    json.dump({
        "arguments": sys.argv, "path": sys.path[0], "main": __name__, "folder": os.getcwd(),
        "imported": "statistics" in sys.modules, "environment": dict(os.environ),
        "session": os.getsid(0), "pid": os.getpid(), "umask": os.umask(0),
        "files": {n: os.path.realpath("/proc/self/fd/" + n) for n in os.listdir("/proc/self/fd")},
        "child": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
        "interrupt": signal.getsignal(2).__name__,
        "random": __import__("random").random(),
    }, file)
print("said", flush=True)
os.rename(sys.argv[1] + ".part", sys.argv[1])
"""
DEADLINE_S = 30


def until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, f"{what} not within {DEADLINE_S} s"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server that has imported one module of the standard library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(wire.SOCKET, raising=False)
        with owner.server(["statistics"]):
            path = os.environ[wire.SOCKET]
            until(lambda: os.path.exists(path), "a socket")
            yield path


def shown(server: str, file: Path, **environment: str) -> dict:
    ask.fork(server, ["-c", SHOW, str(file)], os.environ | environment, ray=False)
    until(file.exists, "an answer")
    return json.loads(file.read_text())


def test_a_fork_is_as_python_starts_it_and_has_the_imports(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    with (tmp_path / "kept").open("w") as kept:
        os.set_inheritable(kept.fileno(), True)
        try:
            found = shown(server, tmp_path / "a", OMP_NUM_THREADS="3", PYTEST_SAYS="x")
        finally:
            os.umask(before)
        assert found["files"][str(kept.fileno())] == str(tmp_path / "kept")
    ours = {os.readlink(f"/proc/self/fd/{number}") for number in ask._open_files()}
    shown_to_it = {where.rpartition("/")[2] for where in found["files"].values()}
    assert not [name for name in shown_to_it - ours if "socket:" in name], "the server's own"
    assert found["imported"]
    assert found["main"] == "__main__"
    assert found["arguments"] == ["-c", str(tmp_path / "a")]
    assert found["path"] == ""
    assert found["folder"] == str(tmp_path)
    assert found["environment"] == dict(os.environ) | {"OMP_NUM_THREADS": "3", "PYTEST_SAYS": "x"}
    assert found["umask"] == 0o027
    assert found["session"] == found["pid"] != os.getsid(0)
    assert found["child"]
    assert found["interrupt"] == "default_int_handler"
    assert shown(server, tmp_path / "b")["random"] != found["random"]


def test_a_variable_that_an_import_may_have_read_is_named_and_nothing_starts(
    server: str, tmp_path: Path
) -> None:
    with pytest.raises(ask.Refused, match="HF_HOME"):
        shown(server, tmp_path / "a", HF_HOME="/elsewhere")


@pytest.mark.parametrize("exact", [False, True])
def test_what_imports_have_set_is_in_the_environment_unless_that_is_exact(
    exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sets_a_variable.py").write_text("import os; os.environ['SET_BY_IMPORT'] = 'x'")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    monkeypatch.delenv(wire.SOCKET, raising=False)
    with owner.server(["sets_a_variable"]):
        path, file = os.environ[wire.SOCKET], tmp_path / "shown"
        until(lambda: os.path.exists(path), "a socket")
        wanted = dict(os.environ)
        ask.fork(path, ["-c", SHOW, str(file)], wanted, ray=False, exact=exact)
        until(file.exists, "an answer")
    set_by_import = {} if exact else {"SET_BY_IMPORT": "x"}
    assert json.loads(file.read_text())["environment"] == wanted | set_by_import


def test_a_server_that_answers_too_late_starts_nothing(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked starts by itself then: there must never be two."""
    (process,) = [p for p in psutil.Process().children() if server in p.cmdline()]
    monkeypatch.setattr(ask, "WAIT_S", 0.2)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ask.Refused, match="has not answered"):
            shown(server, tmp_path / "late")
    finally:
        process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(ask, "WAIT_S", 30)
    shown(server, tmp_path / "next")
    until(lambda: not process.children(), "the end of both forks")
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("path", ["off", "/nowhere/socket"])
def test_without_a_server_a_worker_starts_as_ray_starts_it(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    became: list[list[str]] = []
    monkeypatch.setenv(wire.SOCKET, path)
    monkeypatch.setattr(sys, "argv", ["x", "/ray/default_worker.py", "--language=PYTHON"])
    monkeypatch.setattr(os, "execv", lambda program, arguments: became.append(arguments))
    start_worker.main()
    (became_now,) = became
    assert became_now[0] == sys.executable
    assert became_now[1].endswith("ray/_private/workers/setup_worker.py")
    assert became_now[2:] == sys.argv[1:]
    assert "a worker imports for itself" in capsys.readouterr().err


def test_ctrl_c_of_the_terminal_is_left_to_the_owner(server: str, tmp_path: Path) -> None:
    """It goes to the whole group: a server that ended by it could start no worker any more."""
    (process,) = [p for p in psutil.Process().children() if server in p.cmdline()]
    process.send_signal(signal.SIGINT)
    assert shown(server, tmp_path / "a")["interrupt"] == "default_int_handler"


OWNER = """
import os, sys, time
from cluster.forks import owner
with owner.server(["statistics"]):
    print(os.environ["ALIGNTUNE_FORKS"], flush=True)
    time.sleep(600)
"""


def test_a_server_ends_with_its_owner_though_it_is_killed() -> None:
    environment = {n: v for n, v in os.environ.items() if n != wire.SOCKET}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip()).parent
        (started,) = psutil.Process(process.pid).children()
        process.kill()
    until(lambda: gone(started.pid), "the end of the server")
    assert not folder.exists()


def test_what_is_no_request_is_not_served_and_the_next_is(server: str, tmp_path: Path) -> None:
    import socket

    for data in (b"", b"\0\0\0\5hello", b"\xff\xff\xff\xff", b"\0\0\0\2{}"):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(server)
            other.sendall(data)
            other.shutdown(socket.SHUT_WR)
            assert other.recv(100) == b""
    assert shown(server, tmp_path / "a")["imported"]
