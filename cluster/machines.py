"""The machines that a run can have: of the connected Ray, of the cluster it names, or this one."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.resources import Cluster, connected, host_cpus, this_machine
from cluster.session import connected_already, resolve_address, session
from cluster.specs import ClusterSpec

PLENTY = 10_000.0  # logical CPUs: a Ray started for a run has as many as the run asks for


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
    with session(spec, cpus=0, gpus=0):
        cluster = connected()
    return Machines(cluster, _cores(cluster), here=False)


def _cores(cluster: Cluster) -> int:
    """Ray's CPUs are logical ones: a node that is this machine has no more than its processors."""
    import psutil

    own = {one.address for of in psutil.net_if_addrs().values() for one in of}
    return max(
        1,
        min(
            min(int(node.cpus), host_cpus()) if node.name in own else int(node.cpus)
            for node in cluster.nodes
        ),
    )
