"""The pre-flight of a run: where each rank goes, what it keeps in memory, what a step will cost.

Pure functions over a description of the run (`plan_work`) and of the cluster (`resources`): nothing
is started, nothing is measured. A run that cannot fit is refused with what is short, on which
device, by how much, and which settings would make it fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cluster.bundles import bundle_sets
from cluster.placement import DoesNotFit, Placement, Shortage, place
from cluster.plan.durations import ASSUMPTIONS, Rates, Times, times
from cluster.plan.memory import (
    GIB,
    KINDS,
    Memory,
    frozen_memory,
    kv_bytes,
    rollout_memory,
    trained_memory,
)
from cluster.plan.options import Option, to_be_faster, to_fit
from cluster.plan.work import Work
from cluster.resources import Cluster, GpuType, UnknownName, gpu_type

WORTH = 0.9  # a change is proposed where the step takes at most this share of its time
MOST_FITTING = 3  # changes that are named where a run does not fit
MOST_TOGETHER = 6
MOST_CHANGES = 5


@dataclass(frozen=True)
class Use:
    """One device, or the memory of one node, and who is on it."""

    node: int
    device: int | None  # None: the host's memory
    occupants: tuple[tuple[str, int], ...]  # (role, replica)
    bytes: int
    capacity: int | None  # None: not known, so not checked


@dataclass(frozen=True)
class Change:
    """A setting that the plan would change, and the step time with it, in seconds."""

    settings: str
    step_seconds: float


@dataclass(frozen=True)
class Plan:
    """A run that fits."""

    work: Work
    cluster: Cluster
    placement: Placement
    memory: Mapping[str, Memory]
    uses: tuple[Use, ...]
    times: Times
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the figures rest on."""
        return (*ASSUMPTIONS, *self.notes)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for --json: bytes, seconds, shares."""
        nodes = self.cluster.nodes
        stalenesses = sorted({0, 1, self.work.step.max_staleness})
        return {
            "cluster": {
                "source": self.cluster.source,
                "nodes": [node._asdict() for node in nodes],
            },
            "placement": {
                role: [{"node": nodes[s.node].name, "devices": list(s.devices)} for s in slots]
                for role, slots in self.placement.slots.items()
            },
            "memory": {
                role: {"device": m.device, "device_peak": m.peak, "host": m.host}
                for role, m in self.memory.items()
            },
            "devices": [
                {
                    "node": nodes[use.node].name,
                    "device": use.device,
                    "roles": [f"{role} {index}" for role, index in use.occupants],
                    "bytes": use.bytes,
                    "capacity": use.capacity,
                }
                for use in self.uses
            ],
            "seconds": self.times.parts,
            "bound": self.times.bound,
            "staleness": {
                str(bound): {
                    "step_seconds": self.times.step(bound),
                    "idle_rollout": self.times.idle(bound)[0],
                    "idle_policy": self.times.idle(bound)[1],
                }
                for bound in stalenesses
            },
            "changes": [vars(change) for change in self.changes],
            "assumptions": list(self.assumptions),
        }


@dataclass(frozen=True)
class _Draft:
    """Placement and memory, before the question whether they fit."""

    placement: Placement
    memory: dict[str, Memory]
    uses: tuple[Use, ...]


def make_plan(work: Work, cluster: Cluster) -> Plan:
    """The plan of `work` on `cluster`.

    Raises:
        DoesNotFit: no place, or too little memory; one line with what would fit.
        BadRequest: see `bundle_sets`.
        UnknownName: GPUs whose type is not known.
    """
    found = place(bundle_sets(work.requests, work.colocate), cluster)
    if isinstance(found, Shortage):
        raise DoesNotFit(str(found))
    draft = _draft(work, cluster, found)
    if short := _shortest(draft, work):
        raise DoesNotFit(_explain(short, draft, work, cluster))
    seconds = _times(draft, work, cluster)
    return Plan(
        work,
        cluster,
        found,
        draft.memory,
        draft.uses,
        seconds,
        tuple(_faster(work, cluster, seconds)),
        tuple(_notes(work, cluster, draft)),
    )


def _gpu_of(role: str, placement: Placement, cluster: Cluster) -> GpuType | None:
    """The slowest GPU that the role is on; None where it has none.

    Raises UnknownName where a GPU's type is not known.
    """
    names = {
        cluster.nodes[slot.node].gpu: cluster.nodes[slot.node].name
        for slot in placement.slots[role]
        if slot.devices
    }
    if None in names:
        raise UnknownName(
            f"the GPUs of {names[None]} are of no type that the table has; say what they are like "
            "with --gpu NAME"
        )
    kinds = [gpu_type(name) for name in names if name is not None]
    return min(kinds, key=lambda kind: kind.flops, default=None)


def _draft(work: Work, cluster: Cluster, placement: Placement) -> _Draft:
    gpus = {role: _gpu_of(role, placement, cluster) for role in placement.slots}
    memory = _memory(work, {role: gpu for role, gpu in gpus.items() if gpu is not None})
    return _Draft(placement, memory, tuple(_uses(work, cluster, placement, memory)))


def _memory(work: Work, gpus: Mapping[str, GpuType]) -> dict[str, Memory]:
    """What a replica of each role with a model keeps; `gpus` by role, for those on one."""
    memory = {one.role: trained_memory(one, one.role in gpus) for one in work.trained}
    memory["rollout"] = rollout_memory(work.rollout, work.step, gpus.get("rollout"))
    for frozen in work.frozen:
        more = frozen_memory(frozen, frozen.role in gpus)
        memory[frozen.role] = _both(memory.get(frozen.role), more)
    return memory


def _both(first: Memory | None, second: Memory) -> Memory:
    """Two models of one replica; it has one framework."""
    if first is None:
        return second
    device = {kind: first.device.get(kind, 0) + second.device.get(kind, 0) for kind in KINDS}
    return Memory({**device, "framework": second.device["framework"]}, on_gpu=second.on_gpu)


def _uses(
    work: Work, cluster: Cluster, placement: Placement, memory: Mapping[str, Memory]
) -> Iterator[Use]:
    """Every device and host with somebody on it, by node and device, the host last."""
    on: dict[tuple[int, int], list[tuple[str, int]]] = {}
    hosts: dict[int, list[tuple[str, int]]] = {}
    filled: dict[int, int] = {}
    bundle = work.policy.shape.parameters * work.policy.dtype_bytes
    peaks = {role: needs.peak for role, needs in memory.items()}
    for role in (request.role for request in work.requests):
        slots, needs = placement.slots[role], memory.get(role)
        for index, (node, devices) in enumerate(slots):
            for device in devices:
                on.setdefault((node, device), []).append((role, index))
            if needs is None:
                here = 0
            elif devices:
                here = needs.host_bytes
                if role == "policy" and index > 0:  # rank 0 alone packs the weights
                    here -= needs.host.get("transfer", 0)
            else:
                here = peaks[role]
            if here or not devices:
                hosts.setdefault(node, []).append((role, index))
            filled[node] = filled.get(node, 0) + here
    for node in _stores(placement):
        filled[node] = filled.get(node, 0) + bundle
        hosts.setdefault(node, [])
    for (node, device), occupants in sorted(on.items()):
        kind = cluster.nodes[node].gpu
        capacity = gpu_type(kind).memory_bytes if kind else None
        yield Use(
            node,
            device,
            tuple(occupants),
            sum(peaks.get(role, 0) for role, _ in occupants),
            capacity,
        )
    for node, occupants in sorted(hosts.items()):
        capacity = cluster.nodes[node].memory_bytes
        yield Use(node, None, tuple(occupants), filled[node], capacity)


def _stores(placement: Placement) -> set[int]:
    """Nodes whose object store holds a version's weights: of rank 0 and of every rollout."""
    return {placement.slots["policy"][0].node, *(s.node for s in placement.slots["rollout"])}


