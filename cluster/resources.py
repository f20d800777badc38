"""What a cluster has, as plain data: described, of this machine, or read from a connected Ray.

Amounts are Ray's logical ones. Reading them starts nothing, and nothing here imports Ray before a
connected cluster is asked about.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cluster.gpus import gpu_names, gpu_type, least_type, local_gpus, type_by_memory, type_by_ray

ROOT = Path("/")  # of the files in which the kernel tells of control groups


class BadDescription(ValueError):
    """A description of a cluster that describes none; the message says which number."""


class Node(NamedTuple):
    """What one machine offers. `gpus` may be a fraction where only free amounts are meant."""

    name: str
    cpus: float
    gpus: float = 0.0
    memory_bytes: int | None = None  # of the host; None: not known
    gpu: str | None = None  # a name of the table of GPUs; None: not known


@dataclass(frozen=True)
class Cluster:
    """Nodes in the order in which ranks go over them."""

    nodes: tuple[Node, ...]
    source: str  # where this was learnt, for people
    note: str = ""  # what else is to be known of its GPUs

    def describe(self) -> str:
        """One line: nodes, and what they have together."""
        cpus = sum(node.cpus for node in self.nodes)
        gpus = sum(node.gpus for node in self.nodes)
        kinds = sorted({node.gpu or "unknown type" for node in self.nodes if node.gpus})
        what = f" ({', '.join(kinds)})" if kinds else ""
        return f"{self.source}: {len(self.nodes)} node(s), {cpus:g} CPU, {gpus:g} GPU{what}"

    def called(self, gpu: str) -> str:
        """A type of its GPUs, for people."""
        return ", ".join(filter(None, (gpu, self.note)))


MOST_DESCRIBED = 65_536  # nodes or GPUs of a cluster that need not exist


def described(
    nodes: int, gpus_per_node: int = 0, gpu: str | None = None, cpus_per_node: float | None = None
) -> Cluster:
    """A cluster of equal nodes that need not exist; 16 CPUs a GPU (and 16 at least) unless said.

    Raises:
        BadDescription: a number that describes no cluster, or GPUs without a type.
        UnknownName: no such GPU.
    """
    for value, least, name in (
        (nodes, 1, "--nodes"),
        (gpus_per_node, 0, "--gpus-per-node"),
        (1 if cpus_per_node is None else cpus_per_node, 1, "--cpus-per-node"),
    ):
        if not least <= value:  # NaN is neither
            raise BadDescription(f"{name} is {value:g}; a cluster has {least} or more")
        if value > MOST_DESCRIBED:
            raise BadDescription(
                f"{name} is {value:g}; a plan is made for up to {MOST_DESCRIBED:,} of them"
            )
    if nodes * max(1, gpus_per_node) > MOST_DESCRIBED:
        raise BadDescription(
            f"{nodes} nodes of {gpus_per_node} GPUs: a plan is made for up to {MOST_DESCRIBED:,}"
        )
    if gpus_per_node and gpu is None:
        raise BadDescription(
            f"--gpus-per-node is {gpus_per_node} but --gpu names no type; known are "
            f"{', '.join(gpu_names())}"
        )
    if gpu is not None and not gpus_per_node:
        raise BadDescription(f"--gpu is {gpu} but --gpus-per-node is 0; say how many a node has")
    kind = gpu_type(gpu).name if gpu is not None else None
    cpus = cpus_per_node if cpus_per_node is not None else 16.0 * max(1, gpus_per_node)
    width = len(str(nodes - 1))
    return Cluster(
        tuple(
            Node(f"node-{index:0{width}}", float(cpus), float(gpus_per_node), None, kind)
            for index in range(nodes)
        ),
        "described",
    )


def this_machine(cpus: float = 0) -> Cluster:
    """This machine, as a Ray started here for a run that asks for `cpus` would offer it.

    Its memory is what a container or a batch job leaves of the machine's.

    Raises UnknownName where nvidia-smi does not answer.
    """
    found = max(os.cpu_count() or 1, -(-cpus // 1))
    memory, _ = host_memory()
    gpus = local_gpus()
    kind = least_type(gpus)
    node = Node("this-machine", float(found), float(len(gpus)), memory, kind)
    kinds = sorted({type_by_memory(gpu) for gpu in gpus}) if kind else []
    note = f"as the least of {', '.join(kinds)}; CUDA_VISIBLE_DEVICES leaves some of them out"
    return Cluster((node,), "this machine", note if len(kinds) > 1 else "")


def host_memory() -> tuple[int, int]:
    """Bytes that this process can have in all, and that are free: the machine's, or what the
    narrowest control group around it (a container, a Slurm job) grants and has left."""
    import psutil

    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for limit, used in _memory_limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


@dataclass(frozen=True)
class _ControlGroups:
    """Where a version of control groups is mounted, and what its files are called."""

    mount: str
    limit: str
    used: str
    cached: tuple[str, str]  # in memory.stat; the kernel takes these pages back before it kills


_V1 = _ControlGroups(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_V2 = _ControlGroups(
    "sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")
)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of every control group that this process is in, and of those around."""
    own = ROOT / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _V1 if controllers else _V2
        mount = ROOT / version.mount
        inner = mount / path.lstrip("/")  # a container may see the mount alone, and as its own
        for group in (inner, *inner.parents):
            limit, used = group / version.limit, group / version.used
            if group.is_relative_to(mount) and limit.is_file() and used.is_file():
                most = limit.read_text().strip()
                if most != "max":
                    yield int(most), int(used.read_text()) - _cached(group, version)


