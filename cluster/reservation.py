"""Reserves what each role asks for on the connected Ray, all before anything starts.

Invariant: a reservation has a deadline, and is released on every way out.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.bundles import BundleSet, RoleRequest, amounts, bundle, bundle_sets
from cluster.placement import DoesNotFit, Shortage, place, placement_order
from cluster.processes import is_dead, ray_processes
from cluster.resources import connected, living_nodes

PREFIX = "aligntune"  # of the names of placement groups: aligntune/RUN/ROLE


class Reservation:
    """The bundles of every role; replica numbers go up with the address of the node."""

    def __init__(self, groups: Mapping[BundleSet, PlacementGroup], name: str) -> None:
        self._name = name
        self._places = {
            request.role: (request, item, group, _by_node(group))
            for item, group in groups.items()
            for request in item.members
        }
        self._extra: dict[tuple[str, int], PlacementGroup] = {}

    def room(self, role: str, index: int) -> bool:
        """Whether there is a place for replica `index` of `role`, one beyond those reserved.

        The first call asks Ray for it. Until it is there the request stands, so that an autoscaler
        sees what is wanted and a node that joins is taken.
        """
        if (role, index) not in self._extra:
            _, item, *_ = self._places[role]
            self._extra[role, index] = placement_group(
                [item.bundle], name=f"{self._name}/{role}-{index}"
            )
        state = placement_group_table(self._extra[role, index])["state"]
        return bool(state == "CREATED")

    def release(self) -> None:
        """Let go of the places beyond those reserved."""
        for group in self._extra.values():
            remove_placement_group(group)
        self._extra.clear()

    def options(self, role: str, index: int) -> dict[str, Any]:
        """Actor options that put replica `index` of `role` into its bundle."""
        request, item, group, order = self._places[role]
        bundle_index = order[index] if index < len(order) else 0
        group = self._extra.get((role, index), group)
        options: dict[str, Any] = {
            "num_cpus": request.cpus,
            "num_gpus": item.share(role),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=bundle_index
            ),
        }
        if request.memory_bytes:
            options["memory"] = request.memory_bytes
        return options


def _by_node(group: PlacementGroup) -> list[int]:
    """Bundle numbers in the order of their nodes' addresses, as ranks want them."""
    position = {node["NodeID"]: index for index, node in enumerate(living_nodes())}
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return sorted(nodes, key=lambda number: (position.get(nodes[number], len(position)), number))


@contextmanager
def reserve(
    requests: Sequence[RoleRequest],
    timeout_s: float,
    colocate: Sequence[Sequence[str]] = (),
    run: str = "run",
) -> Iterator[Reservation]:
    """Reserve every role, or raise DoesNotFit within `timeout_s` seconds; releases at the end.

    `run` and a random part go into the groups' names, so that runs on one cluster do not meet.

    Raises:
        DoesNotFit: at once where the cluster can never hold the run, else at the deadline.
        BadRequest: see `bundle_sets`.
    """
    sets = bundle_sets(requests, colocate)
    ensure_possible(sets)
    name = f"{PREFIX}/{run}-{uuid.uuid4().hex[:8]}"
    groups: dict[BundleSet, PlacementGroup] = {}
    reservation: Reservation | None = None
    needed = ray_processes()
    try:
        for item in placement_order(sets):
            groups[item] = placement_group(
                [item.bundle] * item.replicas, strategy=item.placement, name=f"{name}/{item.name}"
            )
        ready = {group.ready(): item for item, group in groups.items()}
        done, _ = ray.wait(list(ready), num_returns=len(ready), timeout=timeout_s)
        if waiting := [item for ref, item in ready.items() if ref not in done]:
            raise DoesNotFit(_why(waiting, timeout_s, name))
        reservation = Reservation(groups, name)
        yield reservation
    finally:
        if not any(is_dead(process) for process in needed.values()):  # else none would answer
            if reservation is not None:
                reservation.release()
            for group in groups.values():
                remove_placement_group(group)


def ensure_possible(sets: Sequence[BundleSet]) -> None:
    """Raise DoesNotFit where the connected cluster, were it idle, could never hold `sets`."""
    found = place(sets, connected())
    if isinstance(found, Shortage) and found.certain:
        raise DoesNotFit(f"{found}; ask for less or add nodes")


def _why(waiting: Sequence[BundleSet], timeout_s: float, own: str) -> str:
    """What is missing where, who holds the rest, and what would fit."""
    roles = ", ".join(item.describe() for item in waiting)
    found = place(waiting, connected(free=True))
    reason = str(found) if isinstance(found, Shortage) else "resources were freed just now"
    holders = _holders(own)
    held = ", ".join(f"{name} ({amounts(what)})" for name, what in holders.items())
    return (
        f"no place for {roles} within {timeout_s:g} s: {reason} (counting what is free); "
        f"the rest is held by {held or 'tasks and actors outside of placement groups'}; wait for "
        "them, ask for less or add nodes"
    )


def _holders(own: str) -> dict[str, dict[str, float]]:
    """What every placement group that is up holds, by its name; ours as this run's other roles."""
    held: dict[str, dict[str, float]] = {}
    for entry in placement_group_table().values():
        if entry["state"] not in ("CREATED", "RESCHEDULING"):
            continue
        name = entry["name"] or f"placement group {entry['placement_group_id'][:8]}"
        name = "this run's other roles" if name.startswith(f"{own}/") else name
        total = held.setdefault(name, {})
        for resources in entry["bundles"].values():
            for kind, amount in resources.items():
                total[kind] = total.get(kind, 0.0) + amount
    return {
        name: bundle(total.get("CPU", 0.0), total.get("GPU", 0.0), total.get("memory", 0.0))
        for name, total in held.items()
    }
