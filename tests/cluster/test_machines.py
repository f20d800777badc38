"""What this machine has: its processors within a container's quota, and the GPUs CUDA shows."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import machines, resources
from cluster.gpus import (
    LocalGpu,
    gpu_names,
    gpu_type,
    least_by_ray,
    type_by_memory,
    type_of_machine,
)
from cluster.resources import BadDescription, Cluster, described, host_cpus, this_machine

QUERY = """#!/bin/sh
cat <<'END'
0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559, 9.0
1, GPU-bb22, NVIDIA L4, 23034, 8.9
2, GPU-cc33, Tesla T4, 15360, 7.5
3, GPU-dd44, NVIDIA GeForce RTX 5090, 32607, 12.0
4, GPU-ee55, NVIDIA GeForce RTX 4080, 16376, 8.9
5, GPU-ff66, NVIDIA GeForce GTX 1080 Ti, 11264, 6.1
6, GPU-ab77, NVIDIA A10G, 23028, 8.6
7, GPU-cd88, NVIDIA A10, 23028, 8.6
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
        (None, 8, "fp32-11264mib"),  # what all of them have
        ("", 0, None),
        ("-1", 0, None),
        ("1", 1, "l4-24gb"),
        ("2,0", 2, "t4-16gb"),
        ("GPU-bb", 1, "l4-24gb"),
        ("1,9,0", 1, "l4-24gb"),  # CUDA stops at the first that it does not know
        ("3", 1, "rtx-3090-24gb"),  # the largest known one that it has the memory of
        ("4", 1, "bf16-16376mib"),  # less than any known one with its arithmetic
        ("5", 1, "fp32-11264mib"),
        ("6", 1, "a10g-24gb"),
        ("7", 1, "a10-24gb"),
        ("0,4", 2, "bf16-16376mib"),
        ("4,2", 2, "t4-16gb"),
        ("MIG-0a1b", 1, None),  # nvidia-smi tells nothing of a part of a GPU
        ("MIG-0a1b,MIG-2c3d", 2, None),
        ("0,MIG-GPU-aa11/1/0", 2, None),
    ],
)
def test_the_gpus_of_this_machine_are_those_that_cuda_shows(
    gpus: None, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, kind: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    node = this_machine().nodes[0]
    assert (node.gpus, node.gpu) == (count, kind)


def test_gpus_of_several_types_are_told(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert this_machine().called("l4-24gb") == (
        "l4-24gb, as the least of h100-80gb, l4-24gb; CUDA_VISIBLE_DEVICES leaves some of them out"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,1")
    assert this_machine().called("l4-24gb") == "l4-24gb"


def test_what_ray_shows_no_gpu_still_sees_the_machines(
    gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as of a role without a GPU
    assert type_of_machine() == "fp32-11264mib"


@given(st.sampled_from(["NVIDIA A100", "Tesla X"]), st.integers(1, 300_000), st.booleans())
def test_every_gpu_has_a_type_with_its_arithmetic_and_no_more_than_its_memory(
    product: str, mib: int, bfloat16: bool
) -> None:
    kind = gpu_type(type_by_memory(LocalGpu(product, mib, bfloat16)))
    assert kind.bfloat16 == bfloat16
    assert 0 < kind.memory_bytes <= mib * 2**20 * 1.031  # as near as a name's own memory has to be
    assert kind.flops >= min(
        gpu_type(name).flops for name in gpu_names() if gpu_type(name).bfloat16 == bfloat16
    )


def test_a_gpu_below_the_table_has_its_own_memory_and_the_least_rates() -> None:
    kind = gpu_type("bf16-16376mib")
    assert kind.memory_bytes == 16376 * 2**20
    assert (kind.flops, kind.name) == (gpu_type("a10g-24gb").flops, "bf16-16376mib")
    assert gpu_type("fp32-11264MiB").flops == gpu_type("t4-16gb").flops


def test_nodes_whose_gpus_rays_name_leaves_open_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    known, plain = described(1, 2, "h100-80gb").nodes[0], described(1, 0).nodes[0]
    open_ = known._replace(gpu=None)
    asked: list[str] = []

    def ask(ids: list[str]) -> dict[str, str]:
        asked.extend(ids)
        return {"b": "a100-80gb"}

    monkeypatch.setattr(machines, "_ask", ask)
    cluster = Cluster((known, open_, plain, open_), "Ray")
    least = {"a": None, "b": least_by_ray(["A100"]), "c": None, "d": None}
    typed = machines._typed(cluster, least)
    assert asked == ["b", "d"]
    assert [node.gpu for node in typed.nodes] == ["h100-80gb", "a100-80gb", None, None]


@pytest.mark.parametrize(("kind", "least"), [("A100", "a100-40gb"), ("V100", "v100-16gb")])
def test_a_node_that_does_not_tell_its_gpus_has_the_smallest_of_their_name(
    monkeypatch: pytest.MonkeyPatch, kind: str, least: str
) -> None:
    monkeypatch.setattr(machines, "_ask", lambda ids: {})
    node = {"NodeManagerAddress": "n", "Resources": {"GPU": 8.0, f"accelerator_type:{kind}": 1.0}}
    cluster = Cluster((resources.from_ray(node),), "Ray")
    assert cluster.nodes[0].gpu is None
    typed = machines._typed(cluster, {"a": least_by_ray(resources.gpu_kinds(node))})
    assert typed.nodes[0].gpu == least


def test_a_head_without_processors_is_not_the_node_with_the_fewest() -> None:
    nodes = described(3, 0, None, 8).nodes
    head = nodes[0]._replace(cpus=0.0)
    assert machines._cores(Cluster((head, *nodes[1:]), "Ray")) == 8
    assert machines._cores(Cluster((head,), "Ray")) == 1


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