def _cached(group: Path, version: _ControlGroups) -> int:
    """Bytes of files that a control group holds in memory and could drop."""
    rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    return sum(int(amount) for name, amount in rows if name in version.cached)


def host_cpus() -> int:
    """Processors that this process may use: of its affinity, within the quota of its container."""
    count = len(os.sched_getaffinity(0))
    for quota in _cpu_quotas():
        count = min(count, max(1, math.ceil(quota)))
    return count


def _cpu_quotas() -> Iterator[float]:
    """Processors that the control groups around this process grant, where they bound them."""
    own = ROOT / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = ROOT / "sys/fs/cgroup" / ("cpu" if controllers else "")
        inner = mount / path.lstrip("/")
        for group in (inner, *inner.parents):
            if not group.is_relative_to(mount):
                continue
            limit, quota, period = group / "cpu.max", "", ""
            if limit.is_file():
                quota, period = limit.read_text().split()
            elif (group / "cpu.cfs_quota_us").is_file():
                quota = (group / "cpu.cfs_quota_us").read_text().strip()
                period = (group / "cpu.cfs_period_us").read_text().strip()
            if quota.isdigit() and int(quota):
                yield int(quota) / int(period)


def living_nodes() -> list[Mapping[str, Any]]:
    """Entries of `ray.nodes()` that are alive, by address: the order in which ranks go."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return sorted(alive, key=lambda n: (_address_key(n["NodeManagerAddress"]), n["NodeID"]))


def connected(free: bool = False) -> Cluster:
    """The connected Ray's living nodes; with `free` what nobody holds of them."""
    nodes = living_nodes()
    if free:
        left = free_resources()
        nodes = [{**node, "Resources": left.get(node["NodeID"], {})} for node in nodes]
    return as_cluster(nodes)


def as_cluster(nodes: Sequence[Mapping[str, Any]]) -> Cluster:
    """Entries of the connected Ray's `ray.nodes()`, in their order."""
    import ray

    return Cluster(tuple(map(from_ray, nodes)), f"Ray at {_gcs_address(ray)}")


def free_resources() -> Mapping[str, Mapping[str, float]]:
    """What nobody holds of the connected Ray's nodes, by their ids."""
    from ray._private.state import available_resources_per_node  # Ray has no public one

    left: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return left


def _gcs_address(ray: Any) -> str:
    return str(ray.get_runtime_context().gcs_address)


def _address_key(address: str) -> tuple[Any, ...]:
    """Numbers in order: 10.0.0.9 before 10.0.0.10; names behind them."""
    parts = address.split(".")
    if all(part.isdigit() for part in parts):
        return (0, tuple(int(part) for part in parts))
    return (1, address)


def from_ray(node: Mapping[str, Any]) -> Node:
    """An entry of `ray.nodes()` as a Node; the GPU type comes from its label or its resource."""
    resources = node.get("Resources", {})
    memory = resources.get("memory")
    return Node(
        name=str(node["NodeManagerAddress"]),
        cpus=float(resources.get("CPU", 0.0)),
        gpus=float(resources.get("GPU", 0.0)),
        memory_bytes=None if memory is None else int(memory),
        gpu=type_by_ray(gpu_kinds(node)),
    )


def gpu_kinds(node: Mapping[str, Any]) -> list[str]:
    """What Ray calls the GPUs of an entry of `ray.nodes()`."""
    names = (name.partition(":") for name in node.get("Resources", {}))
    label = node.get("Labels", {}).get("ray.io/accelerator-type")
    return [
        *(kind for of, _, kind in names if of == "accelerator_type"),
        *([label] if label else []),
    ]
