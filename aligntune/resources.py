"""What a role's settings ask of a cluster, in the cluster's own words."""

from __future__ import annotations

from actors.specs import RoleResources
from cluster.bundles import RoleRequest


def role_request(role: str, replicas: int, resources: RoleResources) -> RoleRequest:
    """What `replicas` of a role ask for."""
    return RoleRequest(
        role,
        replicas,
        resources.cpus,
        resources.gpus,
        resources.placement,
        int((resources.memory_gib or 0) * 2**30),
    )
