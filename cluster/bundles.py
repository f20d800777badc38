"""What a run asks of a cluster: bundles of one size a role, some shared between roles. Pure.

Where they go is decided in `cluster.placement`, what Ray is asked for in `cluster.reservation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.tables import nearest

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

UNIT = 10_000  # Ray counts in ten-thousandths; whole numbers have no rounding


class BadRequest(ValueError):
    """A request that no cluster could meet, such as one and a half GPUs."""


@dataclass(frozen=True)
class RoleRequest:
    """What one role asks for: `replicas` bundles of the same size, none of which spans nodes."""

    role: str
    replicas: int
    cpus: float
    gpus: float = 0.0  # of one replica; a tensor-parallel one has a GPU for each of its shards
    placement: Strategy = "PACK"
    memory_bytes: int = 0  # of the host; 0 asks for none

    @property
    def bundle(self) -> dict[str, float]:
        """One replica's resources as Ray names them."""
        return bundle(self.cpus, self.gpus, self.memory_bytes)


def bundle(cpus: float, gpus: float, memory_bytes: float) -> dict[str, float]:
    """Resources as Ray names them, without those that are 0."""
    amounts = {"CPU": cpus, "GPU": gpus, "memory": memory_bytes}
    return {name: amount for name, amount in amounts.items() if amount}


@dataclass(frozen=True)
class BundleSet:
    """The bundles of one role, or of roles whose replicas of one number share a bundle."""

    members: tuple[RoleRequest, ...]

    @property
    def name(self) -> str:
        """The roles, as in policy+rollout."""
        return "+".join(request.role for request in self.members)

    @property
    def replicas(self) -> int:
        """Bundles."""
        return self.members[0].replicas

    @property
    def placement(self) -> Strategy:
        """How the bundles go over nodes."""
        return self.members[0].placement

    @property
    def bundle(self) -> dict[str, float]:
        """One bundle: CPUs and memory add up, the device is shared."""
        cpus = sum(request.cpus for request in self.members)
        memory = sum(request.memory_bytes for request in self.members)
        return bundle(cpus, self.gpus, memory)

    @property
    def gpus(self) -> float:
        """Of one bundle."""
        asked = sum(request.gpus for request in self.members)
        return asked if len(self.members) == 1 else min(1.0, asked)

    def share(self, role: str) -> float:
        """The part of the bundle's GPU that `role` is told to ask Ray for."""
        asked = next(request.gpus for request in self.members if request.role == role)
        if len(self.members) == 1 or not asked:
            return asked
        together = sum(request.gpus for request in self.members)
        return int(UNIT * asked * self.gpus / together) / UNIT

    def describe(self) -> str:
        """As in: rollout 4 x (2 CPU, 1 GPU)."""
        return f"{self.name} {self.replicas} x ({amounts(self.bundle)})"


def amounts(resources: Mapping[str, float]) -> str:
    """As in: 2 CPU, 1 GPU, 8 GiB memory."""
    parts = [
        f"{value / 2**30:g} GiB memory" if name == "memory" else f"{value:g} {name}"
        for name, value in resources.items()
    ]
    return ", ".join(parts) or "nothing"


def bundle_sets(
    requests: Sequence[RoleRequest], colocate: Sequence[Sequence[str]] = ()
) -> tuple[BundleSet, ...]:
    """The requests with `colocate`d roles put together, in the order of the requests.

    Raises:
        BadRequest: a role that the run lacks or that is named twice, unequal replicas or
            strategies, or a number of GPUs that cannot be given.
    """
    by_role = {request.role: request for request in requests}
    lead: dict[str, tuple[str, ...]] = {}
    for group in colocate:
        for role in group:
            if role not in by_role:
                hint = nearest(role, by_role)
                raise BadRequest(f"cluster.colocate: this run has no role {role!r}; {hint}")
            if role in lead or list(group).count(role) > 1:
                raise BadRequest(f"cluster.colocate names {role} twice; it has one place")
        members = tuple(by_role[role] for role in group)
        _check_group(members)
        for role in group:
            lead[role] = tuple(group)
    sets = []
    for request in requests:
        if request.gpus > 1 and not float(request.gpus).is_integer():
            raise BadRequest(
                f"{request.role} asks for {request.gpus:g} GPUs a replica; above 1 give a whole "
                "number"
            )
        together = lead.get(request.role, (request.role,))
        if together[0] == request.role:
            sets.append(BundleSet(tuple(by_role[role] for role in together)))
    return tuple(sets)


def _check_group(members: Sequence[RoleRequest]) -> None:
    names = " and ".join(request.role for request in members)
    if len({request.replicas for request in members}) > 1:
        counts = ", ".join(f"{request.role} has {request.replicas}" for request in members)
        raise BadRequest(f"cluster.colocate: {names} share places one by one, but {counts}")
    if len({request.placement for request in members}) > 1:
        raise BadRequest(
            f"cluster.colocate: {names} share places but not resources.placement; give them one"
        )
    for request in members:
        if len(members) > 1 and request.gpus > 1:
            raise BadRequest(
                f"cluster.colocate: {names} would share one GPU a replica, and {request.role} asks "
                f"for {request.gpus:g}; give it one, or a place of its own"
            )


def totals(requests: Sequence[RoleRequest]) -> dict[str, float]:
    """CPUs and GPUs that all roles ask for together."""
    return {
        "CPU": sum(request.cpus * request.replicas for request in requests),
        "GPU": sum(request.gpus * request.replicas for request in requests),
    }
