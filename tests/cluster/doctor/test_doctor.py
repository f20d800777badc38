"""The doctor: every judgement on what was observed, and a look at this machine and a cluster."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aligntune.commands.doctor import examine as examine_all
from cluster import resources
from cluster.doctor import findings as doctor
from cluster.doctor import nodes
from cluster.doctor.findings import GIB, Finding, Observed, Verdict
from cluster.doctor.nodes import examine, pairs
from cluster.doctor.probe import observe
from cluster.session import ClusterUnreachable
from tests import drivers
from tests.cluster.nodes import cluster, why_no_namespaces
from tests.conftest import plain_environment

HEALTHY = Observed(
    python="3.11.7",
    versions={"ray": "2.60.0", "torch": "2.13.0+cpu"},
    cpus=8,
    memory=64 * GIB,
    memory_free=60 * GIB,
    shm=32 * GIB,
    shm_free=32 * GIB,
    disks={"/": (1000 * GIB, 500 * GIB)},
    nofile=(65536, 1 << 20),
    torch_gpus=0,
)
Kernel = Callable[[str], Path]
NEEDS = ["ray==2.60.0", "torch==2.13.0", 'vllm==0.32.0; extra == "vllm-cuda"']


def judged(check: str, **changes: Any) -> Finding:
    """The finding about `check` on a healthy machine with `changes`."""
    (one,) = [f for f in doctor.local(replace(HEALTHY, **changes), NEEDS) if f.check == check]
    return one


def test_a_healthy_machine_is_all_well_and_gets_no_advice() -> None:
    findings = doctor.local(HEALTHY, NEEDS)
    assert {f.verdict for f in findings} == {Verdict.OK}
    assert not any(f.advice for f in findings)
    assert doctor.exit_code(findings) == 0


@pytest.mark.parametrize(
    ("check", "changes", "verdict", "said"),
    [
        ("python", {"python": "3.10.2"}, "fail", "Python 3.11 or newer"),
        ("versions", {"versions": {"ray": "2.60.0"}}, "fail", "torch is not installed"),
        (
            "versions",
            {"versions": {"ray": "2.59.0", "torch": "2.13.0"}},
            "fail",
            "ray 2.59.0 is not of the supported ==2.60.0",
        ),
        (
            "versions",
            {"versions": {**HEALTHY.versions, "vllm": "0.31.0"}},
            "warn",
            "pip install 'vllm==0.32.0'",
        ),
        ("devices", {"torch_gpus": None}, "fail", "torch cannot be imported"),
        ("devices", {"gpus": ["H100"] * 8, "torch_gpus": 0}, "fail", "8 x H100, of which torch"),
        ("devices", {"gpus": None, "torch_gpus": 8}, "warn", "nvidia-smi -pm 1"),
        ("memory", {"memory_free": 1 * GIB}, "fail", "1.0 GiB of 64.0 GiB free"),
        ("memory", {"memory_free": 5 * GIB}, "warn", "fewer replicas"),
        ("shm", {"shm_free": 64 << 20}, "fail", "--shm-size"),
        ("shm", {"shm_free": 4 * GIB}, "warn", "cluster.object_store_gib"),
        ("disk", {"disks": {"/": (1000 * GIB, 40 * GIB)}}, "fail", "Ray stops making objects"),
        ("disk", {"disks": {"/": (100 * GIB, 15 * GIB)}}, "warn", "15.0 GiB of 100.0 GiB"),
        ("files", {"nofile": (1024, 2048)}, "fail", "limits.conf"),
        ("files", {"nofile": (1024, 1 << 20)}, "warn", "ulimit -n 65536"),
    ],
)
def test_what_is_not_well_is_told_with_what_to_do(
    check: str, changes: dict[str, Any], verdict: str, said: str
) -> None:
    finding = judged(check, **changes)
    assert finding.verdict == verdict
    assert said in f"{finding.seen} -> {finding.advice}"
    assert finding.advice
    assert doctor.exit_code([finding]) == (verdict == "fail")


def group(folder: Path, **files: object) -> None:
    """A control group's files; the first `_` of a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


