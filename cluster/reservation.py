"""Reserves what each role asks for on the connected Ray, all before anything starts.

Invariant: a reservation has a deadline, and is released on every way out.

Bundles without a GPU that `cluster.placement` puts on nodes without GPUs are asked for there. Where
others hold those nodes, or they are lost, any node will do.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.bundles import BundleSet, RoleRequest, amounts, bundle, bundle_sets
from cluster.placement import DoesNotFit, Placement, Shortage, place, placement_order
from cluster.processes import is_dead, ray_processes
from cluster.resources import Cluster, connected, from_ray, living_nodes

PREFIX = "aligntune"  # of the names of placement groups: aligntune/RUN/ROLE
NODE = "ray.io/node-id"  # Ray's label of every node
SPARING_S = 5.0  # longest wait for nodes without GPUs that an idle cluster would have room on


class Reservation:
    """The bundles of every role; replica numbers go up with the address of the node."""

    def __init__(
        self,
        groups: Mapping[BundleSet, PlacementGroup],
        name: str,
        sparing: Collection[BundleSet] = (),
    ) -> None:
        self._name = name
        self._sparing = sparing  # those that may go to nodes without GPUs alone
        self._places = {
            request.role: (request, item, group, _by_node(group))
            for item, group in groups.items()
            for request in item.members
        }
        self._extra: dict[tuple[str, int], PlacementGroup] = {}

    def room(self, role: str, index: int) -> bool:
        """Whether there is a place for replica `index` of `role`, one beyond those reserved."""
        return _is_given(self._beyond(role, index))

    def _beyond(self, role: str, index: int) -> PlacementGroup:
        """The place of a replica beyond those reserved; the first call asks Ray for it.

        Until it is given the request stands, so that an autoscaler sees what is wanted and a node
        that joins is taken.
        """
        if (role, index) not in self._extra:
            _, item, *_ = self._places[role]
            self._extra[role, index] = placement_group(
                [item.bundle], name=f"{self._name}/{role}-{index}"
            )
        return self._extra[role, index]

    def release(self) -> None:
        """Let go of the places beyond those reserved."""
        for group in self._extra.values():
            remove_placement_group(group)
        self._extra.clear()

    def options(self, role: str, index: int) -> dict[str, Any]:
        """Actor options that put replica `index` of `role` into its bundle."""
        request, item, group, order = self._places[role]
        bundle_index = order[index] if index < len(order) else 0
        if index >= len(order) or self._homeless(item, group, bundle_index):
            group, bundle_index = self._beyond(role, index), 0
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

    def _homeless(self, item: BundleSet, group: PlacementGroup, number: int) -> bool:
        """Whether the node of a bundle is lost, and no other that it may go to has room."""
        if item not in self._sparing:
            return False  # Ray finds it another
        node = placement_group_table(group)["bundles_to_node_id"].get(number)
        return node not in {alive["NodeID"] for alive in living_nodes()}


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
    deadline = time.monotonic() + timeout_s
    nodes = living_nodes()
    selectors = selectors_of(sets, _idle(sets, nodes), nodes)
    name = f"{PREFIX}/{run}-{uuid.uuid4().hex[:8]}"
    groups: dict[BundleSet, PlacementGroup] = {}
    reservation: Reservation | None = None
    needed = ray_processes()
    try:
        for item in placement_order(sets):
            groups[item] = _ask(item, f"{name}/{item.name}", selectors.get(item))
        ready = {item: group.ready() for item, group in groups.items()}
        if selectors:
            patience = min(SPARING_S, timeout_s)
            ray.wait(list(ready.values()), num_returns=len(ready), timeout=patience)
        for item in [item for item in selectors if not _is_given(groups[item])]:
            remove_placement_group(groups[item])
            groups[item] = _ask(item, f"{name}/{item.name}-anywhere")
            ready[item] = groups[item].ready()
            del selectors[item]
        left = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait(list(ready.values()), num_returns=len(ready), timeout=left)
        if waiting := [item for item, ref in ready.items() if ref not in done]:
            raise DoesNotFit(_why(waiting, timeout_s, name))
        reservation = Reservation(groups, name, selectors)
        yield reservation
    finally:
        if not any(is_dead(process) for process in needed.values()):  # else none would answer
            if reservation is not None:
                reservation.release()
            for group in groups.values():
                remove_placement_group(group)


def ensure_possible(sets: Sequence[BundleSet]) -> None:
    """Raise DoesNotFit where the connected cluster, were it idle, could never hold `sets`."""
    _idle(sets, living_nodes())


def _idle(sets: Sequence[BundleSet], nodes: Sequence[Mapping[str, Any]]) -> Placement | Shortage:
    """The places of `sets` on these nodes, were they idle, as a plan has them."""
    found = place(sets, Cluster(tuple(map(from_ray, nodes)), "Ray"))
    if isinstance(found, Shortage) and found.certain:
        raise DoesNotFit(f"{found}; ask for less or add nodes")
    return found


def selectors_of(
    sets: Sequence[BundleSet], found: Placement | Shortage, nodes: Sequence[Mapping[str, Any]]
) -> dict[BundleSet, list[dict[str, str]]]:
    """Which nodes Ray may take for each bundle of a set, where it must be one without GPUs.

    Of a set without a GPU that a plan puts on such nodes; a bundle that has none there may go
    anywhere. Sets that may go anywhere altogether are left out.
    """
    with_gpus = [node["NodeID"] for node in nodes if node["Resources"].get("GPU")]
    if isinstance(found, Shortage) or not with_gpus:
        return {}
    selectors = {}
    for item in sets:
        slots = () if item.gpus else found.slots[item.members[0].role]
        spared = sum(nodes[slot.node]["NodeID"] not in with_gpus for slot in slots)
        if spared:
            # Ray takes a space after a comma for a part of the name.
            apart = {NODE: f"!in({','.join(with_gpus)})"}
            selectors[item] = [apart] * spared + [{}] * (item.replicas - spared)
    return selectors


def _ask(
    item: BundleSet, name: str, selectors: list[dict[str, str]] | None = None
) -> PlacementGroup:
    return placement_group(
        [item.bundle] * item.replicas,
        strategy=item.placement,
        name=name,
        bundle_label_selector=selectors,
    )


def _is_given(group: PlacementGroup) -> bool:
    return bool(placement_group_table(group)["state"] == "CREATED")


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
