"""What each role of a run asks of the cluster. Light: no framework is imported."""

from __future__ import annotations

from aligntune.config.online import RunConfig
from aligntune.online.role_table import roles_of
from aligntune.resources import role_request
from cluster.bundles import RoleRequest


def role_requests(config: RunConfig) -> list[RoleRequest]:
    """What the run's roles ask for, those alone that it has.

    Raises UserError where a role's settings contradict each other.
    """
    return [role_request(r.name, r.size(config), r.takes(config)) for r in roles_of(config)]