@dataclass(frozen=True)
class _Short:
    """The device that is short by the most, and the roles on it, that which takes most first."""

    use: Use
    roles: tuple[str, ...]
    by: int
    cache: bool = False  # the KV cache does not hold one sequence


def _shortest(draft: _Draft, work: Work) -> _Short | None:
    worst: _Short | None = None
    for use in draft.uses:
        if use.capacity is None or use.bytes <= use.capacity:
            continue
        by = use.bytes - use.capacity
        if worst is None or by > worst.by:
            there = dict.fromkeys(role for role, _ in use.occupants if role in draft.memory)
            roles = sorted(there, key=lambda role: -draft.memory[role].peak)
            worst = _Short(use, tuple(roles) or ("policy",), by)
    if worst is None:
        return _short_cache(draft, work)
    return worst


def _short_cache(draft: _Draft, work: Work) -> _Short | None:
    """vLLM takes no more than its share, so what is short shows in its cache."""
    if work.rollout.engine != "vllm":
        return None
    needed = kv_bytes(work.rollout) * work.step.longest
    have = draft.memory["rollout"].device["KV cache"]
    if have >= needed:
        return None
    use = next(u for u in draft.uses if any(role == "rollout" for role, _ in u.occupants))
    return _Short(use, ("rollout",), needed - have, cache=True)


