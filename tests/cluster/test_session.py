"""Joining a cluster that is not there ends quickly, with one line."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from aligntune.commands.doctor import examine
from cluster import await_nodes, proxies
from cluster.doctor.findings import Verdict
from cluster.jobs.client import Jobs, JobsUnreachable
from cluster.session import ClusterUnreachable, check_answers, check_head, session
from cluster.specs import ClusterSpec


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SERVES_JOBS = r"of a Jobs server, .* `aligntune submit --address http.*, as in HOST:6379, in clus"


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("", "nothing answers at"),
        ("ray://", "nothing answers at"),
        ("http://", SERVES_JOBS),
        ("https://", SERVES_JOBS),
    ],
)
def test_a_head_that_does_not_answer_is_said_at_once(
    scheme: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked"))
    address = f"{scheme}127.0.0.1:{free_port()}"
    started = time.monotonic()
    with (
        pytest.raises(ClusterUnreachable, match=said) as error,
        session(ClusterSpec(address=address), cpus=1),
    ):
        pass
    assert time.monotonic() - started < 15
    assert "\n" not in str(error.value)
    assert address in str(error.value)


@pytest.fixture
def dead_head(monkeypatch: pytest.MonkeyPatch) -> str:
    """What RAY_ADDRESS names, as in a shell whose cluster is gone; Ray itself must not be asked."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **options: pytest.fail("Ray was asked"))
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    return address


def test_auto_finds_a_head_that_is_gone_at_once(dead_head: str) -> None:
    with (
        pytest.raises(ClusterUnreachable, match=f"nothing answers at '{dead_head}'"),
        session(ClusterSpec(address="auto"), cpus=1),
    ):
        pass


def test_waiting_for_the_nodes_of_a_head_that_is_gone_ends_at_once(
    dead_head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await_nodes.main(["2", "600"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"nothing answers at '{dead_head}'" in line


def test_the_doctor_says_of_a_head_that_is_gone_that_it_is(dead_head: str) -> None:
    (found,) = [finding for finding in examine(None) if "nothing answers" in finding.seen]
    assert found.verdict is Verdict.FAIL
    assert dead_head in found.seen


def test_auto_without_any_ray_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", list)
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    with pytest.raises(ClusterUnreachable, match="no Ray runs on this machine"):
        check_head("auto")


def test_a_port_that_cannot_be_is_refused_though_one_listens_at_its_low_bits() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1] + 2**16
        with pytest.raises(
            ClusterUnreachable, match=f"names port {port}, and 65535 is the highest"
        ):
            check_answers(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["local", "head.example"])
def test_addresses_without_a_port_are_left_to_ray(address: str) -> None:
    check_answers(address)


@pytest.mark.slow
def test_one_that_listens_and_is_no_head_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.session.ANSWER_S", 0.5)
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(ClusterUnreachable, match=r"is no Ray head.*not that of its dashboard"):
            check_answers(f"127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.slow
def test_a_head_is_let_through(ray_session: None) -> None:
    import ray

    check_head(ray.get_runtime_context().gcs_address)


def test_a_ray_that_is_too_slow_to_start_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def slow(**options: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray does

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", slow)
    with (
        pytest.raises(ClusterUnreachable, match="did not start on this machine in time"),
        session(ClusterSpec(), cpus=1),
    ):
        pass


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("http://head:8265", "http://proxy.example:3128"),
        ("http://10.0.0.7:8265", "http://proxy.example:3128"),
        ("http://inside.example:8265", None),
    ],
)
def test_a_proxy_on_the_way_is_named_without_its_password(
    url: str, named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://me:hunter2@proxy.example:3128")
    monkeypatch.setenv("no_proxy", "inside.example,localhost")
    monkeypatch.setenv("NO_PROXY", "inside.example,localhost")
    assert proxies.proxy_of(url) == named
    said = proxies.advice(url)
    assert (named in said and "to no_proxy" in said) if named else said == ""
    assert "hunter2" not in said


def test_a_proxy_that_stands_before_a_jobs_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(JobsUnreachable, match=r"the proxy http://127\.0\.0\.1") as error:
        Jobs("http://10.255.255.1:8265")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_look_for_a_head_goes_past_a_proxy_as_ray_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    try:
        check_answers(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()


SIGTERM = """
import os, signal
from cluster.session import session
from cluster.specs import ClusterSpec
with session(ClusterSpec(), cpus=1):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 10)
    except SystemExit as ended:
        print("ended with", ended.code, signal.getitimer(signal.ITIMER_REAL))
"""


@pytest.mark.slow
def test_a_signal_ends_no_process_that_has_a_ray_by_an_alarm_of_rays() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGTERM],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "ended with 15 (0.0, 0.0)"
    assert done.returncode == 0
