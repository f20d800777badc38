"""Reserves what each role asks for, all before anything starts, or says what is missing.

Invariant: a reservation has a deadline, and is released on every way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class DoesNotFit(RuntimeError):
    """The cluster cannot give what the run asks for; the message says what is missing."""


@dataclass(frozen=True)
class RoleRequest:
    """What one role asks for: `replicas` bundles of the same size."""

    role: str
    replicas: int
    cpus: float
    gpus: float = 0.0
    strategy: Strategy = "PACK"

    @property
    def bundle(self) -> dict[str, float]:
        """One replica's resources as Ray names them."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


def totals(requests: Sequence[RoleRequest]) -> dict[str, float]:
    """What all roles ask for together."""
    asked = {"CPU": 0.0, "GPU": 0.0}
    for request in requests:
        for name, amount in request.bundle.items():
            asked[name] += amount * request.replicas
    return asked


def shortfall(requests: Sequence[RoleRequest], nodes: Sequence[dict[str, float]]) -> str | None:
    """Why the requests can never be met by these nodes' total resources, or None. Pure."""
    for name, asked in totals(requests).items():
        there = sum(node.get(name, 0.0) for node in nodes)
        if asked > there + 1e-9:
            roles = ", ".join(
                f"{r.role} {r.replicas} x {r.bundle[name]:g}" for r in requests if name in r.bundle
            )
            return (
                f"the run asks for {asked:g} {name} ({roles}) and the cluster's {len(nodes)} "
                f"node(s) have {there:g}"
            )
    for request in requests:
        if not any(
            all(node.get(name, 0.0) >= amount for name, amount in request.bundle.items())
            for node in nodes
        ):
            return f"no node is large enough for one {request.role} ({request.bundle})"
    return None


class Reservation:
    """Placement groups by role."""

    def __init__(self, groups: dict[str, PlacementGroup], requests: Sequence[RoleRequest]) -> None:
        self._groups = groups
        self._requests = {request.role: request for request in requests}

    def options(self, role: str, index: int) -> dict[str, Any]:
        """Actor options that put replica `index` of `role` into its bundle."""
        request = self._requests[role]
        return {
            "num_cpus": request.cpus,
            "num_gpus": request.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=self._groups[role], placement_group_bundle_index=index
            ),
        }


@contextmanager
def reserve(requests: Sequence[RoleRequest], timeout_s: float) -> Iterator[Reservation]:
    """Reserve every role, or raise DoesNotFit within `timeout_s` seconds; releases at the end."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if reason := shortfall(requests, nodes):
        raise DoesNotFit(f"{reason}; ask for less or add nodes")
    groups: dict[str, PlacementGroup] = {}
    try:
        for request in requests:
            groups[request.role] = placement_group(
                [request.bundle] * request.replicas, strategy=request.strategy
            )
        ready = [group.ready() for group in groups.values()]
        done, _ = ray.wait(ready, num_returns=len(ready), timeout=timeout_s)
        if len(done) < len(ready):
            waiting = [r for r, ref in zip(groups, ready, strict=True) if ref not in done]
            free = ray.available_resources()
            raise DoesNotFit(
                f"no place for {', '.join(waiting)} within {timeout_s:g} s: the run asks for "
                f"{totals(requests)} and the cluster has free CPU {free.get('CPU', 0):g}, "
                f"GPU {free.get('GPU', 0):g}; other runs hold the rest"
            )
        yield Reservation(groups, requests)
    finally:
        for group in groups.values():
            remove_placement_group(group)