def _explain(short: _Short, draft: _Draft, work: Work, cluster: Cluster) -> str:
    use, role = short.use, short.roles[0]
    memory = draft.memory[role]
    kinds = {k: v for k, v in memory.device.items() if v > 0.02 * memory.peak}
    parts = ", ".join(
        f"{kind} {gib(v)}" for kind, v in sorted(kinds.items(), key=lambda item: -item[1])
    )
    place_name = cluster.nodes[use.node].name
    where = f"{place_name}, GPU {use.device}" if use.device is not None else f"{place_name}, host"
    who = ", ".join(f"{role} {index}" for role, index in use.occupants[:4])
    if len(use.occupants) > 4:
        who += f" and {len(use.occupants) - 4} more"
    if short.cache:
        said = (
            f"{where} ({who}): after weights and workspace vLLM's share leaves {gib(short.by)} too "
            f"little KV cache for one sequence of {work.step.longest} tokens"
        )
    else:
        said = (
            f"{where} ({who}) needs {gib(use.bytes)} and has {gib(use.capacity or 0)}: "
            f"{gib(short.by)} short"
        )
    return f"{said} ({role}: {parts}); {_would_fit(short.roles, work, cluster)}"


def _would_fit(roles: tuple[str, ...], work: Work, cluster: Cluster) -> str:
    """Options that make the run fit, each alone; else several, each for what is short the most."""
    found: list[Option] = []
    for option in _options(work, roles):
        if any(one.settings.keys() <= option.settings.keys() for one in found):
            continue  # less of the same does
        if _excess(option, cluster) == 0:
            found.append(option)
        if len(found) == MOST_FITTING:
            break
    if found:
        return f"what would fit: {', or '.join(option.describe() for option in found)}"
    taken = Option({}, work)
    for _ in range(MOST_TOGETHER):
        scored = [
            (excess, option)
            for option in _options(taken.work, roles)
            if (excess := _excess(option, cluster)) is not None
        ]
        best = next(_with_place(scored, cluster), None)
        if best is None:
            break
        option, draft = best
        taken = option.after(taken)
        short = _shortest(draft, taken.work)
        if short is None:
            return f"what would fit: {taken.describe()}"
        roles = short.roles
    return (
        f"no setting that a plan tries makes it fit, {roles[0]} stays too large; take a smaller "
        "model, or GPUs or nodes with more memory"
    )


def _with_place(
    scored: list[tuple[int, Option]], cluster: Cluster
) -> Iterator[tuple[Option, _Draft]]:
    """Options that have a place, by what they leave short."""
    for _, option in sorted(scored, key=lambda score: score[0]):
        if draft := _try(option.work, cluster):
            yield option, draft