STAT_V2 = f"anon {3 * GIB}\nactive_file {GIB // 2}\ninactive_file {GIB // 2}\nfile {4 * GIB}"
STAT_V1 = f"inactive_file 7\ntotal_inactive_file {GIB // 2}\ntotal_active_file {GIB // 2}"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Control groups of this process, which is in those that /proc/self/cgroup is to name, on a
    machine of 64 GiB."""
    import psutil

    machine = SimpleNamespace(total=64 * GIB, available=60 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    monkeypatch.setattr(resources, "ROOT", tmp_path)

    def of(own: str) -> Path:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(own)
        return tmp_path / "sys/fs/cgroup"

    return of


def seen_memory() -> tuple[int, int]:
    """Total and free, as the doctor sees it; a plan for this machine sees the same."""
    seen = observe([])
    (node,) = resources.this_machine().nodes
    assert node.memory_bytes == seen.memory
    return seen.memory, seen.memory_free


def test_in_a_container_memory_is_what_the_container_may_have(kernel: Kernel) -> None:
    mount = kernel("0::/\n")
    group(mount, memory_max=4 * GIB, memory_current=2 * GIB, memory_stat=STAT_V2)
    assert seen_memory() == (4 * GIB, 3 * GIB)


def test_the_narrowest_group_around_a_job_counts(kernel: Kernel) -> None:
    mount = kernel("0::/slurm/job_7/step_0\n")
    group(mount / "slurm", memory_max=3 * GIB, memory_current=2 * GIB, memory_stat=STAT_V2)
    job = mount / "slurm/job_7"
    group(job, memory_max=2 * GIB, memory_current=GIB, memory_stat=STAT_V2)
    group(job / "step_0", memory_max="max", memory_current=GIB, memory_stat=STAT_V2)
    assert seen_memory() == (2 * GIB, 2 * GIB)


@pytest.mark.parametrize("path", ["/", "/docker/0123"])  # a container may see its group as the root
def test_the_older_groups_are_read_too(kernel: Kernel, path: str) -> None:
    mount = kernel(f"9:name=systemd:/x\n4:cpu,memory:{path}\n0::/\n")
    files = {"memory_usage_in_bytes": 2 * GIB, "memory_stat": STAT_V1}
    group(mount / "memory", memory_limit_in_bytes=5 * GIB, **files)
    assert seen_memory() == (5 * GIB, 4 * GIB)


def test_without_a_limit_memory_is_the_machines(kernel: Kernel) -> None:
    mount = kernel("0::/\n4:memory:/\n")
    none = {"memory_limit_in_bytes": 9223372036854771712, "memory_usage_in_bytes": GIB}
    group(mount / "memory", **none, memory_stat=STAT_V1)
    group(mount, memory_max="max", memory_current=GIB, memory_stat=STAT_V2)
    assert seen_memory() == (64 * GIB, 60 * GIB)


@pytest.mark.parametrize("free", [2 * GIB, 100 * GIB, 4096 * GIB])
@pytest.mark.parametrize("shm_free", [GIB, 20 * GIB, 4096 * GIB])
def test_the_object_store_is_as_large_as_ray_makes_it(
    free: int, shm_free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import utils

    monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda: shm_free)
    assert doctor.default_store(free, shm_free) == utils.resolve_object_store_memory(free)


def test_a_store_that_runs_is_judged_by_its_own_size() -> None:
    large = {"memory": 2048 * GIB, "memory_free": 2000 * GIB, "shm": 1024 * GIB}
    assert "would take 186.3 GiB" in judged("shm", **large, shm_free=1024 * GIB).seen
    mine = judged("shm", **large, shm_free=100 * GIB, store=950 * GIB)
    assert mine.verdict == "ok"  # what is not free is the store's
    assert "takes 950.0 GiB" in mine.seen
    over = judged("shm", shm=16 * GIB, shm_free=16 * GIB, store=20 * GIB)
    assert over.verdict == "warn"
    assert "--shm-size" in over.advice


@pytest.mark.parametrize(
    ("changes", "verdict", "said"),
    [
        ({}, "ok", "leaves authentication off"),
        ({"auth_mode": "token", "token_set": True}, "ok", "RAY_AUTH_TOKEN"),
        ({"auth_mode": "token", "token_file_mode": 0o600}, "ok", "authentication is on"),
        ({"auth_mode": "token", "token_file_mode": 0o644}, "warn", "chmod 600 /t"),
        ({"auth_mode": "token"}, "fail", "no token at /t"),
        ({"token_file_mode": 0o600}, "warn", "RAY_AUTH_MODE=token on every node"),
        ({"auth_mode": "disabled"}, "warn", "can run code on it"),
        ({"auth_mode": "tokens"}, "fail", "set it to token or disabled"),
    ],
)
def test_the_state_of_the_token(changes: dict[str, Any], verdict: str, said: str) -> None:
    finding = doctor.token(replace(HEALTHY, token_path="/t", **changes))
    assert finding.verdict == verdict
    assert said in f"{finding.seen} -> {finding.advice}"


def test_ports_in_use_matter_where_no_cluster_is_meant_to_run() -> None:
    assert doctor.ports([], connected=False).verdict is Verdict.OK
    assert doctor.ports([6379], connected=True).verdict is Verdict.OK
    busy = doctor.ports([6379, 22], connected=False)
    assert busy.verdict is Verdict.WARN
    assert "6379 (a head's GCS)" in busy.seen


def test_a_clock_is_off_beyond_what_the_round_trip_explains() -> None:
    assert doctor.clock(0.4, 0.1, "n").verdict is Verdict.OK
    assert doctor.clock(-3.0, 2.5, "n").verdict is Verdict.OK
    assert doctor.clock(-3.0, 0.1, "n").verdict is Verdict.WARN
    assert doctor.clock(120.0, 0.1, "n").verdict is Verdict.FAIL


def test_nodes_with_other_versions_are_named() -> None:
    other = replace(HEALTHY, versions={**HEALTHY.versions, "torch": "2.12.0"})
    assert doctor.same_versions({"a": HEALTHY, "b": HEALTHY}).verdict is Verdict.OK
    finding = doctor.same_versions({"a": HEALTHY, "b": other, "c": HEALTHY})
    assert finding.verdict is Verdict.FAIL
    assert "a, c: " in finding.seen
    assert "torch 2.12.0" in finding.seen


def test_keepalive_settings_matter_between_nodes() -> None:
    complete = replace(
        HEALTHY,
        env={f"RAY_grpc_client_keepalive_{n}_ms": "5000" for n in ("time", "timeout")},
    )
    assert doctor.keepalive(HEALTHY, 1, "n") is None
    assert doctor.keepalive(complete, 3, "n") is None
    missing = doctor.keepalive(HEALTHY, 3, "n")
    assert missing is not None
    assert missing.verdict is Verdict.WARN


def test_slow_links_are_told() -> None:
    assert doctor.bandwidth("gloo", "a - b", 1.2e9).verdict is Verdict.OK
    slow = doctor.bandwidth("nccl", "a - b", 0.02e9)
    assert slow.verdict is Verdict.WARN
    assert "NCCL_SOCKET_IFNAME" in slow.advice


def test_every_node_is_in_some_pair_and_pairs_grow_with_nodes_only() -> None:
    assert pairs(["a"]) == []
    assert pairs(["a", "b", "c"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    many = [f"n{i}" for i in range(40)]
    assert len(pairs(many)) == 40
    assert {name for pair in pairs(many) for name in pair} == set(many)


def test_an_address_where_nothing_answers_is_a_finding_within_seconds() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # bound, and nothing listens
        started = time.monotonic()
        (finding,) = examine(address, [], [])
    assert finding.verdict is Verdict.FAIL
    assert "nothing answers" in finding.seen
    assert time.monotonic() - started < 15


def test_a_cluster_is_asked_for_with_a_deadline_before_ray_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def refuse(address: str) -> None:
        raise ClusterUnreachable(f"nothing answers at {address!r}")

    monkeypatch.setattr("cluster.doctor.nodes.check_head", refuse)
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was asked"))
    (finding,) = examine("auto", [], [])
    assert (finding.verdict, finding.seen) == ("fail", "nothing answers at 'auto'")


def test_local_is_no_cluster_to_examine(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray was started"))
    assert "cluster" not in {finding.check for finding in examine_all(None)}


@pytest.mark.parametrize(
    ("free", "taken", "measured"),
    [
        ({}, ["a", "b", "c"], []),
        ({"a": 1.0, "b": 0.5, "c": 2.0}, ["b"], ["a - c"]),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, [], ["a - b", "a - c", "b - c"]),
    ],
)
def test_no_gpu_is_asked_for_that_a_run_holds(
    free: dict[str, float],
    taken: list[str],
    measured: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever asked would wait, and be told of ports that are closed."""
    import ray

    def call(answer: Any) -> Any:
        return SimpleNamespace(remote=lambda *given, **options: lambda: answer)

    def probe(node: dict[str, Any], gpus: int = 0) -> Any:
        if gpus:
            assert free.get(node["NodeID"], 0.0) >= gpus
        return SimpleNamespace(
            observe=call(replace(HEALTHY, gpus=["NVIDIA H100"], torch_gpus=1)),
            clock=call(time.time()),
            meeting_place=call("a:1"),
            measure=call(2.0e9),
        )

    def get(what: Any, timeout: float) -> Any:
        return [each() for each in what] if isinstance(what, list) else what()

    alive = [{"NodeID": name, "NodeManagerAddress": name, "Alive": True} for name in "abc"]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(nodes, "_probe", probe)
    left = {name: {"CPU": 4.0, "GPU": amount} for name, amount in free.items()}
    monkeypatch.setattr(nodes, "free_resources", lambda: left)
    found = [finding for finding in nodes._examine([], []) if finding.check == "nccl bandwidth"]
    assert {finding.verdict for finding in found} == {Verdict.OK}
    told = [f"not measured: no free GPU on {', '.join(taken)}"] if taken else []
    assert [finding.seen for finding in found] == told + [f"{m}: 2.00 GB/s" for m in measured]


