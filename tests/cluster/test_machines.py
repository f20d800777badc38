"""What this machine has: its processors within a container's quota, and the GPUs CUDA shows."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from cluster import resources
from cluster.resources import BadDescription, described, host_cpus, this_machine

QUERY = """#!/bin/sh
cat <<'END'
0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559, 9.0
1, GPU-bb22, NVIDIA L4, 23034, 8.9
2, GPU-cc33, Tesla T4, 15360, 7.5
3, GPU-dd44, NVIDIA GeForce RTX 5090, 32607, 12.0
END
"""


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(QUERY)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("visible", "count", "kind"),
    [
        (None, 4, "h100-80gb"),
        ("", 0, None),
        ("-1", 0, None),
        ("1", 1, "l4-24gb"),
        ("2,0", 2, "t4-16gb"),
        ("GPU-bb", 1, "l4-24gb"),
        ("1,9,0", 1, "l4-24gb"),  # CUDA stops at the first that it does not know
        ("3", 1, "rtx-3090-24gb"),  # the largest known one that it has the memory of
    ],
)
def test_the_gpus_of_this_machine_are_those_that_cuda_shows(
    gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, kind: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    node = this_machine().nodes[0]
    assert (node.gpus, node.gpu) == (count, kind)


@pytest.mark.parametrize(
    ("group", "files", "cpus"),
    [
        ("0::/job", {"sys/fs/cgroup/job/cpu.max": "150000 100000"}, 2),
        ("0::/", {"sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        (
            "3:cpu,cpuacct:/job",
            {
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        ("0::/job", {"sys/fs/cgroup/job/cpu.max": "max 100000"}, 64),
    ],
)
def test_processors_are_those_that_a_container_grants(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    files: dict[str, str],
    cpus: int,
) -> None:
    monkeypatch.setattr(resources, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for name, content in {"proc/self/cgroup": group, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    assert host_cpus() == cpus


@pytest.mark.parametrize(
    ("nodes", "gpus", "cpus"),
    [(10**14, 0, None), (1, 10**14, None), (65_536, 2, None), (1, 0, math.nan), (1, 0, math.inf)],
)
def test_a_described_cluster_has_bounds(nodes: int, gpus: int, cpus: float | None) -> None:
    with pytest.raises(BadDescription, match=r"made for up to|or more"):
        described(nodes, gpus, "h100-80gb" if gpus else None, cpus)
