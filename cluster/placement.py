"""Where every replica of every role goes: a pure function over a description of the cluster.

Invariant: no device, CPU or byte of memory is given out twice; every replica of every role has a
place, or the answer is a reason that names what is missing, where, and what would fit. The same
question has the same answer. What Ray is asked for accordingly is in `cluster.reservation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from cluster.bundles import UNIT, BundleSet, Strategy, amounts, bundle
from cluster.resources import Cluster, Node

MOST_NODES_ADDED = 4096


class DoesNotFit(RuntimeError):
    """The cluster cannot give what the run asks for; the message says what is missing."""


class Slot(NamedTuple):
    """One replica's place: the node's index in the cluster, and its devices there."""

    node: int
    devices: tuple[int, ...]  # empty without a GPU; one number where a device is shared


@dataclass(frozen=True)
class Placement:
    """The place of every replica, by role; replica numbers go up with node and device."""

    slots: Mapping[str, tuple[Slot, ...]]


@dataclass(frozen=True)
class Shortage:
    """Why there is no placement."""

    role: str
    missing: str  # what is missing, and where
    certain: bool  # no arrangement can exist; False: none was found
    would_fit: str = ""

    def __str__(self) -> str:
        return self.missing + (f"; {self.would_fit}" if self.would_fit else "")


def place(sets: Sequence[BundleSet], cluster: Cluster, advice: bool = True) -> Placement | Shortage:
    """A place for every replica, or why there is none, with what would fit unless not `advice`.

    Bundles that are hard to place go first (STRICT_PACK, then by GPUs, memory, CPUs). Those without
    a GPU go to nodes that have none, and to others where these have no room. Bin packing has no
    quick exact answer: where this order finds none, two others are tried, each without sparing the
    GPU nodes too, and a `Shortage` that does not follow from the sums is not `certain`.
    """
    found = _search(sets, cluster)
    if advice and isinstance(found, Shortage):
        return replace(found, would_fit=_what_would_fit(sets, cluster, found.role))
    return found


def placement_order(sets: Iterable[BundleSet]) -> list[BundleSet]:
    """The sets in the order in which they are placed: hard ones first."""
    return sorted(sets, key=_hardness)


def _hardness(item: BundleSet) -> tuple[float, ...]:
    resources = item.bundle
    sizes = [-resources.get(name, 0.0) for name in ("GPU", "memory", "CPU")]
    return (item.placement != "STRICT_PACK", *sizes)


def _search(sets: Sequence[BundleSet], cluster: Cluster) -> Placement | Shortage:
    if sure := _certain(sets, cluster):
        return sure
    first: Shortage | None = None
    orders: tuple[Callable[[BundleSet], tuple[float, ...]], ...] = (
        _hardness,
        lambda item: (-item.bundle.get("CPU", 0.0),),
        lambda item: (-item.replicas * item.bundle.get("GPU", 0.0),),
    )
    mixed = len({node.gpus > 0 for node in cluster.nodes}) > 1
    for order in orders:
        for spare in (True, False) if mixed else (False,):
            found = _greedy(sorted(sets, key=order), cluster, spare)
            if isinstance(found, Placement):
                return found
            first = first or found
    assert first is not None
    return first


def _certain(sets: Sequence[BundleSet], cluster: Cluster) -> Shortage | None:
    """What no arrangement can change: too little in all, or no node large enough."""
    nodes = cluster.nodes
    for name, have in (
        ("CPU", sum(node.cpus for node in nodes)),
        ("GPU", sum(node.gpus for node in nodes)),
    ):
        users = [item for item in sets if name in item.bundle]
        asked = sum(item.bundle[name] * item.replicas for item in users)
        if asked > have + 0.5 / UNIT:
            each = ", ".join(f"{i.name} {i.replicas} x {i.bundle[name]:g}" for i in users)
            largest = max(users, key=lambda item: item.bundle[name] * item.replicas)
            return Shortage(
                largest.name,
                f"the run asks for {asked:g} {name} ({each}) and the cluster's {len(nodes)} "
                f"node(s) have {have:g}",
                certain=True,
            )
    fresh = list(_Room.of(cluster))
    for item in sets:
        size = _Size.of(item)
        room = [node.capacity(size) for node in fresh]
        if not any(room):
            return Shortage(
                item.name,
                f"no node is large enough for one {item.name} ({amounts(item.bundle)}); "
                f"{_roomiest(nodes)}",
                certain=True,
            )
        if item.placement == "STRICT_PACK" and max(room) < item.replicas:
            best = nodes[room.index(max(room))].name
            return Shortage(
                item.name,
                f"{item.describe()} is STRICT_PACK, and {best}, the roomiest node, has place for "
                f"{max(room)}",
                certain=True,
            )
        usable = sum(1 for count in room if count)
        if item.placement == "STRICT_SPREAD" and usable < item.replicas:
            return Shortage(
                item.name,
                f"{item.describe()} is STRICT_SPREAD and needs as many nodes; {usable} of the "
                f"cluster's {len(nodes)} node(s) have place for one",
                certain=True,
            )
    return None


def _roomiest(nodes: Sequence[Node]) -> str:
    """The largest node in words."""
    if not nodes:
        return "the cluster has no node"
    best = max(nodes, key=lambda node: (node.gpus, node.cpus))
    memory = best.memory_bytes or 0
    return f"the largest, {best.name}, has {amounts(bundle(best.cpus, best.gpus, memory))}"


def _greedy(sets: Sequence[BundleSet], cluster: Cluster, spare: bool) -> Placement | Shortage:
    """`spare` keeps bundles without a GPU away from nodes with some, as far as there is room."""
    rooms = list(_Room.of(cluster))
    slots: dict[str, tuple[Slot, ...]] = {}
    for item in sets:
        size = _Size.of(item)
        room = [node.capacity(size) for node in rooms]
        counts = None
        if spare and not item.gpus:
            counts = _sparing(item, room, [node.gpus > 0 for node in cluster.nodes])
        counts = counts or _SPREADS[item.placement](room, item.replicas)
        if counts is None:
            return _none_left(item, room, rooms)
        taken = tuple(_take(rooms, counts, size))
        for request in item.members:
            slots[request.role] = taken if request.gpus else tuple(Slot(s.node, ()) for s in taken)
    return Placement(slots)


def _none_left(item: BundleSet, room: Sequence[int], rooms: Sequence[_Room]) -> Shortage:
    placed = {
        "PACK": min(sum(room), item.replicas),
        "SPREAD": min(sum(room), item.replicas),
        "STRICT_PACK": max(room),
        "STRICT_SPREAD": sum(1 for count in room if count),
    }[item.placement]
    left = sorted(rooms, key=lambda node: (-node.gpus_left(), -node.cpus))[:3]
    where = "; ".join(
        f"{node.name} {amounts({'CPU': node.cpus / UNIT, 'GPU': node.gpus_left() / UNIT})}"
        for node in left
    )
    return Shortage(
        item.name,
        f"place for {placed} of {item.describe()} ({item.placement}) beside the other roles; most "
        f"is left on {where}",
        certain=False,
    )


def _what_would_fit(sets: Sequence[BundleSet], cluster: Cluster, role: str) -> str:
    """Fewer replicas of the role that has no place, or more nodes like the largest."""
    answers = []
    item = next(one for one in sets if one.name == role)

    def with_replicas(count: int) -> bool:
        fewer = tuple(replace(request, replicas=count) for request in item.members)
        trial = [BundleSet(fewer) if one is item else one for one in sets]
        return not isinstance(_search(trial, cluster), Shortage)

    def with_nodes(count: int) -> bool:
        model = max(cluster.nodes, key=lambda node: (node.gpus, node.cpus))
        more = replace(cluster, nodes=cluster.nodes + (model,) * count)
        return not isinstance(_search(sets, more), Shortage)

    if (fewer := _largest(with_replicas, item.replicas - 1)) > 0:
        answers.append(f"{fewer} of {item.name} would")
    model = max(cluster.nodes, key=lambda node: (node.gpus, node.cpus), default=None)
    if model is None or not _Room(model).capacity(_Size.of(item)):
        answers.append(f"nodes with {amounts(item.bundle)} or more")
    elif more := _smallest(with_nodes):
        answers.append(f"{more} more node(s) like {model.name}")
    elif item.placement == "STRICT_PACK":
        answers.append(f"resources.placement=PACK for {item.name}")
    else:
        answers.append(f"more than {MOST_NODES_ADDED} more nodes like {model.name}")
    return f"what would fit: {', or '.join(answers)}"


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, by halving; 0 where 1 does not."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _smallest(fits: Callable[[int], bool]) -> int:
    """The smallest number from 1 to MOST_NODES_ADDED that fits; 0 where none does."""
    high = 1
    while not fits(high):
        high *= 2
        if high > MOST_NODES_ADDED:
            return 0
    low = high // 2 + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


class _Size(NamedTuple):
    """One bundle in ten-thousandths, memory in bytes."""

    cpus: int
    gpus: int
    memory: int

    @classmethod
    def of(cls, item: BundleSet) -> _Size:
        resources = item.bundle
        return cls(
            round(UNIT * resources.get("CPU", 0.0)),
            round(UNIT * resources.get("GPU", 0.0)),
            int(resources.get("memory", 0.0)),
        )


class _Room:
    """What is left of one node while roles are placed."""

    __slots__ = ("cpus", "devices", "memory", "name")

    def __init__(self, node: Node) -> None:
        self.name = node.name
        self.cpus = round(UNIT * node.cpus)
        self.memory = node.memory_bytes  # None: not known, so not counted
        whole, part = divmod(round(UNIT * node.gpus), UNIT)
        self.devices = [UNIT] * whole + ([part] if part else [])

    @staticmethod
    def of(cluster: Cluster) -> Iterator[_Room]:
        return map(_Room, cluster.nodes)

    def gpus_left(self) -> int:
        return sum(self.devices)

    def capacity(self, size: _Size) -> int:
        """How many bundles of this size fit."""
        count = self.cpus // size.cpus if size.cpus else 2**31
        if size.memory and self.memory is not None:
            count = min(count, self.memory // size.memory)
        if size.gpus >= UNIT:
            whole = self.devices.count(UNIT)
            count = min(count, whole * UNIT // size.gpus)
        elif size.gpus:
            count = min(count, sum(left // size.gpus for left in self.devices))
        return count

    def take(self, size: _Size) -> tuple[int, ...]:
        """Give one bundle out; the devices it is on. `capacity` has said that it fits."""
        self.cpus -= size.cpus
        if self.memory is not None:
            self.memory -= size.memory
        if size.gpus >= UNIT:
            free = [index for index, left in enumerate(self.devices) if left == UNIT]
            chosen = tuple(free[: size.gpus // UNIT])
            for index in chosen:
                self.devices[index] = 0
            return chosen
        if size.gpus:  # the fullest device with place
            best = min(
                (left, index) for index, left in enumerate(self.devices) if left >= size.gpus
            )[1]
            self.devices[best] -= size.gpus
            return (best,)
        return ()


def _take(rooms: Sequence[_Room], counts: Mapping[int, int], size: _Size) -> Iterator[Slot]:
    """The slots of one set by node and device."""
    for index in sorted(counts):
        devices = sorted(rooms[index].take(size) for _ in range(counts[index]))
        for chosen in devices:
            yield Slot(index, chosen)


def _sparing(
    item: BundleSet, room: Sequence[int], with_gpus: Sequence[bool]
) -> dict[int, int] | None:
    """As many bundles as can be on nodes without GPUs, the rest on the others; None: no place."""
    divide = _SPREADS[item.placement]
    plain = [0 if gpus else count for count, gpus in zip(room, with_gpus, strict=True)]
    if item.placement == "STRICT_PACK":
        return divide(plain, item.replicas)
    most = sum(map(bool, plain)) if item.placement == "STRICT_SPREAD" else sum(plain)
    first = divide(plain, min(most, item.replicas))
    others = [count if gpus else 0 for count, gpus in zip(room, with_gpus, strict=True)]
    rest = divide(others, max(0, item.replicas - most))
    return None if first is None or rest is None else first | rest


def _pack(room: Sequence[int], replicas: int) -> dict[int, int] | None:
    """On as few nodes as can be: one that just holds all, else the roomiest first."""
    if sum(room) < replicas:
        return None
    counts: dict[int, int] = {}
    for index in sorted(range(len(room)), key=lambda index: (-room[index], index)):
        if room[index] >= replicas:
            break
        counts[index] = room[index]
        replicas -= room[index]
    if replicas:
        rest = [
            (count, index)
            for index, count in enumerate(room)
            if count >= replicas and index not in counts
        ]
        counts[min(rest)[1]] = replicas
    return {index: count for index, count in counts.items() if count}


def _spread(room: Sequence[int], replicas: int) -> dict[int, int] | None:
    """Evenly over as many nodes as can be, the roomiest first."""
    if sum(room) < replicas:
        return None
    counts: dict[int, int] = {}
    order = sorted(range(len(room)), key=lambda index: (-room[index], index))
    level = 0
    while replicas:
        order = [index for index in order if room[index] > level][:replicas]
        for index in order:
            counts[index] = level + 1
        replicas -= len(order)
        level += 1
    return counts


def _strict_pack(room: Sequence[int], replicas: int) -> dict[int, int] | None:
    rest = [(count, index) for index, count in enumerate(room) if count >= replicas]
    return {min(rest)[1]: replicas} if rest else None


def _strict_spread(room: Sequence[int], replicas: int) -> dict[int, int] | None:
    order = sorted(range(len(room)), key=lambda index: (-room[index], index))
    chosen = [index for index in order if room[index]][:replicas]
    return dict.fromkeys(chosen, 1) if len(chosen) == replicas else None


_SPREADS: Mapping[Strategy, Callable[[Sequence[int], int], dict[int, int] | None]] = {
    "PACK": _pack,
    "SPREAD": _spread,
    "STRICT_PACK": _strict_pack,
    "STRICT_SPREAD": _strict_spread,
}