@pytest.mark.slow
def test_the_store_of_a_node_is_the_one_that_its_ray_has(ray_session: None) -> None:
    import ray

    findings = list(nodes._examine([], []))
    (shm,) = [finding for finding in findings if finding.check == "shm"]
    store = ray.cluster_resources()["object_store_memory"] / GIB
    assert f"Ray's object store takes {store:.1f} GiB" in shm.seen


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {k: v for k, v in plain_environment().items() if k != "RAY_ADDRESS"}
    line = ["-m", "aligntune.cli", "doctor", *arguments]
    return drivers.run(line, env={**own, **environment}, timeout=240)


@pytest.mark.slow
def test_this_machine_is_examined_and_every_line_is_a_finding() -> None:
    done = command("--json")
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    checks = {finding["check"] for finding in findings}
    assert checks >= {"python", "versions", "devices", "memory", "shm", "disk", "files"}
    assert checks >= {"ports", "token"}
    assert done.returncode == any(finding["verdict"] == "fail" for finding in findings)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.skipif(bool(why_no_namespaces()), reason=f"several nodes: {why_no_namespaces()}")
def test_every_node_of_a_cluster_is_examined_with_its_clock_and_links(tmp_path: Path) -> None:
    with cluster(tmp_path, 2) as nodes:

        def on_head(**environment: str) -> tuple[int, list[dict[str, str]], float]:
            """`aligntune doctor` there: exit code, findings, seconds."""
            settings = [f"{name}={value}" for name, value in environment.items()]
            doctor_there = [sys.executable, "-m", "aligntune.cli", "doctor", "--json", "--address"]
            started = time.monotonic()
            process = nodes.run_on(
                nodes.head,
                ["env", *settings, *doctor_there, f"{nodes.head.address}:6379"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            out, err = process.communicate(timeout=200)
            assert out, err
            found = [json.loads(line) for line in out.splitlines()]
            return process.returncode, found, time.monotonic() - started

        code, findings, _ = on_head()
        of = {check: [f for f in findings if f["check"] == check] for check in ("clock", "memory")}
        addresses = {node.address for node in nodes.nodes}
        assert {f["node"] for f in of["clock"]} == addresses, findings
        assert all(f["verdict"] == "ok" for f in of["clock"])
        assert {f["node"] for f in of["memory"]} == {"", *addresses}
        (link,) = [f for f in findings if f["check"] == "gloo bandwidth"]
        assert link["verdict"] in ("ok", "warn"), link
        assert "GB/s" in link["seen"]
        assert [f["verdict"] for f in findings if f["check"] == "same versions"] == ["ok"]
        assert not [f for f in findings if f["check"] == "keepalive"], "nodes.py sets them"
        assert code == any(f["verdict"] == "fail" for f in findings)

        outside = command("--json", "--address", f"{nodes.head.address}:6379", **nodes.environment)
        assert outside.returncode == 1
        assert "this machine is no node of the cluster" in outside.stdout.splitlines()[-1]

        wrong = tmp_path / "wrong"
        wrong.write_text("0" * 64)
        wrong.chmod(0o600)
        code, findings, seconds = on_head(RAY_AUTH_TOKEN_PATH=str(wrong))
        assert code == 1
        assert (findings[-1]["check"], findings[-1]["verdict"]) == ("cluster", "fail")
        assert "token" in findings[-1]["seen"].lower()
        assert seconds < 40  # of which the look at this machine is most, on a busy one
