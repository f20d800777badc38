"""The machines that a run can have: of the connected Ray, of the cluster it names, or this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.gpus import least_by_ray, type_of_machine
from cluster.resources import (
    Cluster,
    as_cluster,
    gpu_kinds,
    host_cpus,
    living_nodes,
    this_machine,
)
from cluster.session import connected_already, resolve_address, session
from cluster.specs import ClusterSpec

PLENTY = 10_000.0  # logical CPUs: a Ray started for a run has as many as the run asks for
ASK_S = 90.0  # for nodes to say what GPUs they have: a process each, and nvidia-smi


@dataclass(frozen=True)
class Machines:
    """What there is to decide by."""

    cluster: Cluster
    cores: int  # processors of the node with the fewest
    here: bool  # this machine alone, with a Ray that a run starts for itself


def machines(spec: ClusterSpec) -> Machines:
    """What a run with this spec can have. On this machine nothing is started.

    Raises ClusterUnreachable where a cluster is named and does not answer, UnknownName where
    nvidia-smi here does not.
    """
    if not connected_already() and resolve_address(spec) == "local":
        return Machines(this_machine(PLENTY), host_cpus(), here=True)
    with session(spec, cpus=0):
        nodes = living_nodes()
        least = {str(node["NodeID"]): least_by_ray(gpu_kinds(node)) for node in nodes}
        cluster = _typed(as_cluster(nodes), least)
    return Machines(cluster, _cores(cluster), here=False)


def _typed(cluster: Cluster, least: Mapping[str, str | None]) -> Cluster:
    """The cluster with the types of GPUs that Ray's name leaves open; those nodes are asked. One
    that does not tell has the smallest type of that name, by `least`: ids of all nodes, in order.
    """
    open_ = [
        name
        for name, node in zip(least, cluster.nodes, strict=True)
        if node.gpus >= 1 and node.gpu is None
    ]
    said = {**least, **(_ask(open_) if open_ else {})}
    nodes = (
        node._replace(gpu=said[name]) if name in open_ else node
        for name, node in zip(least, cluster.nodes, strict=True)
    )
    return replace(cluster, nodes=tuple(nodes))


def _ask(ids: Sequence[str]) -> Mapping[str, str]:
    """The type of its GPUs by node; without those that do not tell it within `ASK_S`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(type_of_machine)
    waiting = {}
    for name in ids:
        there = NodeAffinitySchedulingStrategy(name, soft=False)
        asked = task.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote()
        waiting[asked] = name
    done, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=ASK_S)
    for asked in late:
        ray.cancel(asked, force=True)
    said = {}
    for asked in done:
        try:
            kind = ray.get(asked)
        except ray.exceptions.RayError:
            continue  # no aligntune, or a silent nvidia-smi: whoever needs the type says so
        if kind is not None:
            said[waiting[asked]] = kind
    return said


def _cores(cluster: Cluster) -> int:
    """Ray's CPUs are logical ones: a node that is this machine has no more than its processors."""
    import psutil

    own = {one.address for of in psutil.net_if_addrs().values() for one in of}
    return min(
        (
            min(int(node.cpus), host_cpus()) if node.name in own else int(node.cpus)
            for node in cluster.nodes
            if node.cpus >= 1  # a head that is to run nothing has none
        ),
        default=1,
    )