def _options(work: Work, roles: Iterable[str]) -> Iterator[Option]:
    """Options that make any of `roles` smaller."""
    return chain.from_iterable(to_fit(work, role) for role in roles)


def _excess(option: Option, cluster: Cluster) -> int | None:
    """Bytes short on the worst device; 0 where it fits, None where it surely has no place."""
    if alone := _excess_alone(option.work, cluster):
        return alone  # whatever the place, and much quicker to find
    draft = _try(option.work, cluster)
    if draft is None:
        return None
    short = _shortest(draft, option.work)
    return short.by if short else 0


def _excess_alone(work: Work, cluster: Cluster) -> int:
    """By how much the largest role on a GPU exceeds the largest GPU of the cluster, by itself."""
    kinds = [gpu_type(name) for name in {node.gpu for node in cluster.nodes} if name is not None]
    largest = max(kinds, key=lambda kind: kind.memory_bytes, default=None)
    on_gpu = {request.role for request in work.requests if request.gpus}
    if largest is None or not on_gpu:
        return 0
    memory = _memory(work, dict.fromkeys(on_gpu, largest))
    return max(0, *(memory[role].peak - largest.memory_bytes for role in on_gpu if role in memory))


def _try(work: Work, cluster: Cluster) -> _Draft | None:
    """A draft of an option; None where it has no place."""
    found = place(bundle_sets(work.requests, work.colocate), cluster, advice=False)
    return None if isinstance(found, Shortage) else _draft(work, cluster, found)


def _times(draft: _Draft, work: Work, cluster: Cluster) -> Times:
    rates, spans, slots = {}, {}, draft.placement.slots
    dtypes = {one.role: one.dtype_bytes for one in work.models}
    cpus = {request.role: request.cpus for request in work.requests}
    for role, dtype_bytes in dtypes.items():
        gpu = _gpu_of(role, draft.placement, cluster)
        rates[role] = Rates.of_gpu(gpu, dtype_bytes) if gpu else Rates.of_cpu(cpus[role])
        spans[role] = len({slot.node for slot in slots[role]})
    far = len({slot.node for slot in slots["rollout"]} - {slots["policy"][0].node})
    shared = {
        tuple(role for role, _ in use.occupants) for use in draft.uses if use.device is not None
    }
    return times(work, rates, draft.memory, spans, far, map(Counter, shared))


def _faster(work: Work, cluster: Cluster, now: Times) -> Iterator[Change]:
    """Options with which a step is clearly shorter, the best first."""
    seconds = now.step(work.step.max_staleness)
    changes: dict[float, Change] = {}
    for option in to_be_faster(work):
        draft = _try(option.work, cluster)
        if draft is None or _shortest(draft, option.work):
            continue
        then = _times(draft, option.work, cluster).step(option.work.step.max_staleness)
        if then <= WORTH * seconds:
            changes.setdefault(then, Change(option.describe(), then))  # the first is the simplest
    yield from sorted(changes.values(), key=lambda change: change.step_seconds)[:MOST_CHANGES]


def _notes(work: Work, cluster: Cluster, draft: _Draft) -> Iterator[str]:
    """What is assumed of this run in particular."""
    for shape in dict.fromkeys(one.shape for one in work.models):
        yield f"sizes of {shape.name}: {shape.parameters / 1e9:.3g}B parameters, {shape.source}"
    unknown = {use.node for use in draft.uses if use.capacity is None}
    if unknown:
        name = cluster.nodes[min(unknown)].name
        yield f"memory of the host is not known of {len(unknown)} node(s), such as {name}"


def gib(amount: float) -> str:
    """Bytes for people."""
    if abs(amount) >= 0.1 * GIB:
        return f"{amount / GIB:.1f} GiB"
    return f"{amount / 2**20:.1f} MiB"
